// SPDX-License-Identifier: Apache-2.0
//! The sending end of a stream against what may come between finding room and
//! filling it, as relays do without a copy.

use std::io::ErrorKind;
use std::pin::{Pin, pin};
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use tokio::io::AsyncWrite;

use super::frame::{Frame, MAX_DATA, Stream, WINDOW};
use super::state::{End, Shared, Side};
use super::state_tests::{Source, next, poll};
use super::stream::StreamWriter;

const STREAM: Stream = Stream::Output;

/// After which nobody takes what is written.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// The peer reads no more.
    Stop,
    /// The connection takes no more.
    Broken,
    /// The session is over.
    End,
}

impl Cut {
    fn happens(self, end: &Shared) {
        match self {
            Self::Stop => assert!(end.lock().deliver(Frame::Stop(STREAM)).is_none()),
            Self::Broken => end.lock().stop_writing(),
            Self::End => end.lock().finish(End::Closed),
        }
    }
}

fn writer() -> (Arc<Shared>, StreamWriter) {
    let guest = Shared::new(Side::Guest);
    let writer = StreamWriter::new(&guest, STREAM);
    (guest, writer)
}

/// What is sent, if there was room, while `meanwhile` happens.
fn send(
    writer: &mut StreamWriter,
    bytes: &[u8],
    meanwhile: impl FnOnce() + Unpin,
) -> Option<std::io::Result<usize>> {
    let meanwhile = Some(meanwhile);
    let mut source = Source { bytes, meanwhile };
    poll(|cx| pin!(writer.send_from(&mut source)).poll(cx))
}

/// Hands the next data to the connection; how much it was.
fn hand_over(end: &Shared) -> usize {
    match next(end) {
        Some(Frame::Data(STREAM, bytes)) => bytes.len(),
        None => 0,
        Some(other) => unreachable!("{other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Bytes that are said to be sent are handed over, or the flush fails; what
    /// comes behind the cut is not said to be sent.
    #[test]
    fn what_is_cut_between_room_and_queue_is_told(
        steps in prop::collection::vec((1..=MAX_DATA, 0usize..3), 1..20),
        cut_at in 0usize..20,
        how in prop::sample::select(vec![Cut::Stop, Cut::Broken, Cut::End]),
    ) {
        let (guest, mut writer) = writer();
        let (mut said, mut handed, mut is_cut) = (0, 0, false);
        for (at, (size, frames)) in steps.into_iter().enumerate() {
            let meanwhile = || if at == cut_at {
                how.happens(&guest);
                is_cut = true;
            };
            match send(&mut writer, &vec![7; size], meanwhile) {
                Some(Ok(count)) => {
                    prop_assert!(!is_cut, "{count} bytes go nowhere");
                    said += count;
                }
                Some(Err(error)) => {
                    prop_assert!(is_cut);
                    prop_assert_eq!(error.kind(), ErrorKind::BrokenPipe);
                }
                None => prop_assert!(!is_cut, "it waits for nobody"),
            }
            for _ in 0..frames {
                let count = hand_over(&guest);
                handed += count;
                if !is_cut && count > 0 {
                    let credit = guest.lock().deliver(Frame::Credit(STREAM, count));
                    prop_assert!(credit.is_none());
                }
            }
        }
        match poll(|cx| Pin::new(&mut writer).poll_flush(cx)) {
            None => prop_assert!(!is_cut && handed < said),
            Some(Ok(())) => prop_assert_eq!(handed, said),
            Some(Err(error)) => {
                prop_assert!(is_cut && handed < said);
                prop_assert_eq!(error.kind(), ErrorKind::BrokenPipe);
            }
        }
    }
}

/// A relay that is given up while it waits for its source has taken nothing.
#[test]
fn a_send_that_is_dropped_sends_nothing() {
    let (guest, mut writer) = writer();
    let (silent, _keeps_it_open) = tokio::io::duplex(1);
    let mut silent = silent;
    assert!(poll(|cx| pin!(writer.send_from(&mut silent)).poll(cx)).is_none());
    assert_eq!(next(&guest), None);
    let sent = send(&mut writer, b"word", || {}).unwrap().unwrap();
    assert_eq!(sent, 4);
    assert_eq!(next(&guest), Some(Frame::Data(STREAM, Bytes::from("word"))));
}

/// A sender that was busy keeps a window's worth of memory, and no more.
#[test]
fn what_a_sender_keeps_is_bounded() {
    let (guest, mut writer) = writer();
    let mut frames = Vec::new();
    for _ in 0..5 * WINDOW / MAX_DATA {
        let sent = send(&mut writer, &[7; MAX_DATA], || {}).unwrap().unwrap();
        let frame = poll(|cx| guest.poll_frame(cx)).flatten().unwrap();
        guest.lock().written(STREAM);
        frames.push(frame.bytes);
        let credit = guest.lock().deliver(Frame::Credit(STREAM, sent));
        assert!(credit.is_none());
    }
    let kept = frames.iter().filter(|frame| !frame.is_unique()).count();
    assert_eq!(kept, WINDOW / MAX_DATA);
    drop(writer);
    assert!(frames.iter().all(Bytes::is_unique));
}
