// SPDX-License-Identifier: Apache-2.0
//! The two tasks of a session: the reader fills the incoming streams' buffers,
//! the writer empties the queues.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::task::Poll;

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::frame::{Frame, HEADER};
use super::state::{End, Outbound, Shared};
use crate::error::SessionError;
use crate::metrics;
use crate::transport::{MAX_WRITE, PIECES};

/// What is read at a time while no frame has begun: many small ones.
const FIRST: usize = 4096;

/// Reads frames until the connection or the session ends. `buffer` is what was
/// read behind the handshake; it never holds more than two frames.
pub(super) async fn read_frames(
    mut io: impl AsyncRead + Unpin,
    mut buffer: BytesMut,
    shared: Arc<Shared>,
) {
    let end = loop {
        match Frame::decode(&mut buffer) {
            Ok(Some(frame)) => match shared.lock().deliver(frame) {
                Some(end) => break end,
                None => continue,
            },
            Ok(None) => {}
            Err(error) => break End::Failed(error.into()),
        }
        // To the end of a frame and the next one's header: what is left of a read
        // would have to be moved.
        let wanted = Frame::missing(&buffer).map_or(FIRST, |missing| missing + HEADER);
        buffer.reserve(wanted);
        match io.read_buf(&mut (&mut buffer).limit(wanted)).await {
            Ok(0) => break End::Failed(SessionError::Lost("ended without CLOSE".into())),
            Ok(_) => {}
            Err(error) => break End::Failed(SessionError::Lost(error.to_string())),
        }
    };
    if let End::Failed(error @ SessionError::Protocol(_)) = &end {
        metrics::PROTOCOL_ERRORS.inc();
        tracing::warn!(%error, "session ended: the peer broke the protocol");
    }
    shared.lock().finish(end);
}

/// Writes frames until CLOSE is written or the session has ended.
///
/// A peer that takes no more may have sent before: only the reader ends the
/// session, once it has seen all of that.
pub(super) async fn write_frames(
    mut io: impl AsyncWrite + Unpin,
    shared: Arc<Shared>,
) -> io::Result<()> {
    let mut pending = Pending::default();
    while pending.fill(&shared).await {
        if let Err(error) = pending.write_once(&mut io, &shared).await {
            tracing::debug!(%error, "the peer takes no more frames");
            shared.lock().stop_writing();
            return Err(error);
        }
    }
    Ok(())
}

/// Frames on their way out, the first of them written in part. What is left of
/// one goes together with the next: a small write costs a guest as much as a
/// large one.
#[derive(Debug, Default)]
struct Pending(VecDeque<Outbound>);

impl Pending {
    fn len(&self) -> usize {
        self.0.iter().map(|frame| frame.bytes.len()).sum()
    }

    /// Takes frames until a write is full or there are no more, and waits for
    /// the first; false if none will come.
    async fn fill(&mut self, shared: &Shared) -> bool {
        poll_fn(|cx| {
            while self.len() < MAX_WRITE {
                match shared.poll_frame(cx) {
                    Poll::Ready(Some(frame)) => self.0.push_back(frame),
                    Poll::Ready(None) => break,
                    Poll::Pending if self.0.is_empty() => return Poll::Pending,
                    Poll::Pending => break,
                }
            }
            Poll::Ready(!self.0.is_empty())
        })
        .await
    }

    async fn write_once(
        &mut self,
        io: &mut (impl AsyncWrite + Unpin),
        shared: &Shared,
    ) -> io::Result<()> {
        let mut slices = [IoSlice::new(&[]); PIECES];
        for (slice, frame) in slices.iter_mut().zip(&self.0) {
            *slice = IoSlice::new(&frame.bytes);
        }
        let mut written = io.write_vectored(&slices).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        while let Some(first) = self.0.front_mut() {
            let count = written.min(first.bytes.len());
            first.bytes.advance(count);
            written -= count;
            if !first.bytes.is_empty() {
                break;
            }
            if let Some(stream) = first.data_of {
                shared.lock().written(stream);
            }
            self.0.pop_front();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::Context;

    use bytes::Bytes;
    use tokio::io::ReadBuf;

    use super::super::frame::{MAX_DATA, Stream, WINDOW};
    use super::super::state::Side;
    use super::super::stream::{StreamReader, StreamWriter};
    use super::*;

    /// A peer that sends `bytes` again and again, and notes how much room it
    /// was given.
    struct Flood<'a> {
        bytes: &'a [u8],
        /// Of the time that is under way.
        sent: usize,
        times: usize,
        most: &'a mut usize,
    }

    impl AsyncRead for Flood<'_> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            *self.most = buffer.remaining().max(*self.most);
            let this = &mut *self;
            while this.times > 0 && buffer.remaining() > 0 {
                let rest = &this.bytes[this.sent..];
                let count = rest.len().min(buffer.remaining());
                buffer.put_slice(&rest[..count]);
                this.sent = (this.sent + count) % this.bytes.len();
                this.times -= usize::from(this.sent == 0);
            }
            Poll::Ready(Ok(()))
        }
    }

    async fn flood(bytes: &[u8], times: usize) -> (usize, End) {
        let shared = Shared::new(Side::Host);
        let mut most = 0;
        let io = Flood {
            bytes,
            sent: 0,
            times,
            most: &mut most,
        };
        read_frames(io, BytesMut::new(), Arc::clone(&shared)).await;
        let end = shared.lock().end.clone();
        (most, end.unwrap())
    }

    /// The peer has sent its last words and hung up: writing fails, reading does not.
    #[tokio::test]
    async fn what_arrived_before_a_write_failed_is_read() {
        let shared = Shared::new(Side::Host);
        let mut output = StreamReader::new(&shared, Stream::Output);
        let mut input = StreamWriter::new(&shared, Stream::Input);
        input.write_all(b"x").await.unwrap();
        let (peer, io) = tokio::io::duplex(1);
        drop(peer);
        assert!(write_frames(io, Arc::clone(&shared)).await.is_err());
        let unsent = input.flush().await.unwrap_err();
        assert_eq!(unsent.kind(), io::ErrorKind::BrokenPipe);
        let refused = input.write_all(b"y").await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::BrokenPipe);

        let mut words = Frame::data(Stream::Output, b"last words").to_vec();
        words.extend_from_slice(&Frame::Eof(Stream::Output).encode());
        read_frames(&words[..], BytesMut::new(), Arc::clone(&shared)).await;
        let mut read = String::new();
        output.read_to_string(&mut read).await.unwrap();
        assert_eq!(read, "last words");
        let end = shared.lock().end.clone().unwrap();
        assert!(end.error().to_string().contains("ended without CLOSE"));
    }

    /// As tokio says of `AsyncWrite`, and its `copy` relies on: what was written
    /// is out once flushing, or shutting down, has succeeded.
    #[tokio::test]
    async fn a_flush_waits_for_the_connection() {
        let shared = Shared::new(Side::Host);
        let mut input = StreamWriter::new(&shared, Stream::Input);
        let (mut peer, io) = tokio::io::duplex(1);
        let writer = tokio::spawn(write_frames(io, Arc::clone(&shared)));
        input.write_all(b"word").await.unwrap();
        let mut frame = [0; HEADER + 4];
        // All but two bytes, of which one fits into the connection.
        let (most, rest) = frame.split_at_mut(HEADER + 2);
        {
            let mut flush = std::pin::pin!(input.flush());
            tokio::select! {
                biased;
                flushed = &mut flush => panic!("{flushed:?} before it was taken"),
                read = peer.read_exact(most) => read.unwrap(),
            };
            let (flushed, read) = tokio::join!(flush, peer.read_exact(rest));
            flushed.unwrap();
            read.unwrap();
        }
        assert_eq!(&frame[HEADER..], b"word");
        // Nothing is left to be flushed, and EOF is on its way.
        input.shutdown().await.unwrap();
        let mut end = [0; HEADER];
        peer.read_exact(&mut end).await.unwrap();
        assert_eq!(end[..], Frame::Eof(Stream::Input).encode()[..]);
        shared.lock().finish(End::Closed);
        writer.await.unwrap().unwrap();
        // Also of a session that is over.
        input.flush().await.unwrap();
    }

    #[tokio::test]
    async fn the_reader_keeps_no_more_than_a_peer_may_send() {
        let mut promise = BytesMut::from(&[4, 1, 0, 0][..]);
        promise.put_u32_le(u32::MAX);
        let full = Frame::Data(Stream::Output, Bytes::from(vec![0; MAX_DATA])).encode();
        let small = Frame::Credit(Stream::Input, 0).encode();
        for (bytes, times, error) in [
            (&promise[..], 1, "frame of 4294967295 bytes"),
            (&full[..], 2 * WINDOW / MAX_DATA, "overran its credit"),
            (&small[..], 100_000, "ended without CLOSE"),
        ] {
            let (most, end) = flood(bytes, times).await;
            assert!(end.error().to_string().contains(error), "{end:?}");
            assert!(most <= MAX_DATA + HEADER, "{most} bytes for {error}");
        }
    }
}
