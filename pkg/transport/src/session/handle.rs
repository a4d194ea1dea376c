// SPDX-License-Identifier: Apache-2.0
//! The owner of a session.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use podhull_types::Deadline;
use tokio::task::JoinHandle;

use super::engine::{read_frames, write_frames};
use super::state::{End, Shared};
use crate::error::SessionError;
use crate::report::{CloseReport, Outcome};
use crate::transport::{TransportIo, VsockTransport};

/// What ending the tasks may take of a close whose deadline has passed.
const ABORT_GRACE: Duration = Duration::from_millis(500);

/// The session itself: owns the connection and its two tasks.
///
/// Close it with [`close`](Self::close). Dropping it ends the session too; its
/// streams then fail, and the transport's drop is counted.
#[derive(Debug)]
#[must_use = "dropping the handle ends the session"]
pub struct SessionHandle {
    shared: Arc<Shared>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
    // `None` once closed.
    transport: Option<VsockTransport>,
}

impl SessionHandle {
    /// Starts the tasks on `transport`, whose handshake is over. `buffer` is
    /// what was read behind the handshake.
    pub(crate) fn start(
        transport: VsockTransport,
        io: TransportIo,
        buffer: BytesMut,
        shared: Arc<Shared>,
    ) -> Self {
        let (read, write) = tokio::io::split(io);
        Self {
            reader: tokio::spawn(read_frames(read, buffer, Arc::clone(&shared))),
            writer: tokio::spawn(write_frames(write, Arc::clone(&shared))),
            shared,
            transport: Some(transport),
        }
    }

    /// Guest only: says how the process ended. The frame goes out after all
    /// bytes and ends of the outgoing streams.
    pub fn send_exit(&self, code: u8) {
        self.shared.lock().send_exit(code);
    }

    /// Host only: the process's exit code. All its output has been received
    /// when it comes, though maybe not read. Cancel safe.
    ///
    /// # Errors
    /// Why the session ended, if it did before the code came.
    pub async fn exit(&self) -> Result<u8, SessionError> {
        poll_fn(|cx| {
            self.shared.poll_for(cx, |state| {
                let end = state.end.as_ref().map(|end| Err(end.error()));
                state.exit.map(Ok).or(end)
            })
        })
        .await
    }

    /// Resolves when the peer closed the session or the connection is lost.
    /// Cancel safe.
    pub async fn closed(&self) {
        poll_fn(|cx| {
            self.shared
                .poll_for(cx, |state| state.end.as_ref().map(drop))
        })
        .await;
    }

    /// Sends what is queued and CLOSE, then closes the transport: also if
    /// sending fails or the deadline passes.
    pub async fn close(mut self, by: Deadline) -> CloseReport {
        self.shared.lock().want_close();
        let outcome = match by.run(&mut self.writer).await {
            Ok(Ok(())) => Outcome::Clean,
            Ok(Err(error)) => Outcome::Failed(format!("session writer: {error}")),
            Err(_) => Outcome::Forced("the peer takes no more bytes".into()),
        };
        let mut report = CloseReport::of("session", outcome);
        self.shared.lock().finish(End::Closed);
        self.abort_tasks();
        if let Some(transport) = self.transport.take() {
            // Aborted tasks let go of the connection at once, but not before
            // they had a turn.
            let by = by.max(Deadline::after(ABORT_GRACE));
            report.extend(transport.close(by).await);
        }
        report
    }

    fn abort_tasks(&self) {
        self.reader.abort();
        self.writer.abort();
    }
}

impl Drop for SessionHandle {
    fn drop(&mut self) {
        self.shared.lock().finish(End::Closed);
        self.abort_tasks();
    }
}
