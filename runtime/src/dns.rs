//! A name server that listens on the loopback of a network namespace of the host, made available to a guest: Docker's for
//! user-defined networks, which a container expects at 127.0.0.11 on its own loopback.
//!
//! The name server forwards queries that it cannot answer to others, from the same namespace, whose addresses belong to the
//! guest: replies would go to the guest. So all IPv4 addresses are made local to the namespace, and queries to port 53 of
//! any address, by datagram or connection, are sent by the guest, over the container's network.

use crate::agent::{Agent, FORWARD_DNS};
use crate::network::own_all_addresses;
use crate::sync::lock;
use crate::{Error, Sandbox};
use koya_protocol::names::{HEADER_LEN, OVER_TCP, frame, parse_header};
use koya_vmm::guest_text::Warnings;
use koya_vmm::host::sync::Counter;
use koya_vmm::host::threads;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg, setsockopt,
    sockopt,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket,
};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const PORT: u16 = 53;
/// Time limit for the name server, and for a guest to take its replies.
const LIMIT: Duration = Duration::from_secs(10);
/// Maximum number of pending queries. Further ones are dropped, and retried by the resolver.
const QUESTIONS: usize = 64;
/// Maximum number of connections for queries to other name servers. Further ones are closed.
const CLIENTS: usize = 32;
/// Pause after a failure of accept(2), whose cause may persist: no descriptor is left.
const PAUSE: Duration = Duration::from_millis(20);

/// A guest may ask what has no answer, and answer wrongly, all the time.
static UNANSWERED: Warnings = Warnings::new();

/// While this lives, a guest's queries to an address of its loopback are answered by the name server at the same address of
/// the host namespace.
pub struct DnsForwarder {
    stream: UnixStream,
}

impl DnsForwarder {
    /// Makes the name server at port 53 of `address`, in the calling thread's network namespace, available to a guest.
    ///
    /// # Errors
    /// If the guest can't listen there.
    pub fn start(sandbox: &Sandbox, address: IpAddr) -> Result<Self, Error> {
        let (stream, agent) = sandbox.name_server(address)?;
        let started = || -> io::Result<Self> {
            let others = OtherServers::listen()?;
            let until = stream.try_clone()?;
            threads::spawn("koya-names", move || {
                if let Err(error) = serve_others(&others, &until, &agent) {
                    log::debug!("other name servers: {error}");
                }
            })?;
            stream.set_write_timeout(Some(LIMIT))?;
            let from = stream.try_clone()?;
            let to = Arc::new(Mutex::new(stream.try_clone()?));
            let server = SocketAddr::new(address, PORT);
            threads::spawn("koya-names", move || {
                if let Err(error) = serve(from, &to, server) {
                    log::debug!("the guest's name server: {error}");
                }
            })?;
            Ok(Self { stream })
        };
        started().map_err(Error::host(FORWARD_DNS))
    }
}

impl Drop for DnsForwarder {
    fn drop(&mut self) {
        self.stream.shutdown(Shutdown::Both).ok();
    }
}

/// Forwards queries until the stream ends. Each query has a thread, so that a slow reply delays no other.
fn serve(mut from: UnixStream, to: &Arc<Mutex<UnixStream>>, server: SocketAddr) -> io::Result<()> {
    let asked = Counter::default();
    loop {
        let mut header = [0; HEADER_LEN];
        from.read_exact(&mut header)?;
        let (id, len) = parse_header(header);
        let mut question = vec![0; len];
        from.read_exact(&mut question)?;
        let Some(counted) = asked.add_below(QUESTIONS) else {
            continue;
        };
        let to = to.clone();
        let spawned = threads::spawn("koya-name", move || {
            let _counted = counted;
            let answered = ask(server, &question, id & OVER_TCP != 0).and_then(|answer| {
                let framed = frame(id, &answer).ok_or(io::ErrorKind::InvalidData)?;
                let mut to = lock(&to);
                // A partial frame would corrupt the next one.
                let written = to.write_all(&framed);
                written.inspect_err(|_| drop(to.shutdown(Shutdown::Both)))
            });
            if let Err(error) = answered {
                UNANSWERED.debug(format_args!("the guest's name server: {error}"));
            }
        });
        if let Err(error) = spawned {
            UNANSWERED.debug(format_args!("the guest's name server: {error}"));
        }
    }
}

/// Sockets for queries to other name servers.
struct OtherServers {
    datagrams: Arc<UdpSocket>,
    connections: TcpListener,
}

impl OtherServers {
    /// Listens at all addresses, which become the namespace's own.
    fn listen() -> io::Result<Self> {
        own_all_addresses()?;
        let datagrams = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
        setsockopt(&datagrams, sockopt::Ipv4PacketInfo, &true)?;
        datagrams.set_nonblocking(true)?;
        let connections = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
        connections.set_nonblocking(true)?;
        Ok(Self {
            datagrams: Arc::new(datagrams),
            connections,
        })
    }
}

/// Forwards queries to other name servers until the stream ends.
fn serve_others(others: &OtherServers, until: &UnixStream, agent: &Agent) -> io::Result<()> {
    let (asked, clients) = (Counter::default(), Counter::default());
    loop {
        let mut polled = [
            PollFd::new(&*others.datagrams, PollFlags::IN),
            PollFd::new(&others.connections, PollFlags::IN),
            PollFd::new(until, PollFlags::empty()),
        ];
        match poll(&mut polled, None) {
            Err(Errno::INTR) => continue,
            ready => ready?,
        };
        let [has_datagram, has_client, has_ended] = polled.map(|one| !one.revents().is_empty());
        if has_ended {
            return Ok(());
        }
        if has_datagram && let Some(question) = receive(&others.datagrams) {
            forward(question, &others.datagrams, agent, &asked);
        }
        if has_client {
            match others.connections.accept() {
                Ok((client, _)) => accept(client, agent, &clients),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    UNANSWERED.debug(format_args!("other name servers: {error}"));
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }
}

/// Asks another name server for a client that sent a datagram.
fn forward(question: Question, to: &Arc<UdpSocket>, agent: &Agent, asked: &Counter) {
    let Some(counted) = asked.add_below(QUESTIONS) else {
        return;
    };
    let (to, agent) = (to.clone(), agent.clone());
    let spawned = threads::spawn("koya-name", move || {
        let _counted = counted;
        let message = question.message.clone();
        let answer = ask_by_guest(&agent, question.server.into(), message, false);
        question.answer(&to, &answer);
    });
    if let Err(error) = spawned {
        UNANSWERED.debug(format_args!("other name servers: {error}"));
    }
}

/// Serves a client that has connected to another name server.
fn accept(client: TcpStream, agent: &Agent, clients: &Counter) {
    let Some(counted) = clients.add_below(CLIENTS) else {
        return;
    };
    let agent = agent.clone();
    let spawned = threads::spawn("koya-name", move || {
        let _counted = counted;
        let ask = |server, question| ask_by_guest(&agent, server, question, true);
        // It ends when the client hangs up; an error ends only this client.
        serve_client(client, ask).ok();
    });
    if let Err(error) = spawned {
        UNANSWERED.debug(format_args!("other name servers: {error}"));
    }
}

fn ask_by_guest(agent: &Agent, server: IpAddr, question: Vec<u8>, over_tcp: bool) -> Vec<u8> {
    let answer = agent.ask_name_server(server, question.clone(), over_tcp);
    answer.unwrap_or_else(|error| {
        UNANSWERED.debug(format_args!("{server}: {error}"));
        failure(&question)
    })
}

/// Replies to the queries of a client, one after the other, as the server that it has connected to.
fn serve_client(mut client: TcpStream, ask: impl Fn(IpAddr, Vec<u8>) -> Vec<u8>) -> io::Result<()> {
    client.set_read_timeout(Some(LIMIT))?;
    client.set_write_timeout(Some(LIMIT))?;
    let server = client.local_addr()?.ip();
    loop {
        let question = read_message(&mut client)?;
        write_message(&mut client, &ask(server, question))?;
    }
}

/// Reads a message with its length (RFC 1035, section 4.2.2).
fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut len = [0; 2];
    stream.read_exact(&mut len)?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(len))];
    stream.read_exact(&mut message)?;
    Ok(message)
}

fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let len = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    stream.write_all(&[&len.to_be_bytes(), message].concat())
}

/// A query to another name server.
struct Question {
    message: Vec<u8>,
    from: SockaddrIn,
    server: Ipv4Addr,
}

fn receive(socket: &UdpSocket) -> Option<Question> {
    let mut message = vec![0; usize::from(u16::MAX)];
    let mut control = nix::cmsg_space!(libc::in_pktinfo);
    let mut parts = [IoSliceMut::new(&mut message)];
    let fd = socket.as_raw_fd();
    let flags = MsgFlags::empty();
    let received = recvmsg::<SockaddrIn>(fd, &mut parts, Some(&mut control), flags).ok()?;
    let (len, from) = (received.bytes, received.address?);
    let server = received.cmsgs().ok()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => {
            Some(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr)))
        }
        _ => None,
    })?;
    message.truncate(len);
    Some(Question {
        message,
        from,
        server,
    })
}

impl Question {
    /// Sends a reply as if it came from the server.
    fn answer(&self, socket: &UdpSocket, answer: &[u8]) {
        let info = libc::in_pktinfo {
            ipi_ifindex: 0,
            ipi_spec_dst: libc::in_addr {
                s_addr: u32::from(self.server).to_be(),
            },
            ipi_addr: libc::in_addr { s_addr: 0 },
        };
        let sent = sendmsg(
            socket.as_raw_fd(),
            &[IoSlice::new(answer)],
            &[ControlMessage::Ipv4PacketInfo(&info)],
            MsgFlags::empty(),
            Some(&self.from),
        );
        if let Err(error) = sent {
            UNANSWERED.debug(format_args!("an answer of {}: {error}", self.server));
        }
    }
}

/// The reply for a failure (SERVFAIL): the question, with the bits of a response (RFC 1035, section 4.1.1).
fn failure(question: &[u8]) -> Vec<u8> {
    let mut answer = question.to_vec();
    if let [_, _, flags, code, ..] = answer.as_mut_slice() {
        *flags |= 0x80;
        *code = 0x82;
    }
    answer
}

/// Sends a query to the name server and returns its reply.
fn ask(server: SocketAddr, question: &[u8], over_tcp: bool) -> io::Result<Vec<u8>> {
    if over_tcp {
        let mut stream = TcpStream::connect_timeout(&server, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        write_message(&mut stream, question)?;
        return read_message(&mut stream);
    }
    let own: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    let socket = UdpSocket::bind((own, 0))?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(LIMIT))?;
    socket.send(question)?;
    let mut answer = vec![0; usize::from(u16::MAX)];
    let len = socket.recv(&mut answer)?;
    answer.truncate(len);
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that replies with the query in capitals, by datagram or connection.
    fn server() -> SocketAddr {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let at = socket.local_addr().unwrap();
        let listener = TcpListener::bind(at).unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((len, peer)) = socket.recv_from(&mut buffer) {
                // Some datagrams are lost.
                if &buffer[..len] != b"lost" {
                    let answer = buffer[..len].to_ascii_uppercase();
                    socket.send_to(&answer, peer).unwrap();
                }
            }
        });
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let mut client = client.unwrap();
                let mut buffer = [0; 512];
                let len = client.read(&mut buffer).unwrap();
                let answer = [b"\x9c\x40", &buffer[2..len].repeat(10000)[..40000]].concat();
                client.write_all(&answer).unwrap();
            }
        });
        at
    }

    fn answer(stream: &mut UnixStream) -> (u32, Vec<u8>) {
        let mut header = [0; HEADER_LEN];
        stream.read_exact(&mut header).unwrap();
        let (id, len) = parse_header(header);
        let mut message = vec![0; len];
        stream.read_exact(&mut message).unwrap();
        (id, message)
    }

    #[test]
    fn an_answer_comes_from_whom_was_asked() {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        setsockopt(&socket, sockopt::Ipv4PacketInfo, &true).unwrap();
        let port = socket.local_addr().unwrap().port();
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        // Not the loopback address that the kernel would choose as source of the reply.
        let server = Ipv4Addr::new(127, 9, 9, 9);
        client.connect((server, port)).unwrap();
        client.send(&[7, 7, 1, 0, 0, 1, 9]).unwrap();
        let question = receive(&socket).unwrap();
        assert_eq!(question.server, server);
        question.answer(&socket, &failure(&question.message));
        let mut answer = [0; 64];
        let len = client.recv(&mut answer).unwrap();
        assert_eq!(&answer[..len], [7, 7, 0x81, 0x82, 0, 1, 9]);
    }

    #[test]
    fn a_guests_questions_are_answered_in_any_order() {
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let to = Arc::new(Mutex::new(ours.try_clone().unwrap()));
        let at = server();
        let served = std::thread::spawn(move || serve(ours, &to, at));
        for (id, question) in [(1, "lost"), (2, "who"), (OVER_TCP | 3, "long")] {
            guest
                .write_all(&frame(id, question.as_bytes()).unwrap())
                .unwrap();
        }
        let mut answers = [answer(&mut guest), answer(&mut guest)];
        answers.sort();
        assert_eq!(answers[0], (2, b"WHO".to_vec()));
        assert_eq!(answers[1].0, OVER_TCP | 3);
        assert_eq!(answers[1].1.len(), 40000);
        drop(guest);
        assert!(served.join().unwrap().is_err(), "it ends with its stream");
    }

    /// Sends two queries over a connection, whose server is the address that was connected to.
    fn answer_one(mut client: TcpStream, connections: &TcpListener) {
        let mut polled = [PollFd::new(connections, PollFlags::IN)];
        poll(&mut polled, Some(&LIMIT.try_into().unwrap())).unwrap();
        let (accepted, _) = connections.accept().unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        let server = client.peer_addr().unwrap().ip();
        std::thread::scope(|scope| {
            let served = scope.spawn(move || {
                serve_client(accepted, |asked, question| {
                    assert_eq!(asked, server);
                    question.repeat(10_000)
                })
            });
            for _ in 0..2 {
                write_message(&mut client, b"long").unwrap();
                assert_eq!(read_message(&mut client).unwrap().len(), 40_000);
            }
            drop(client);
            assert!(served.join().unwrap().is_err(), "it ends with its client");
        });
    }

    #[test]
    fn a_client_is_answered_over_its_connection() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap());
        answer_one(client.unwrap(), &listener);
    }

    #[test]
    fn a_namespace_receives_queries_to_other_name_servers() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        // A thread, for a network namespace that ends with it.
        let answers = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            crate::network::test_namespace::set_up(Ipv4Addr::new(192, 0, 2, 3), 24).unwrap();
            let OtherServers {
                datagrams: others,
                connections,
            } = OtherServers::listen().unwrap();
            let client = TcpStream::connect(("198.51.100.2", PORT));
            answer_one(client.unwrap(), &connections);
            // On the network of the interface, and elsewhere.
            ["192.0.2.1", "198.51.100.1"].map(|server| {
                let client = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
                client.set_read_timeout(Some(LIMIT)).unwrap();
                client.connect((server, PORT)).unwrap();
                client.send(b"question").unwrap();
                let mut polled = [PollFd::new(&others, PollFlags::IN)];
                poll(&mut polled, Some(&LIMIT.try_into().unwrap())).unwrap();
                let question = receive(&others).expect("a query");
                assert_eq!(question.server.to_string(), server);
                question.answer(&others, b"answer");
                let mut answer = [0; 16];
                let len = client.recv(&mut answer).unwrap();
                answer[..len].to_vec()
            })
        });
        assert_eq!(answers.join().unwrap(), [b"answer", b"answer"]);
    }
}
