// SPDX-License-Identifier: Apache-2.0
//! Credit: a stream's user against the tasks of its session. The peer is played
//! by the main thread; that two ends agree is shown in `session::state_tests`.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;

use bytes::{Bytes, BytesMut};
use loom::future::block_on;
use loom::sync::Arc;
use loom::thread;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::explore;
use crate::session::frame::{Frame, MAX_DATA, Stream, WINDOW};
use crate::session::state::{End, Shared, Side};
use crate::session::stream::{StreamReader, StreamWriter};

/// What is sent: more than the window.
pub(super) const BYTES: [u8; WINDOW + MAX_DATA] = [1, 2, 3, 4, 5, 6];
pub(super) const STREAM: Stream = Stream::Output;

/// The next frame that an end writes, and has written then.
pub(super) fn next(end: &Shared) -> Option<Frame> {
    let frame = block_on(poll_fn(|cx| end.poll_frame(cx)))?;
    if let Some(stream) = frame.data_of {
        end.lock().written(stream);
    }
    Frame::decode(&mut BytesMut::from(&frame.bytes[..])).unwrap()
}

pub(super) fn deliver(end: &Shared, frame: Frame) {
    let over = end.lock().deliver(frame);
    assert!(over.is_none(), "{over:?}");
}

fn write_all(writer: &mut StreamWriter, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = block_on(poll_fn(|cx| Pin::new(&mut *writer).poll_write(cx, bytes)))?;
        bytes = &bytes[written..];
    }
    Ok(())
}

fn read(reader: &mut StreamReader, received: &mut Vec<u8>) -> io::Result<usize> {
    let mut space = [0; 3];
    let mut buffer = ReadBuf::new(&mut space);
    block_on(poll_fn(|cx| {
        Pin::new(&mut *reader).poll_read(cx, &mut buffer)
    }))?;
    received.extend_from_slice(buffer.filled());
    Ok(buffer.filled().len())
}

#[test]
fn a_writer_without_credit_goes_on_when_it_comes() {
    explore(4, || {
        let guest = Shared::new(Side::Guest);
        let mut writer = StreamWriter::new(&guest, STREAM);
        let sender = thread::spawn(move || {
            write_all(&mut writer, &BYTES).unwrap();
            writer.finish();
        });
        let mut received = Vec::new();
        while let Some(Frame::Data(STREAM, bytes)) = next(&guest) {
            received.extend_from_slice(&bytes);
            // Late: the queue is empty when it comes, so nothing else wakes the
            // writer.
            if received.len() == WINDOW {
                deliver(&guest, Frame::Credit(STREAM, WINDOW));
            }
        }
        assert_eq!(received, BYTES, "all of it, before the end");
        sender.join().unwrap();
    });
}

#[test]
fn a_reader_gives_credit_for_what_it_reads() {
    explore(4, || {
        let host = Shared::new(Side::Host);
        let mut reader = StreamReader::new(&host, STREAM);
        let receiver = thread::spawn(move || {
            let mut received = Vec::new();
            while read(&mut reader, &mut received).unwrap() > 0 {}
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
fn a_reader_that_goes_away_frees_a_writer_without_credit() {
    explore(4, || {
        let guest = Shared::new(Side::Guest);
        let mut writer = StreamWriter::new(&guest, STREAM);
        let sender = thread::spawn(move || write_all(&mut writer, &BYTES));
        deliver(&guest, Frame::Stop(STREAM));
        let error = sender.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    });
}

#[test]
fn the_end_of_a_session_frees_a_writer_and_the_writing_task() {
    explore(3, || {
        let host = Shared::new(Side::Host);
        let mut writer = StreamWriter::new(&host, Stream::Input);
        let sender = thread::spawn(move || {
            write_all(&mut writer, &BYTES).unwrap_err();
        });
        let task = {
            let host = Arc::clone(&host);
            thread::spawn(move || while next(&host).is_some() {})
        };
        host.lock().finish(End::Closed);
        sender.join().unwrap();
        task.join().unwrap();
    });
}

#[test]
fn the_end_of_a_session_frees_a_reader_and_who_waits_for_the_exit() {
    explore(3, || {
        let host = Shared::new(Side::Host);
        let mut reader = StreamReader::new(&host, STREAM);
        let receiver = thread::spawn(move || {
            read(&mut reader, &mut Vec::new()).unwrap_err();
        });
        let waiter = {
            let host = Arc::clone(&host);
            thread::spawn(move || {
                block_on(poll_fn(|cx| host.poll_for(cx, |state| state.end.clone())));
            })
        };
        host.lock().finish(End::Closed);
        receiver.join().unwrap();
        waiter.join().unwrap();
    });
}
