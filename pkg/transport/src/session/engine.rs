// SPDX-License-Identifier: Apache-2.0
//! The two tasks of a session: the reader fills the incoming streams' buffers,
//! the writer empties the queues.

use std::future::poll_fn;
use std::sync::Arc;

use bytes::{BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::frame::{Frame, HEADER};
use super::state::{End, Shared};
use crate::error::SessionError;
use crate::metrics;

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
pub(super) async fn write_frames(mut io: impl AsyncWrite + Unpin, shared: Arc<Shared>) {
    while let Some(frame) = poll_fn(|cx| shared.poll_frame(cx)).await {
        if let Err(error) = io.write_all(&frame).await {
            tracing::debug!(%error, "the peer takes no more frames");
            shared.lock().stop_writing();
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::pin::Pin;
    use std::task::{Context, Poll};

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
        write_frames(io, Arc::clone(&shared)).await;
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
            assert!(most <= 64 * 1024, "{most} bytes for {error}");
        }
    }
}
