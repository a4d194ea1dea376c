// SPDX-License-Identifier: Apache-2.0
//! What users of a session read and write.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::frame::{Frame, MAX_DATA, Stream};
use super::state::{End, Ending, Shared};
use crate::sync::Arc;

/// Frames that wait to be written per stream: enough to keep the writer task
/// busy, little to lose when the session ends.
const QUEUE: usize = 4;

/// The sending end of a stream.
///
/// Writing waits for the receiver's credit. Shutting down sends EOF; dropping
/// without it tells the receiver that the stream was cut.
#[derive(Debug)]
pub struct StreamWriter {
    shared: Arc<Shared>,
    stream: Stream,
}

impl StreamWriter {
    pub(crate) fn new(shared: &Arc<Shared>, stream: Stream) -> Self {
        Self {
            shared: Arc::clone(shared),
            stream,
        }
    }

    fn end(&self, ending: Ending) {
        self.shared.lock().end_writing(self.stream, ending);
    }
}

impl AsyncWrite for StreamWriter {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.shared.lock();
        if let Some(end) = &state.end {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::BrokenPipe, end.error())));
        }
        let Some(outgoing) = state.outgoing(self.stream) else {
            return Poll::Ready(Err(io::ErrorKind::Unsupported.into()));
        };
        if outgoing.stopped || outgoing.ending != Ending::Open {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if outgoing.credit == 0 || outgoing.queue.len() >= QUEUE {
            outgoing.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let count = buf.len().min(MAX_DATA).min(outgoing.credit);
        if count > 0 {
            outgoing
                .queue
                .push_back(Frame::data(self.stream, &buf[..count]));
            outgoing.credit -= count;
            state.wake_writer();
        }
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.shared.lock();
        let ended = state.end.as_ref().map(End::error);
        match (state.outgoing(self.stream), ended) {
            (Some(outgoing), None) if !outgoing.queue.is_empty() => {
                outgoing.waker = Some(cx.waker().clone());
                Poll::Pending
            }
            (Some(outgoing), Some(error)) if !outgoing.queue.is_empty() => {
                Poll::Ready(Err(io::Error::new(io::ErrorKind::BrokenPipe, error)))
            }
            _ => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end(Ending::Eof);
        Poll::Ready(Ok(()))
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        self.end(Ending::Abort);
    }
}

/// The receiving end of a stream.
///
/// Reads 0 bytes after the sender's EOF; fails if the stream was cut or the
/// session ended without it, after all that had arrived was read. Dropping it
/// tells the sender that nobody reads.
#[derive(Debug)]
pub struct StreamReader {
    shared: Arc<Shared>,
    stream: Stream,
}

impl StreamReader {
    pub(crate) fn new(shared: &Arc<Shared>, stream: Stream) -> Self {
        Self {
            shared: Arc::clone(shared),
            stream,
        }
    }
}

impl AsyncRead for StreamReader {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = self.shared.lock();
        let ended = state.end.as_ref().map(End::error);
        let Some(incoming) = state.incoming(self.stream) else {
            return Poll::Ready(Err(io::ErrorKind::Unsupported.into()));
        };
        let count = incoming.buffer.read(buf);
        if count > 0 {
            state.return_credit(self.stream, count);
            return Poll::Ready(Ok(()));
        }
        if incoming.eof || buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if incoming.aborted {
            let cut = io::Error::new(io::ErrorKind::ConnectionAborted, "the sender is gone");
            return Poll::Ready(Err(cut));
        }
        if let Some(error) = ended {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionReset, error)));
        }
        incoming.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        self.shared.lock().stop_reading(self.stream);
    }
}
