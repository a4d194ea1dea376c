// SPDX-License-Identifier: Apache-2.0
//! The owner of a session.

use std::sync::Arc;

use bytes::BytesMut;
use podhull_types::Deadline;
use tokio::task::JoinHandle;

use super::engine::{End, Shared, read_frames, write_frames};
use crate::error::SessionError;
use crate::report::{CloseReport, Outcome};
use crate::transport::{TransportIo, VsockTransport};

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
        self.shared.lock().exit_to_send = Some(code);
        self.shared.to_write.notify_one();
    }

    /// Host only: the process's exit code. All its output has been received
    /// when it comes, though maybe not read. Cancel safe.
    ///
    /// # Errors
    /// Why the session ended, if it did before the code came.
    pub async fn exit(&self) -> Result<u8, SessionError> {
        self.shared
            .wait_for(|state| {
                let end = state.end.as_ref().map(|end| Err(end.error()));
                state.exit.map(Ok).or(end)
            })
            .await
    }

    /// Resolves when the peer closed the session or the connection is lost.
    /// Cancel safe.
    pub async fn closed(&self) {
        self.shared
            .wait_for(|state| state.end.as_ref().map(drop))
            .await;
    }

    /// Sends what is queued and CLOSE, then closes the transport: also if
    /// sending fails or the deadline passes.
    pub async fn close(mut self, by: Deadline) -> CloseReport {
        self.shared.lock().close_wanted = true;
        self.shared.to_write.notify_one();
        let outcome = match by.run(&mut self.writer).await {
            Ok(Ok(())) => Outcome::Clean,
            Ok(Err(error)) => Outcome::Failed(format!("session writer: {error}")),
            Err(_) => Outcome::Forced("the peer takes no more bytes".into()),
        };
        let mut report = CloseReport::of("session", outcome);
        self.shared.finish(End::Closed);
        self.abort_tasks();
        if let Some(transport) = self.transport.take() {
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
        self.shared.finish(End::Closed);
        self.abort_tasks();
    }
}
