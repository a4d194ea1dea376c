// SPDX-License-Identifier: Apache-2.0
//! One end against a peer that breaks a rule, or stops at a corner.

use std::pin::Pin;

use tokio::io::{AsyncRead, ReadBuf};

use super::frame::{Frame, MAX_DATA, Stream, WINDOW};
use super::state::{Shared, Side};
use super::state_tests::{next, poll};
use super::stream::StreamReader;

/// A peer that sends on without taking what it is sent is stopped by the window
/// and cannot make its credit pile up.
#[test]
fn a_peer_that_takes_nothing_cannot_make_the_queue_grow() {
    let host = Shared::new(Side::Host);
    let mut reader = StreamReader::new(&host, Stream::Output);
    let mut space = vec![0; WINDOW];
    let mut sent = 0;
    let failed = loop {
        let frame = Frame::Data(Stream::Output, vec![0; MAX_DATA].into());
        if let Some(end) = host.lock().deliver(frame) {
            break end;
        }
        sent += MAX_DATA;
        let mut buffer = ReadBuf::new(&mut space);
        poll(|cx| Pin::new(&mut reader).poll_read(cx, &mut buffer));
        assert!(sent <= WINDOW);
    };
    assert!(failed.error().to_string().contains("overran its credit"));
    let frames = std::iter::from_fn(|| next(&host));
    assert!(frames.count() <= 1, "one frame says all that is owed");
}

/// A wrong EXIT is an error, not an exit code.
#[test]
fn an_exit_that_comes_too_early_is_not_believed() {
    let host = Shared::new(Side::Host);
    let end = host.lock().deliver(Frame::Exit(0));
    assert_eq!(
        end.unwrap().error().to_string(),
        "protocol error: unexpected EXIT frame"
    );
    assert_eq!(host.lock().exit, None);
}

/// Reading into no space says nothing about the stream's end.
#[test]
fn an_empty_read_does_not_wait() {
    let host = Shared::new(Side::Host);
    let mut reader = StreamReader::new(&host, Stream::Output);
    let mut buffer = ReadBuf::new(&mut []);
    assert!(poll(|cx| Pin::new(&mut reader).poll_read(cx, &mut buffer)).is_some());
}
