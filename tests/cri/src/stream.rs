// SPDX-License-Identifier: Apache-2.0
//! The client's side of CRI's streaming server: the WebSocket protocol
//! `v4.channel.k8s.io` (k8s.io/kubelet `pkg/cri/streaming/remotecommand`). Each
//! message begins with the number of its channel.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use futures::{SinkExt as _, StreamExt as _};
use podhull_testkit::cri::Container;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::error::Elapsed;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

const PROTOCOL: &str = "v4.channel.k8s.io";
/// Nothing that is waited for takes longer.
const WITHIN: Duration = Duration::from_secs(60);

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// Opens a stream whose address containerd gave.
pub(crate) async fn connect(url: &str) -> Result<WebSocketStream<TcpStream>> {
    let authority = url
        .strip_prefix("http://")
        .and_then(|rest| rest.split('/').next());
    let authority = authority.with_context(|| format!("no host in {url}"))?;
    let stream = TcpStream::connect(authority)
        .await
        .with_context(|| format!("connect to {url}"))?;
    let mut request = url.replacen("http", "ws", 1).into_client_request()?;
    let headers = request.headers_mut();
    headers.insert("Sec-WebSocket-Protocol", PROTOCOL.parse()?);
    let handshake = tokio_tungstenite::client_async(request, stream);
    let (socket, _) = tokio::time::timeout(WITHIN, handshake)
        .await
        .context("handshake")??;
    Ok(socket)
}

/// Sends `bytes` on a channel.
pub(crate) async fn message(
    socket: &mut WebSocketStream<TcpStream>,
    channel: u8,
    bytes: &[u8],
) -> Result<()> {
    let mut message = vec![channel];
    message.extend_from_slice(bytes);
    let sent = socket.send(Message::Binary(message.into()));
    tokio::time::timeout(WITHIN, sent)
        .await
        .context("a send hangs")??;
    Ok(())
}

/// An open exec or attach connection.
#[derive(Debug)]
pub(crate) struct Session {
    socket: WebSocketStream<TcpStream>,
    /// What came so far.
    pub(crate) stdout: Vec<u8>,
    /// What came so far.
    pub(crate) stderr: Vec<u8>,
}

impl Session {
    /// Opens an exec with standard input.
    pub(crate) async fn exec(container: &Container, command: &[&str], tty: bool) -> Result<Self> {
        Self::open(&container.exec_url(command, true, tty).await?).await
    }

    /// Attaches to the init process, with standard input.
    pub(crate) async fn attach(container: &Container, tty: bool) -> Result<Self> {
        Self::open(&container.attach_url(true, tty).await?).await
    }

    /// Opens the stream that containerd gave this address.
    pub(crate) async fn open(url: &str) -> Result<Self> {
        Ok(Self {
            socket: connect(url).await?,
            stdout: Vec::new(),
            stderr: Vec::new(),
        })
    }

    /// Writes to standard input.
    pub(crate) async fn send(&mut self, text: &str) -> Result<()> {
        message(&mut self.socket, STDIN, text.as_bytes()).await
    }

    /// Tells the size of the terminal.
    pub(crate) async fn resize(&mut self, columns: u16, rows: u16) -> Result<()> {
        let size = json!({"Width": columns, "Height": rows});
        message(&mut self.socket, RESIZE, size.to_string().as_bytes()).await
    }

    /// The next message, taken in; `None` at the end. The status comes last.
    async fn next(&mut self) -> Result<Option<Vec<u8>>> {
        let next = tokio::time::timeout(WITHIN, self.socket.next()).await;
        let message = match next.context("nothing came")? {
            None | Some(Ok(Message::Close(_))) => return Ok(None),
            Some(Ok(message)) => message.into_data(),
            Some(Err(error)) => return Err(error).context("read from the stream"),
        };
        match message.split_first() {
            Some((&STDOUT, bytes)) => self.stdout.extend_from_slice(bytes),
            Some((&STDERR, bytes)) => self.stderr.extend_from_slice(bytes),
            Some((&ERROR, status)) if !status.is_empty() => return Ok(Some(status.to_vec())),
            _ => {}
        }
        Ok(Some(Vec::new()))
    }

    /// Leaves, as a client does whose user ends it.
    pub(crate) async fn close(mut self) -> Result<()> {
        tokio::time::timeout(WITHIN, self.socket.close(None))
            .await
            .context("the close hangs")??;
        Ok(())
    }

    /// Reads until standard output has `text`.
    pub(crate) async fn wrote(&mut self, text: &str) -> Result<()> {
        while !String::from_utf8_lossy(&self.stdout).contains(text) {
            let ended = match self.next().await? {
                None => true,
                Some(status) => !status.is_empty(),
            };
            ensure!(
                !ended,
                "ended without {text:?}, with {:?} {:?}",
                String::from_utf8_lossy(&self.stdout),
                String::from_utf8_lossy(&self.stderr)
            );
        }
        Ok(())
    }

    /// Sends a line until its answer is seen. Right after an attach, containerd
    /// may pass input on before it passes output back.
    pub(crate) async fn ask(&mut self, line: &str, answer: &str) -> Result<()> {
        const AGAIN: Duration = Duration::from_secs(2);
        for _ in 0..10 {
            self.send(line).await?;
            if let Ok(seen) = tokio::time::timeout(AGAIN, self.wrote(answer)).await {
                return seen;
            }
        }
        bail!("{line:?} has no answer");
    }

    /// Reads to the end, without a look at what it says.
    pub(crate) async fn drain(&mut self) -> Result<()> {
        while self.next().await?.is_some() {}
        Ok(())
    }

    /// Reads to the end, on whichever word.
    ///
    /// # Errors
    /// If nothing comes any more, not even an end.
    pub(crate) async fn ended(&mut self) -> Result<()> {
        match self.drain().await {
            Err(error) if error.is::<Elapsed>() => Err(error),
            _ => Ok(()),
        }
    }

    /// Reads to the end and gives the exit code.
    pub(crate) async fn exit_code(&mut self) -> Result<i64> {
        let mut last = None;
        while let Some(status) = self.next().await? {
            if !status.is_empty() {
                last = Some(status);
            }
        }
        let status: Value = serde_json::from_slice(&last.context("no status came")?)?;
        if status["status"] == "Success" {
            return Ok(0);
        }
        let causes = status["details"]["causes"].as_array();
        let code =
            causes.and_then(|causes| causes.iter().find(|cause| cause["reason"] == "ExitCode"));
        match code.and_then(|cause| cause["message"].as_str()) {
            Some(code) => Ok(code.parse()?),
            None => bail!("{status}"),
        }
    }
}
