// SPDX-License-Identifier: Apache-2.0
//! What relays use, which copies nothing: a sender finds room, reads, and only
//! then takes the room. Whatever comes in between must not lose bytes unsaid.

use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::pin::Pin;

use bytes::Bytes;
use loom::future::block_on;
use loom::sync::Arc;
use loom::thread::{self, JoinHandle};
use tokio::io::AsyncWrite;

use super::credit::{BYTES, STREAM, deliver, next};
use super::explore;
use crate::session::frame::{Frame, MAX_DATA, WINDOW};
use crate::session::state::{End, Shared, Side};
use crate::session::stream::{StreamReader, StreamWriter};

/// How much was said to be sent, and what came then.
fn send_all(writer: &mut StreamWriter, mut bytes: &[u8]) -> (usize, io::Result<()>) {
    let mut said = 0;
    while !bytes.is_empty() {
        match block_on(writer.send_from(&mut bytes)) {
            Ok(count) => said += count,
            Err(error) => return (said, Err(error)),
        }
    }
    (said, Ok(()))
}

fn flush(writer: &mut StreamWriter) -> io::Result<()> {
    block_on(poll_fn(|cx| Pin::new(&mut *writer).poll_flush(cx)))
}

/// Sends until it is cut: how much it said to have sent, and whether that was
/// flushed.
fn sends_until_cut(guest: &Arc<Shared>) -> JoinHandle<(usize, bool)> {
    let mut writer = StreamWriter::new(guest, STREAM);
    thread::spawn(move || {
        let (said, sent) = send_all(&mut writer, &BYTES);
        assert_eq!(sent.unwrap_err().kind(), ErrorKind::BrokenPipe);
        (said, flush(&mut writer).is_ok())
    })
}

#[test]
fn a_relay_without_credit_goes_on_when_it_comes() {
    explore(3, || {
        let guest = Shared::new(Side::Guest);
        let mut writer = StreamWriter::new(&guest, STREAM);
        let sender = thread::spawn(move || {
            let (said, sent) = send_all(&mut writer, &BYTES);
            sent.unwrap();
            assert_eq!(said, BYTES.len());
            writer.finish();
        });
        let mut received = Vec::new();
        while let Some(Frame::Data(STREAM, bytes)) = next(&guest) {
            received.extend_from_slice(&bytes);
            if received.len() == WINDOW {
                deliver(&guest, Frame::Credit(STREAM, WINDOW));
            }
        }
        assert_eq!(received, BYTES, "all of it, before the end");
        sender.join().unwrap();
    });
}

#[test]
fn a_relay_gives_credit_for_what_it_takes() {
    explore(4, || {
        let host = Shared::new(Side::Host);
        let mut reader = StreamReader::new(&host, STREAM);
        let receiver = thread::spawn(move || {
            let mut received = Vec::new();
            while let Some(piece) = block_on(reader.chunk()).unwrap() {
                received.extend_from_slice(&piece);
            }
            received
        });
        let mut credit = WINDOW;
        for piece in BYTES.chunks(MAX_DATA) {
            while credit < piece.len() {
                match next(&host) {
                    Some(Frame::Credit(STREAM, more)) => credit += more,
                    other => panic!("{other:?}"),
                }
            }
            credit -= piece.len();
            deliver(&host, Frame::Data(STREAM, Bytes::copy_from_slice(piece)));
        }
        deliver(&host, Frame::Eof(STREAM));
        assert_eq!(receiver.join().unwrap(), BYTES);
    });
}

#[test]
fn a_stop_between_room_and_queue_leaves_nothing_behind() {
    explore(4, || {
        let guest = Shared::new(Side::Guest);
        let sender = sends_until_cut(&guest);
        deliver(&guest, Frame::Stop(STREAM));
        let (said, flushed) = sender.join().unwrap();
        assert_eq!(flushed, said == 0, "{said} bytes were not written");
        // The relay is gone, and no data comes before that is told.
        assert_eq!(next(&guest), Some(Frame::Abort(STREAM)));
    });
}

/// The connection takes one frame.
fn is_cut_behind_a_frame(cut: fn(&Shared)) {
    explore(4, move || {
        let guest = Shared::new(Side::Guest);
        let sender = sends_until_cut(&guest);
        let Some(Frame::Data(STREAM, bytes)) = next(&guest) else {
            unreachable!("nothing is sent");
        };
        cut(&guest);
        let (said, flushed) = sender.join().unwrap();
        assert!(said >= bytes.len());
        assert_eq!(flushed, said == bytes.len(), "{said} bytes were said");
    });
}

#[test]
fn a_broken_connection_between_room_and_queue_is_told() {
    is_cut_behind_a_frame(|guest| guest.lock().stop_writing());
}

#[test]
fn the_end_of_a_session_between_room_and_queue_is_told() {
    is_cut_behind_a_frame(|guest| guest.lock().finish(End::Closed));
}

#[test]
fn a_flush_ends_when_the_last_frame_is_written() {
    explore(4, || {
        let guest = Shared::new(Side::Guest);
        let mut writer = StreamWriter::new(&guest, STREAM);
        let sender = thread::spawn(move || {
            let (said, sent) = send_all(&mut writer, &BYTES[..WINDOW]);
            sent.unwrap();
            flush(&mut writer).unwrap();
            said
        });
        for _ in 0..WINDOW / MAX_DATA {
            assert!(matches!(next(&guest), Some(Frame::Data(STREAM, _))));
        }
        assert_eq!(sender.join().unwrap(), WINDOW);
    });
}

#[test]
fn a_flush_ends_when_the_connection_breaks() {
    explore(4, || {
        let guest = Shared::new(Side::Guest);
        let mut writer = StreamWriter::new(&guest, STREAM);
        let sent = send_all(&mut writer, &BYTES[..MAX_DATA]);
        assert!(matches!(sent, (MAX_DATA, Ok(()))));
        let waiting = thread::spawn(move || {
            let error = flush(&mut writer).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::BrokenPipe);
        });
        guest.lock().stop_writing();
        waiting.join().unwrap();
    });
}
