// SPDX-License-Identifier: Apache-2.0
//! Forwarded ports: the server behind them (tests/streams/peer), and the ways
//! to it.

use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use futures::StreamExt as _;
use podhull_testkit::cri::api::PortForwardRequest;
use podhull_testkit::cri::{Container, Pod};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, Command};
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use crate::context::Context;
use crate::stream;

/// How much the server's `source`, `half` and `cut` send.
pub(crate) const SIZE: usize = 1 << 20;
/// How much its `early` sends.
pub(crate) const ANSWER: usize = 1 << 14;
/// Nothing that is waited for takes longer.
const WITHIN: Duration = Duration::from_secs(30);

/// Where containers see the folder of the server's program.
const FOLDER: &str = "/peer";

/// What `source` and `half` send: no two blocks of it are the same.
pub(crate) fn numbers(size: usize) -> Vec<u8> {
    (0_u32..).flat_map(u32::to_be_bytes).take(size).collect()
}

/// Count and SHA-256 as the server tells them.
pub(crate) fn sum(bytes: &[u8]) -> String {
    use sha2::{Digest as _, Sha256};
    let hash = Sha256::digest(bytes);
    let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{} {hash}", bytes.len())
}

/// A container with servers, each `MODE=ADDRESS:PORT`, once all of them listen.
pub(crate) async fn serve(
    t: &Context,
    pod: &Pod,
    name: &str,
    servers: &[&str],
) -> Result<Container> {
    let program = t.node().programs().streams.with_file_name("peer");
    ensure!(
        program.exists(),
        "{} is missing: make streams",
        program.display()
    );
    let folder = program.parent().context("the program's folder")?;
    let command = [&["/peer/peer"][..], servers].concat();
    let container = t
        .container(pod, name)
        .mount(&folder.to_string_lossy(), FOLDER, true)
        .edit(|config| config.command = command.into_iter().map(str::to_owned).collect())
        .start()
        .await?;
    container.wrote("ready", WITHIN).await?;
    Ok(container)
}

async fn url(t: &Context, pod: &Pod, ports: &[u16]) -> Result<String> {
    let request = PortForwardRequest {
        pod_sandbox_id: pod.id().into(),
        port: ports.iter().copied().map(i32::from).collect(),
    };
    let response = t.client().runtime().port_forward(request).await;
    Ok(response.context("PortForward")?.into_inner().url)
}

/// A port that client-go forwards over SPDY.
#[derive(Debug)]
pub(crate) struct Spdy {
    child: Child,
    _stdin: ChildStdin,
    said: JoinHandle<String>,
    port: u16,
}

impl Spdy {
    pub(crate) async fn forward(t: &Context, pod: &Pod, port: u16) -> Result<Self> {
        let url = url(t, pod, &[port]).await?;
        let mut child = Command::new(&t.node().programs().streams)
            .args(["forward", &url, &port.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("run the streaming client: make streams")?;
        let stdin = child.stdin.take().context("stdin")?;
        let mut stderr = child.stderr.take().context("stderr")?;
        let said = tokio::spawn(async move {
            let mut text = String::new();
            // What it says is only quoted.
            let _ = stderr.read_to_string(&mut text).await;
            text
        });
        let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
        let line = tokio::time::timeout(WITHIN, lines.next_line()).await;
        let Some(line) = line.context("the client does not listen")?? else {
            bail!("the client ended: {}", said.await?);
        };
        Ok(Self {
            child,
            _stdin: stdin,
            said,
            port: line.parse().context(line)?,
        })
    }

    /// A connection through it.
    pub(crate) async fn connect(&self) -> Result<TcpStream> {
        let connected = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await;
        connected.context("connect to the forwarding client")
    }

    /// Ends the client, and gives what it said of errors.
    pub(crate) async fn end(self) -> Result<String> {
        let Self {
            child,
            _stdin,
            said,
            ..
        } = self;
        drop(_stdin);
        let output = tokio::time::timeout(WITHIN, child.wait_with_output()).await;
        output.context("the client does not end")??;
        Ok(said.await?)
    }
}

/// Ports that are forwarded over one WebSocket, a connection each. Channel 2n
/// carries the data of port n, 2n+1 its error; each begins with the port.
#[derive(Debug)]
pub(crate) struct WebSocket {
    socket: WebSocketStream<TcpStream>,
    ports: Vec<Port>,
}

/// What came of one port.
#[derive(Debug, Default, Clone)]
pub(crate) struct Port {
    pub(crate) data: Vec<u8>,
    pub(crate) error: Vec<u8>,
}

impl WebSocket {
    pub(crate) async fn forward(t: &Context, pod: &Pod, ports: &[u16]) -> Result<Self> {
        let url = url(t, pod, ports).await?;
        let mut opened = Self {
            socket: stream::connect(&url).await?,
            ports: vec![Port::default(); ports.len()],
        };
        opened
            .until(|ports| {
                let whole = |port: &Port| port.data.len() >= 2 && port.error.len() >= 2;
                ports.iter().all(whole)
            })
            .await?;
        for (port, number) in opened.ports.iter_mut().zip(ports) {
            for channel in [&mut port.data, &mut port.error] {
                let said: Vec<_> = channel.drain(..2).collect();
                ensure!(
                    said == number.to_le_bytes(),
                    "port {number} is said to be {said:?}"
                );
            }
        }
        Ok(opened)
    }

    /// Writes to the `index`th port.
    pub(crate) async fn send(&mut self, index: u8, bytes: &[u8]) -> Result<()> {
        stream::message(&mut self.socket, 2 * index, bytes).await
    }

    /// Reads until `enough`, or the end: false.
    pub(crate) async fn until(&mut self, enough: impl Fn(&[Port]) -> bool) -> Result<bool> {
        while !enough(&self.ports) {
            let next = tokio::time::timeout(WITHIN, self.socket.next()).await;
            let message = match next.context("nothing came")? {
                None | Some(Ok(Message::Close(_))) => return Ok(false),
                Some(message) => message?.into_data(),
            };
            let Some((&channel, bytes)) = message.split_first() else {
                continue;
            };
            let port = self.ports.get_mut(usize::from(channel / 2));
            let port = port.with_context(|| format!("no channel {channel}"))?;
            let stream = if channel % 2 == 0 {
                &mut port.data
            } else {
                &mut port.error
            };
            stream.extend_from_slice(bytes);
        }
        Ok(true)
    }

    /// Leaves, as a client does whose user ends it.
    pub(crate) async fn close(mut self) -> Result<()> {
        let closed = tokio::time::timeout(WITHIN, self.socket.close(None)).await;
        Ok(closed.context("the close hangs")??)
    }

    /// What came so far.
    pub(crate) fn port(&self, index: usize) -> Result<&Port> {
        self.ports.get(index).context("no such port")
    }
}

/// Sends `bytes` to a server that echoes, and reads as many back.
pub(crate) async fn echoes(stream: &mut TcpStream, bytes: &[u8]) -> Result<()> {
    let (mut from, mut to) = stream.split();
    let mut back = vec![0; bytes.len()];
    let both = async { tokio::try_join!(to.write_all(bytes), from.read_exact(&mut back)) };
    let both = tokio::time::timeout(WITHIN, both).await;
    both.context("the echo hangs")?.context("echo")?;
    ensure!(back == bytes, "the echo differs");
    Ok(())
}

/// Everything up to the end.
pub(crate) async fn rest(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(WITHIN, stream.read_to_end(&mut bytes)).await;
    read.context("the end does not come")?
        .with_context(|| format!("after {} bytes", bytes.len()))?;
    Ok(bytes)
}

/// Waits for a reset; what came before is left aside.
pub(crate) async fn is_reset(stream: &mut TcpStream) -> Result<()> {
    rest_to_reset(stream).await.map(drop)
}

/// Everything up to a reset.
pub(crate) async fn rest_to_reset(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(WITHIN, stream.read_to_end(&mut bytes)).await;
    match read.context("neither end nor reset")? {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(bytes),
        other => bail!("no reset but {other:?}, after {} bytes", bytes.len()),
    }
}
