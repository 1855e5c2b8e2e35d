//! A name server at a loopback address of the guest. The host answers its queries: Docker's for user-defined
//! networks, 127.0.0.11, which listens in the network namespace on the host.
//!
//! Queries and answers are DNS messages (RFC 1035, section 4) in frames of one stream
//! ([`koya_protocol::names`]).

use anyhow::{Context, Result};
use koya_protocol::STREAM_PORT;
use koya_protocol::names::{HEADER_LEN, OVER_TCP, frame, parse_header};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::spawn_local;
use tokio::time::timeout;
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

const PORT: u16 = 53;
/// Maximum number of pending queries; beyond that the oldest one is dropped.
const WAITING: usize = 256;
/// Maximum number of connected clients.
const CLIENTS: usize = 32;
/// Time limit for a silent client, and for an answer to a connected one.
const LIMIT: Duration = Duration::from_secs(15);

/// Time limit for another name server: less than that of Docker, which sends the query.
const SERVER_LIMIT: Duration = Duration::from_secs(3);

/// The client of a query.
enum Asker {
    Datagram(SocketAddr),
    Client(oneshot::Sender<Vec<u8>>),
}

/// Pending queries, and the channel to the host.
struct Questions {
    next: u32,
    waiting: VecDeque<(u32, Asker)>,
    to_host: mpsc::Sender<Vec<u8>>,
}

impl Questions {
    /// Sends a query to the host. If the channel is full, it is dropped, like a lost datagram.
    fn ask(&mut self, message: &[u8], asker: Asker) {
        let over_tcp = match asker {
            Asker::Datagram(_) => 0,
            Asker::Client(_) => OVER_TCP,
        };
        self.next = (self.next + 1) & !OVER_TCP;
        let id = self.next | over_tcp;
        let Some(frame) = frame(id, message) else {
            return;
        };
        if self.to_host.try_send(frame).is_err() {
            return;
        }
        if self.waiting.len() == WAITING {
            self.waiting.pop_front();
        }
        self.waiting.push_back((id, asker));
    }

    fn asker(&mut self, id: u32) -> Option<Asker> {
        let index = self.waiting.iter().position(|(own, _)| *own == id)?;
        Some(self.waiting.remove(index)?.1)
    }
}

type Shared = Rc<RefCell<Questions>>;

/// Listens at `address`, and forwards queries to the host over the stream with this token, until it ends.
pub(crate) async fn serve(address: IpAddr, token: &str) -> Result<()> {
    let at = SocketAddr::from((address, PORT));
    let bound = || format!("cannot listen at {at}");
    let datagrams = Rc::new(UdpSocket::bind(at).await.with_context(bound)?);
    let listener = TcpListener::bind(at).await.with_context(bound)?;
    let host = VsockAddr::new(VMADDR_CID_HOST, STREAM_PORT);
    let mut stream = VsockStream::connect(host).await?;
    stream.write_all(token.as_bytes()).await?;
    let (mut from_host, mut into_host) = tokio::io::split(stream);
    let (to_host, mut frames) = mpsc::channel::<Vec<u8>>(WAITING);
    let questions = Rc::new(RefCell::new(Questions {
        next: 0,
        waiting: VecDeque::new(),
        to_host,
    }));
    let send = async move {
        while let Some(frame) = frames.recv().await {
            into_host.write_all(&frame).await?;
        }
        std::io::Result::Ok(())
    };
    let (replies, shared) = (datagrams.clone(), questions.clone());
    let answer = async move {
        loop {
            let mut header = [0; HEADER_LEN];
            from_host.read_exact(&mut header).await?;
            let (id, len) = parse_header(header);
            let mut message = vec![0; len];
            from_host.read_exact(&mut message).await?;
            let asker = shared.borrow_mut().asker(id);
            match asker {
                // A client that does not receive it will retry.
                Some(Asker::Datagram(peer)) => drop(replies.send_to(&message, peer).await),
                Some(Asker::Client(client)) => drop(client.send(message)),
                None => {}
            }
        }
    };
    let take = take_datagrams(datagrams, questions.clone());
    let accept = accept(listener, questions);
    spawn_local(async move {
        let _: std::io::Result<()> = tokio::select! {
            ended = send => ended,
            ended = answer => ended,
            () = take => Ok(()),
            () = accept => Ok(()),
        };
    });
    Ok(())
}

/// Sends a query to another name server over the guest's network; returns the answer.
pub(crate) async fn ask(address: IpAddr, question: &[u8], over_tcp: bool) -> Result<Vec<u8>> {
    let server = SocketAddr::from((address, PORT));
    if over_tcp {
        let answer = timeout(SERVER_LIMIT, ask_over_tcp(server, question)).await;
        return answer.with_context(|| format!("{server} does not answer"))?;
    }
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut answer = vec![0; usize::from(u16::MAX)];
    let received = timeout(SERVER_LIMIT, socket.recv(&mut answer)).await;
    let len = received.with_context(|| format!("{server} does not answer"))??;
    answer.truncate(len);
    Ok(answer)
}

async fn ask_over_tcp(server: SocketAddr, question: &[u8]) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    stream.write_u16(u16::try_from(question.len())?).await?;
    stream.write_all(question).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

async fn take_datagrams(socket: Rc<UdpSocket>, questions: Shared) {
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        // An error refers to an earlier answer, whose client is gone.
        if let Ok((len, peer)) = socket.recv_from(&mut buffer).await {
            let mut questions = questions.borrow_mut();
            questions.ask(&buffer[..len], Asker::Datagram(peer));
        }
    }
}

async fn accept(listener: TcpListener, questions: Shared) {
    let places = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let Ok((client, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let questions = questions.clone();
        spawn_local(async move {
            let _place = place;
            // Errors end only this client.
            serve_client(client, &questions).await.ok();
        });
    }
}

/// Serves a TCP client: messages with a length prefix (RFC 1035, section 4.2.2).
async fn serve_client(mut client: TcpStream, questions: &Shared) -> Result<()> {
    loop {
        let len = timeout(LIMIT, client.read_u16()).await??;
        let mut message = vec![0; usize::from(len)];
        timeout(LIMIT, client.read_exact(&mut message)).await??;
        let (sender, answer) = oneshot::channel();
        questions.borrow_mut().ask(&message, Asker::Client(sender));
        let answer = timeout(LIMIT, answer).await??;
        client.write_u16(u16::try_from(answer.len())?).await?;
        client.write_all(&answer).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_find_their_askers_and_the_oldest_are_given_up() {
        let (to_host, mut frames) = mpsc::channel(2 * WAITING);
        let mut questions = Questions {
            next: 0,
            waiting: VecDeque::new(),
            to_host,
        };
        let peer = SocketAddr::from(([127, 0, 0, 1], 1000));
        for _ in 0..=WAITING {
            questions.ask(b"who", Asker::Datagram(peer));
        }
        assert!(questions.asker(1).is_none(), "the oldest");
        assert!(matches!(questions.asker(2), Some(Asker::Datagram(_))));
        assert!(questions.asker(2).is_none(), "once");
        let (sender, mut answer) = oneshot::channel();
        questions.ask(b"whom", Asker::Client(sender));
        let id = questions.waiting.back().unwrap().0;
        assert_eq!(id & OVER_TCP, OVER_TCP);
        let Some(Asker::Client(client)) = questions.asker(id) else {
            panic!("no client");
        };
        client.send(b"me".to_vec()).unwrap();
        assert_eq!(answer.try_recv().unwrap(), b"me");
        let first = frames.try_recv().unwrap();
        assert_eq!(first, frame(1, b"who").unwrap());
    }

    #[test]
    fn what_the_host_has_no_room_for_is_lost() {
        let (to_host, _frames) = mpsc::channel(1);
        let mut questions = Questions {
            next: 0,
            waiting: VecDeque::new(),
            to_host,
        };
        let peer = SocketAddr::from(([127, 0, 0, 1], 1000));
        questions.ask(b"one", Asker::Datagram(peer));
        questions.ask(b"two", Asker::Datagram(peer));
        assert_eq!(questions.waiting.len(), 1);
    }
}
