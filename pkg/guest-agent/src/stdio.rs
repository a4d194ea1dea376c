// SPDX-License-Identifier: Apache-2.0
//! The agent's ends of a process's standard streams, and their session.

pub(crate) mod console;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use podhull_api::agent;
use podhull_transport::{GuestSession, StreamReader, StreamWriter};
use podhull_types::Deadline;
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::{AsyncRead, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::error::GuestError;
use crate::helper::Streams;

/// Time for a session's last frames.
const CLOSE: Duration = Duration::from_secs(5);

/// The agent's ends, until a session takes them.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    stdin: Option<pipe::Sender>,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
    terminal: bool,
}

/// Keeps a terminal's size settable after a session has taken its streams.
#[derive(Debug)]
pub(crate) struct Terminal(OwnedFd);

impl Terminal {
    pub(crate) fn resize(&self, columns: u64, rows: u64) -> Result<(), GuestError> {
        resize(&self.0, columns, rows)
    }
}

/// Gives a terminal its size in characters.
pub(crate) fn resize(terminal: impl AsFd, columns: u64, rows: u64) -> Result<(), GuestError> {
    let clamp = |value| u16::try_from(value).unwrap_or(u16::MAX);
    let size = Winsize {
        ws_row: clamp(rows),
        ws_col: clamp(columns),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).map_err(GuestError::system("resize the terminal"))
}

impl Ends {
    /// Pipes for the streams that `wanted` names: the agent's ends, and those
    /// of the process.
    pub(crate) fn pipes(wanted: &agent::Stdio) -> Result<(Self, Streams), GuestError> {
        let failed = |error: io::Error| GuestError::system("make a pipe")(error);
        let make = || pipe2(OFlag::O_CLOEXEC).map_err(GuestError::system("make a pipe"));
        let mut ends = Self::default();
        let mut streams = Streams::default();
        if wanted.stdin {
            let (read, write) = make()?;
            ends.stdin = Some(pipe::Sender::from_owned_fd(write).map_err(failed)?);
            streams.stdin = Some(read);
        }
        if wanted.stdout {
            let (read, write) = make()?;
            ends.stdout = Some(pipe::Receiver::from_owned_fd(read).map_err(failed)?);
            streams.stdout = Some(write);
        }
        if wanted.stderr {
            let (read, write) = make()?;
            ends.stderr = Some(pipe::Receiver::from_owned_fd(read).map_err(failed)?);
            streams.stderr = Some(write);
        }
        Ok((ends, streams))
    }

    /// The two directions of a terminal whose other end is `master`.
    pub(crate) fn terminal(master: OwnedFd) -> Result<(Self, Terminal), GuestError> {
        let failed = |error: io::Error| GuestError::system("watch the terminal")(error);
        let copy = || {
            master
                .try_clone()
                .map_err(GuestError::system("duplicate the terminal"))
        };
        let ends = Self {
            stdin: Some(pipe::Sender::from_owned_fd_unchecked(copy()?).map_err(failed)?),
            stdout: Some(pipe::Receiver::from_owned_fd_unchecked(copy()?).map_err(failed)?),
            stderr: None,
            terminal: true,
        };
        Ok((ends, Terminal(master)))
    }
}

/// Carries a process's streams over its session until its output has ended and
/// its exit is told, the host closes, or `give_up`.
pub(crate) async fn relay(
    ends: Ends,
    session: GuestSession,
    mut exit: watch::Receiver<Option<u8>>,
    give_up: CancellationToken,
) {
    let GuestSession {
        input,
        output,
        error,
        handle,
    } = session;
    // Ends with this relay, whatever ends that.
    let stdin = AbortOnDropHandle::new(tokio::spawn(copy_input(input, ends.stdin, ends.terminal)));
    let outputs = async {
        tokio::join!(
            copy_output(ends.stdout, output),
            copy_output(ends.stderr, error)
        );
        if let Ok(code) = exit.wait_for(Option::is_some).await {
            handle.send_exit(code.unwrap_or_default());
        }
        handle.closed().await;
    };
    tokio::select! {
        () = outputs => {}
        () = handle.closed() => {}
        () = give_up.cancelled() => {}
    }
    stdin.abort();
    if let Err(error) = stdin.await
        && !error.is_cancelled()
    {
        tracing::error!(%error, "stdin's relay died");
    }
    let report = handle.close(Deadline::after(CLOSE)).await;
    if !report.is_clean() {
        tracing::debug!(%report, "session closed");
    }
}

/// Copies what the host sends into the process's stdin, then closes that. A
/// terminal has no such end: only the process can close its side.
async fn copy_input(mut input: StreamReader, stdin: Option<pipe::Sender>, terminal: bool) {
    let Some(mut stdin) = stdin else { return };
    loop {
        match input.chunk().await {
            Ok(Some(chunk)) => {
                if let Err(error) = stdin.write_all(&chunk).await {
                    tracing::debug!(%error, "the process reads no more");
                    return;
                }
            }
            Ok(None) => break,
            Err(error) => {
                tracing::debug!(%error, "stdin cut");
                return;
            }
        }
    }
    if terminal {
        // Keep the descriptor: its last close would hang the terminal up.
        std::future::pending::<()>().await;
    }
}

/// Copies one of the process's outputs to the host, then says its end.
async fn copy_output(from: Option<impl AsyncRead + Unpin>, mut to: StreamWriter) {
    if let Some(mut from) = from {
        loop {
            match to.send_from(&mut from).await {
                Ok(0) => break,
                Ok(_) => {}
                // How a terminal says that its last user is gone.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => break,
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    tracing::debug!(%error, "the host reads no more");
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "output cut");
                    return;
                }
            }
        }
    }
    to.finish();
}
