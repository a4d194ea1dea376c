// SPDX-License-Identifier: Apache-2.0
//! What users of a session read and write.

use std::future::{pending, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::buffer::Buffer;
use super::frame::{Frame, MAX_DATA, Stream, Unsealed, WINDOW};
use super::state::{End, Ending, Outgoing, Shared, State};
use crate::sync::Arc;

/// Frames that wait to be written per stream: enough to keep the writer task
/// busy, little to lose when the session ends.
const QUEUE: usize = 4;
/// Allocations that a sender keeps: more than a window cannot be unsent at once.
const SPACES: usize = WINDOW / MAX_DATA;

/// The sending end of a stream.
///
/// Writing waits for the receiver's credit. Flushing waits until what was
/// written has been handed to the connection, and fails once that cannot happen
/// any more: the receiver reads no more, the connection takes nothing, the
/// session is over. Shutting down sends EOF and flushes; [`finish`](Self::finish)
/// leaves the waiting to the session's close. Dropping without either tells the
/// receiver that the stream was cut.
#[derive(Debug)]
pub struct StreamWriter {
    shared: Arc<Shared>,
    stream: Stream,
    /// The allocations of the last frames, to be used again once those are sent:
    /// fresh memory is cleared by the kernel first.
    spaces: [BytesMut; SPACES],
}

impl StreamWriter {
    pub(crate) fn new(shared: &Arc<Shared>, stream: Stream) -> Self {
        Self {
            shared: Arc::clone(shared),
            stream,
            spaces: Default::default(),
        }
    }

    fn end(&self, ending: Ending) {
        self.shared.lock().end_writing(self.stream, ending);
    }

    /// How many bytes may be written now, at most a frame's.
    fn poll_room(&self, cx: &Context<'_>) -> Poll<io::Result<usize>> {
        let mut state = self.shared.lock();
        let outgoing = open(&mut state, self.stream)?;
        if outgoing.credit == 0 || outgoing.queue.len() >= QUEUE {
            outgoing.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(outgoing.credit.min(MAX_DATA)))
    }

    /// Queues a frame with `count` bytes, for which there was room; nobody else
    /// can have taken that, but what makes it useless may have come since.
    fn queue(&self, frame: Bytes, count: usize) -> io::Result<()> {
        let mut state = self.shared.lock();
        let outgoing = open(&mut state, self.stream)?;
        outgoing.queue.push_back(frame);
        outgoing.unwritten += 1;
        outgoing.credit -= count;
        state.wake_writer();
        Ok(())
    }

    /// Says the stream's end behind what was written, and does not wait for it:
    /// the session's close tells what could not be sent.
    pub fn finish(self) {
        self.end(Ending::Eof);
    }

    /// Reads from `from` once, straight into a frame, and sends that; gives how
    /// much it was, 0 at the end of `from`. Nothing is read before the receiver
    /// has given credit for it. Cancel safe.
    ///
    /// # Errors
    /// Those of `from`; [`io::ErrorKind::BrokenPipe`] once the receiver takes no
    /// more: what was read while that came is lost.
    pub async fn send_from(&mut self, from: &mut (impl AsyncRead + Unpin)) -> io::Result<usize> {
        self.send_from_unless(from, pending()).await
    }

    /// As [`send_from`](Self::send_from), but a read that waits fails, too, once the
    /// receiver takes no more.
    pub(crate) async fn send_while_taken(
        &mut self,
        from: &mut (impl AsyncRead + Unpin),
    ) -> io::Result<usize> {
        let untaken = untaken(Arc::clone(&self.shared), self.stream);
        self.send_from_unless(from, untaken).await
    }

    async fn send_from_unless(
        &mut self,
        from: &mut (impl AsyncRead + Unpin),
        untaken: impl Future<Output = io::Error>,
    ) -> io::Result<usize> {
        let room = poll_fn(|cx| self.poll_room(cx)).await?;
        self.spaces.rotate_left(1);
        let space = &mut self.spaces[0];
        let mut frame = Unsealed::with_room(space, room);
        let mut limited = frame.payload().limit(room);
        let count = tokio::select! {
            biased;
            count = from.read_buf(&mut limited) => count?,
            error = untaken => return Err(error),
        };
        let frame = frame.seal(self.stream, space);
        if count > 0 {
            self.queue(frame, count)?;
        }
        Ok(count)
    }
}

/// Waits until what is written to `stream` is taken no more. One task writes to a
/// stream and waits for this.
async fn untaken(shared: Arc<Shared>, stream: Stream) -> io::Error {
    poll_fn(|cx| {
        let mut state = shared.lock();
        match open(&mut state, stream) {
            Ok(outgoing) => {
                outgoing.waker = Some(cx.waker().clone());
                Poll::Pending
            }
            Err(error) => Poll::Ready(error),
        }
    })
    .await
}

/// The outgoing stream, while what is written to it may still be sent.
fn open(state: &mut State, stream: Stream) -> io::Result<&mut Outgoing> {
    if let Some(end) = &state.end {
        return Err(io::Error::new(io::ErrorKind::BrokenPipe, end.error()));
    }
    match state.outgoing(stream) {
        None => Err(io::ErrorKind::Unsupported.into()),
        Some(outgoing) if outgoing.stopped || outgoing.ending != Ending::Open => {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        Some(outgoing) => Ok(outgoing),
    }
}

fn broken<T>(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Poll<io::Result<T>> {
    Poll::Ready(Err(io::Error::new(io::ErrorKind::BrokenPipe, why)))
}

impl AsyncWrite for StreamWriter {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let room = ready!(self.poll_room(cx))?;
        let count = buf.len().min(room);
        if count > 0 {
            self.queue(Frame::data(self.stream, &buf[..count]), count)?;
        }
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.shared.lock();
        let ended = state.end.as_ref().map(End::error);
        match (state.outgoing(self.stream), ended) {
            (Some(outgoing), _) if outgoing.unwritten == 0 => Poll::Ready(Ok(())),
            (Some(_), Some(error)) => broken(error),
            (Some(outgoing), None) if outgoing.stopped => broken("nobody takes what was written"),
            (Some(outgoing), None) => {
                outgoing.waker = Some(cx.waker().clone());
                Poll::Pending
            }
            (None, _) => Poll::Ready(Err(io::ErrorKind::Unsupported.into())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end(Ending::Eof);
        self.poll_flush(cx)
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

    /// The next piece of what has arrived, as it is; `None` after the sender's
    /// EOF. Cancel safe.
    ///
    /// # Errors
    /// As reading: if the stream was cut, or the session ended without EOF.
    pub async fn chunk(&mut self) -> io::Result<Option<Bytes>> {
        poll_fn(|cx| {
            self.poll_take(cx, |buffer| {
                let piece = buffer.pop()?;
                let count = piece.len();
                Some((piece, count))
            })
        })
        .await
    }

    /// How many bytes have arrived and were not read yet.
    #[must_use]
    pub fn arrived(&self) -> usize {
        let mut state = self.shared.lock();
        state
            .incoming(self.stream)
            .map_or(0, |incoming| incoming.buffer.len())
    }

    /// What `take` finds, with how many bytes it took, or how the stream ended;
    /// `None` after EOF.
    fn poll_take<T>(
        &self,
        cx: &Context<'_>,
        take: impl FnOnce(&mut Buffer) -> Option<(T, usize)>,
    ) -> Poll<io::Result<Option<T>>> {
        let mut state = self.shared.lock();
        let ended = state.end.as_ref().map(End::error);
        let Some(incoming) = state.incoming(self.stream) else {
            return Poll::Ready(Err(io::ErrorKind::Unsupported.into()));
        };
        if let Some((taken, count)) = take(&mut incoming.buffer) {
            state.return_credit(self.stream, count);
            return Poll::Ready(Ok(Some(taken)));
        }
        if incoming.eof {
            return Poll::Ready(Ok(None));
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

impl AsyncRead for StreamReader {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let taken = ready!(self.poll_take(cx, |buffer| {
            let count = buffer.read(buf);
            (count > 0).then_some(((), count))
        }));
        Poll::Ready(taken.map(|_| ()))
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        self.shared.lock().stop_reading(self.stream);
    }
}
