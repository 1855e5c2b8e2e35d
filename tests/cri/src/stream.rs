//! Kubernetes' streaming protocols over WebSocket: each message begins with the number of its channel.
//!
//! Remote commands: `v4.channel.k8s.io` (the kubelet's `remotecommand`). Port forward: `v4.channel.k8s.io` too, with a data
//! channel and an error channel for each port, both of which begin with the port number.

use anyhow::{Context, Result, bail};
use futures::SinkExt as _;
use futures::StreamExt as _;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

const PROTOCOL: &str = "v4.channel.k8s.io";
/// Time limit for a stream.
const LIMIT: Duration = Duration::from_secs(120);

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;

/// Output and status of a command.
#[derive(Debug, Default)]
pub struct Streamed {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Exit status in Kubernetes' JSON format; `None` if the command did not end.
    pub status: Option<String>,
}

/// Data from a forwarded port.
#[derive(Debug, Default)]
pub struct Forward {
    /// From the port.
    pub data: String,
    /// From the server, if it could not reach the port.
    pub error: String,
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

async fn open(url: &str) -> Result<Socket> {
    let url = url.replacen("http://", "ws://", 1);
    let mut request = url.as_str().into_client_request()?;
    let protocol = PROTOCOL.parse().context("a protocol's name")?;
    request
        .headers_mut()
        .insert("Sec-WebSocket-Protocol", protocol);
    let connected = tokio_tungstenite::connect_async(request).await;
    Ok(connected.with_context(|| format!("no stream at {url}"))?.0)
}

/// The next message: channel and payload. `None` at the end.
async fn next(socket: &mut Socket) -> Result<Option<(u8, Vec<u8>)>> {
    loop {
        let message = tokio::time::timeout(LIMIT, socket.next()).await;
        match message.context("a stream that says nothing")? {
            None | Some(Ok(Message::Close(_))) => return Ok(None),
            Some(Ok(Message::Binary(bytes))) => {
                if let Some((channel, bytes)) = bytes.split_first() {
                    return Ok(Some((*channel, bytes.to_vec())));
                }
            }
            Some(Ok(_)) => {}
            // Servers close the connection without a closing handshake.
            Some(Err(_)) => return Ok(None),
        }
    }
}

pub(crate) async fn exchange(
    url: &str,
    input: &str,
    done: impl Fn(&Streamed) -> bool,
) -> Result<Streamed> {
    let mut socket = open(url).await?;
    if !input.is_empty() {
        let message = [&[STDIN], input.as_bytes()].concat();
        socket.send(Message::Binary(message.into())).await?;
    }
    let mut streamed = Streamed::default();
    while !done(&streamed) {
        let Some((channel, bytes)) = next(&mut socket).await? else {
            break;
        };
        let text = String::from_utf8_lossy(&bytes);
        match channel {
            STDOUT => streamed.stdout += &text,
            STDERR => streamed.stderr += &text,
            STATUS => streamed.status = Some(text.into_owned()),
            other => bail!("a message on channel {other}"),
        }
    }
    socket.close(None).await.ok();
    Ok(streamed)
}

pub(crate) async fn forward(url: &str, port: u16, request: &[u8]) -> Result<Forward> {
    // With WebSocket, the client names the ports in the URL.
    let mark = if url.contains('?') { '&' } else { '?' };
    let mut socket = open(&format!("{url}{mark}port={port}")).await?;
    let message = [&[0][..], request].concat();
    socket.send(Message::Binary(message.into())).await?;
    let mut all = [Vec::new(), Vec::new()];
    while let Some((channel, bytes)) = next(&mut socket).await? {
        let stream = all.get_mut(usize::from(channel));
        let stream = stream.with_context(|| format!("a message on channel {channel}"))?;
        stream.extend(bytes);
    }
    let texts = all.map(|bytes| {
        // The first two bytes are the port number.
        let text = bytes.get(2..).unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    });
    let [data, error] = texts;
    Ok(Forward { data, error })
}
