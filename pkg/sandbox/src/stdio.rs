// SPDX-License-Identifier: Apache-2.0
//! Between containerd's FIFOs and a process's session.

use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use podhull_telemetry::Metrics;
use podhull_transport::{CloseReport, HostSession, StreamReader, StreamWriter};
use podhull_types::Deadline;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::error::SandboxError;
use crate::spec::Stdio;

const BUFFER: usize = 64 * 1024;
/// Time for the last frame of a session whose streams have ended.
const CLOSE: Duration = Duration::from_secs(2);

/// The host's ends of a process's FIFOs.
#[derive(Debug)]
pub(crate) struct Fifos {
    stdin: Option<pipe::Receiver>,
    stdin_keeper: Option<pipe::Sender>,
    stdout: Option<pipe::Sender>,
    stderr: Option<pipe::Sender>,
}

impl Fifos {
    /// Opens the FIFOs as runc's shim does, so that neither an absent nor a
    /// restarted containerd is seen as an end: the output's with a reading end
    /// of our own, stdin's with a writing end that CloseIO gives up.
    pub(crate) fn open(stdio: &Stdio) -> Result<Self, SandboxError> {
        let output = |path: &Path, stream| {
            pipe::OpenOptions::new()
                .read_write(true)
                .open_sender(path)
                .map_err(|source| SandboxError::Fifo {
                    stream,
                    path: path.into(),
                    source,
                })
        };
        let stdin = stdio.stdin.as_deref().map(|path| {
            let open = || {
                let receiver = pipe::OpenOptions::new().open_receiver(path)?;
                Ok((receiver, pipe::OpenOptions::new().open_sender(path)?))
            };
            let failed = |source| SandboxError::Fifo {
                stream: "stdin",
                path: path.into(),
                source,
            };
            open().map_err(failed)
        });
        let (stdin, stdin_keeper) = stdin.transpose()?.unzip();
        Ok(Self {
            stdin,
            stdin_keeper,
            stdout: stdio
                .stdout
                .as_deref()
                .map(|path| output(path, "stdout"))
                .transpose()?,
            stderr: stdio
                .stderr
                .as_deref()
                .map(|path| output(path, "stderr"))
                .transpose()?,
        })
    }
}

/// What became of a process's output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IoReport {
    /// All of it reached the FIFOs.
    pub(crate) complete: bool,
    pub(crate) closed: CloseReport,
}

/// The running relays of one process. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct ProcessIo {
    stdin_keeper: Mutex<Option<pipe::Sender>>,
    give_up: CancellationToken,
    relays: JoinHandle<IoReport>,
}

impl ProcessIo {
    /// Starts relaying between `fifos` and `session`.
    pub(crate) fn start(mut fifos: Fifos, session: HostSession, metrics: &Metrics) -> Self {
        let give_up = CancellationToken::new();
        let stdin_keeper = Mutex::new(fifos.stdin_keeper.take());
        let relays = tokio::spawn(relay(fifos, session, give_up.clone(), metrics.clone()));
        Self {
            stdin_keeper,
            give_up,
            relays,
        }
    }

    /// Lets stdin end once containerd's side has ended too.
    pub(crate) fn close_stdin(&self) {
        self.stdin_keeper
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    /// Waits until all output is delivered, however slow its reader is; at the
    /// deadline the rest is dropped, and the report says so.
    pub(crate) async fn finish(mut self, by: Deadline) -> IoReport {
        let done = match by.run(&mut self.relays).await {
            Ok(done) => done,
            Err(_) => {
                self.give_up.cancel();
                (&mut self.relays).await
            }
        };
        done.unwrap_or_else(|error| {
            tracing::error!(%error, "stdio relay died");
            IoReport {
                complete: false,
                closed: CloseReport::default(),
            }
        })
    }
}

impl Drop for ProcessIo {
    fn drop(&mut self) {
        self.give_up.cancel();
    }
}

async fn relay(
    fifos: Fifos,
    session: HostSession,
    give_up: CancellationToken,
    metrics: Metrics,
) -> IoReport {
    let HostSession {
        input,
        output,
        error,
        handle,
    } = session;
    let open = metrics.sessions.with_label_values(&["stdio"]);
    open.inc();
    let stdin = tokio::spawn(copy_input(fifos.stdin, input));
    let outputs = async {
        tokio::join!(
            copy_output(output, fifos.stdout, "stdout", &metrics, &give_up),
            copy_output(error, fifos.stderr, "stderr", &metrics, &give_up)
        )
    };
    let (stdout, stderr) = outputs.await;
    let complete = stdout.is_ok() && stderr.is_ok();
    for (stream, result) in [("stdout", stdout), ("stderr", stderr)] {
        if let Err(error) = result {
            tracing::warn!(stream, %error, "output cut");
        }
    }
    stdin.abort();
    open.dec();
    let closed = handle.close(Deadline::after(CLOSE)).await;
    IoReport { complete, closed }
}

/// Copies stdin until its FIFO ends or the process reads no more.
async fn copy_input(fifo: Option<pipe::Receiver>, mut input: StreamWriter) {
    if let Some(mut fifo) = fifo {
        let mut buffer = vec![0; BUFFER];
        loop {
            match fifo.read(&mut buffer).await {
                Ok(0) => break,
                Ok(count) => {
                    if let Err(error) = input.write_all(&buffer[..count]).await {
                        tracing::debug!(%error, "the process reads no more stdin");
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "stdin lost");
                    return;
                }
            }
        }
    }
    if let Err(error) = input.shutdown().await {
        tracing::debug!(%error, "stdin's end not sent");
    }
}

/// Copies one output stream; without a FIFO its bytes are read and forgotten.
/// What a FIFO does not take before `give_up` is dropped and counted.
async fn copy_output(
    mut from: StreamReader,
    mut fifo: Option<pipe::Sender>,
    stream: &'static str,
    metrics: &Metrics,
    give_up: &CancellationToken,
) -> io::Result<()> {
    let bytes = metrics.session_bytes.with_label_values(&["stdio", stream]);
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = give_up.run_until_cancelled(from.read(&mut buffer)).await;
        let count = read.unwrap_or_else(|| Err(given_up()))?;
        if count == 0 {
            return Ok(());
        }
        if let Some(fifo) = fifo.as_mut() {
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                let written = give_up.run_until_cancelled(fifo.write(rest)).await;
                match written.unwrap_or_else(|| Err(given_up())) {
                    Ok(written) => rest = &rest[written..],
                    Err(error) => {
                        let dropped = metrics.dropped_bytes.with_label_values(&[stream]);
                        dropped.inc_by(rest.len() as u64);
                        return Err(error);
                    }
                }
            }
        }
        bytes.inc_by(count as u64);
    }
}

fn given_up() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "its reader was given up")
}
