// SPDX-License-Identifier: Apache-2.0
//! What has arrived of a stream and was not read yet.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::ReadBuf;

/// Smaller pieces are copied together: each would keep all of the memory that
/// it was received in, and a peer could send nothing but single bytes.
const WORTH_KEEPING: usize = 4096;

/// Bytes in the order in which they arrived.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    large: VecDeque<Bytes>,
    /// Comes behind `large`.
    small: BytesMut,
}

impl Buffer {
    pub(crate) fn len(&self) -> usize {
        self.large.iter().map(Bytes::len).sum::<usize>() + self.small.len()
    }

    pub(crate) fn push(&mut self, bytes: Bytes) {
        if bytes.len() < WORTH_KEEPING {
            self.small.extend_from_slice(&bytes);
            return;
        }
        if !self.small.is_empty() {
            self.large.push_back(self.small.split().freeze());
        }
        self.large.push_back(bytes);
    }

    /// Takes the next piece as it is; `None` if nothing is there.
    pub(crate) fn pop(&mut self) -> Option<Bytes> {
        let small = || (!self.small.is_empty()).then(|| self.small.split().freeze());
        self.large.pop_front().or_else(small)
    }

    /// Moves as much as there is room for; gives how much that was.
    pub(crate) fn read(&mut self, into: &mut ReadBuf<'_>) -> usize {
        let before = into.remaining();
        while let Some(front) = self.large.front_mut() {
            put(front, into);
            if !front.is_empty() {
                break;
            }
            self.large.pop_front();
        }
        if self.large.is_empty() {
            put(&mut self.small, into);
        }
        before - into.remaining()
    }
}

fn put(from: &mut (impl Buf + AsRef<[u8]>), into: &mut ReadBuf<'_>) {
    let count = from.remaining().min(into.remaining());
    into.put_slice(&from.as_ref()[..count]);
    from.advance(count);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_kept_whatever_the_sizes() {
        let mut buffer = Buffer::default();
        let mut sent = Vec::new();
        let sizes = [
            1,
            WORTH_KEEPING,
            3,
            5,
            2 * WORTH_KEEPING + 1,
            WORTH_KEEPING - 1,
            7,
        ];
        for (number, size) in (0..).zip(sizes) {
            let bytes = vec![number; size];
            sent.extend_from_slice(&bytes);
            buffer.push(bytes.into());
        }
        assert_eq!(buffer.len(), sent.len());
        let mut received = Vec::new();
        for size in [2, 5000, 1, 20_000, 20_000] {
            let mut space = vec![0; size];
            let mut into = ReadBuf::new(&mut space);
            let count = buffer.read(&mut into);
            assert_eq!(count, into.filled().len());
            received.extend_from_slice(into.filled());
        }
        assert_eq!(received, sent);
        assert_eq!(buffer.len(), 0);
    }

    #[test]
    fn pieces_come_in_order_and_are_not_copied() {
        let mut buffer = Buffer::default();
        let large = Bytes::from(vec![1; WORTH_KEEPING]);
        for bytes in [
            Bytes::from_static(b"a"),
            large.clone(),
            Bytes::from_static(b"b"),
        ] {
            buffer.push(bytes);
        }
        assert_eq!(buffer.pop().unwrap(), "a");
        assert_eq!(buffer.pop().unwrap().as_ptr(), large.as_ptr());
        assert_eq!(buffer.pop().unwrap(), "b");
        assert_eq!((buffer.pop(), buffer.len()), (None, 0));
    }

    /// One byte of each of many receive buffers must not keep those.
    #[test]
    fn small_pieces_do_not_keep_what_they_came_in() {
        let mut buffer = Buffer::default();
        let whole = Bytes::from(vec![0; 64 * 1024]);
        buffer.push(whole.slice(..1));
        assert!(whole.is_unique());
    }
}
