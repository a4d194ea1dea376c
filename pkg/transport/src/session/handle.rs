// SPDX-License-Identifier: Apache-2.0
//! The owner of a session.

use std::future::poll_fn;
use std::io;
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
    writer: JoinHandle<io::Result<()>>,
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
    ///
    /// The session's step is clean if all of that was sent, or if the peer had
    /// said before that it is done.
    pub async fn close(mut self, by: Deadline) -> CloseReport {
        self.shared.lock().want_close();
        let outcome = match by.run(&mut self.writer).await {
            Ok(Ok(sent)) => self.outcome(sent, by).await,
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

    /// How the session ended, `sent` being what the writer came to.
    async fn outcome(&self, sent: io::Result<()>, by: Deadline) -> Outcome {
        if sent.is_err() {
            // The peer's last words may have arrived and not been read yet. If
            // they never end, the write's error is what there is to say.
            let over = poll_fn(|cx| {
                self.shared.poll_for(cx, |state| {
                    (state.peer_is_done() || state.end.is_some()).then_some(())
                })
            });
            let _ = by.run(over).await;
        }
        let state = self.shared.lock();
        match (sent, &state.end) {
            _ if state.peer_is_done() => Outcome::Clean,
            (Ok(()), _) if state.close_sent => Outcome::Clean,
            (Ok(()), Some(end)) => Outcome::Failed(end.error().to_string()),
            (Ok(()), None) => Outcome::Failed("CLOSE was not sent".into()),
            (Err(error), Some(end)) => {
                Outcome::Failed(format!("not all was sent: {error}; {}", end.error()))
            }
            (Err(error), None) => Outcome::Failed(format!("not all was sent: {error}")),
        }
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

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::super::frame::{Frame, Stream};
    use super::super::state::Side;
    use super::*;

    /// A host's session whose peer has said `words` and gone: what is written
    /// fails, and `words` are read once the sender is used, or never if it is kept.
    fn lost(words: &[Frame]) -> (SessionHandle, oneshot::Sender<()>) {
        let words: Vec<u8> = words.iter().flat_map(Frame::encode).collect();
        let shared = Shared::new(Side::Host);
        let (read, may_read) = oneshot::channel();
        let (peer, io) = tokio::io::duplex(1);
        drop(peer);
        let reader = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move {
                may_read.await.unwrap();
                read_frames(&words[..], BytesMut::new(), shared).await;
            }
        });
        let handle = SessionHandle {
            reader,
            writer: tokio::spawn(write_frames(io, Arc::clone(&shared))),
            shared,
            transport: None,
        };
        (handle, read)
    }

    /// What was said before counts, also if it is read only after writing failed.
    #[tokio::test]
    async fn l9_a_close_that_cannot_send_is_clean_only_if_the_peer_was_done() {
        let eof = |stream| Frame::Eof(stream);
        let ends = [eof(Stream::Output), eof(Stream::Error)];
        let exit = [&ends[..], &[Frame::Exit(0)]].concat();
        for (words, clean) in [
            (&[Frame::Close][..], true),
            (&exit[..], true),
            (&ends[..], false),
            (&[][..], false),
        ] {
            let (handle, read) = lost(words);
            let shared = Arc::clone(&handle.shared);
            let closing = tokio::spawn(handle.close(Deadline::after(Duration::from_secs(20))));
            let failed = || shared.lock().outgoing(Stream::Input).unwrap().stopped;
            while !failed() {
                tokio::task::yield_now().await;
            }
            assert!(!closing.is_finished(), "{words:?} are not waited for");
            read.send(()).unwrap();
            let report = closing.await.unwrap();
            assert_eq!(report.is_clean(), clean, "{words:?}: {report}");
        }
    }

    /// The peer has gone, and that was noticed before there was anything to send.
    #[tokio::test]
    async fn l9_a_close_of_a_session_that_was_lost_is_not_clean() {
        let (handle, read) = lost(&[]);
        read.send(()).unwrap();
        handle.closed().await;
        let report = handle.close(Deadline::after(Duration::from_secs(20))).await;
        let (step, outcome) = report.first_problem().unwrap();
        let Outcome::Failed(why) = outcome else {
            panic!("{report}")
        };
        assert_eq!(step, "session");
        assert!(why.contains("ended without CLOSE"), "{why}");
    }

    #[tokio::test(start_paused = true)]
    async fn l9_a_close_that_cannot_send_meets_its_deadline() {
        let (handle, _silent) = lost(&[]);
        let report = handle.close(Deadline::after(Duration::from_secs(2))).await;
        let (step, outcome) = report.first_problem().unwrap();
        assert_eq!(step, "session");
        assert!(
            matches!(outcome, Outcome::Failed(why) if why.starts_with("not all was sent")),
            "{report}"
        );
    }
}
