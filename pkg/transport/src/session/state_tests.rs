// SPDX-License-Identifier: Apache-2.0
//! Two ends of a session by random steps, and one end against a peer that says
//! whatever it likes.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::pin::{Pin, pin};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, Waker};

use bytes::BytesMut;
use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::frame::{Frame, HEADER, MAX_DATA, Stream, WINDOW};
use super::frame_tests::any_frame;
use super::state::{End, Shared, Side};
use super::stream::{StreamReader, StreamWriter};
use crate::error::SessionError;

#[derive(Debug, Clone, Copy)]
enum Step {
    Write(Stream, usize),
    /// As a relay does; this many frames are delivered to the sender while it
    /// reads what it is to send.
    SendFrom(Stream, usize, usize),
    Read(Stream, usize),
    /// As a relay does.
    Take(Stream),
    Shutdown(Stream),
    DropWriter(Stream),
    DropReader(Stream),
    /// Carries this many frames out of an end's queues.
    Send(Side, usize),
    /// Delivers this many frames to an end.
    Deliver(Side, usize),
    Exit(u8),
}

fn any_stream() -> impl Strategy<Value = Stream> {
    prop::sample::select(Stream::ALL.to_vec())
}

fn any_step() -> impl Strategy<Value = Step> {
    let side = || prop::sample::select(vec![Side::Host, Side::Guest]);
    // As much as fits one frame, and more than a window.
    let size = || prop_oneof![1usize..200, 1..3 * MAX_DATA, Just(WINDOW), Just(2 * WINDOW)];
    prop_oneof![
        8 => (any_stream(), size()).prop_map(|(stream, size)| Step::Write(stream, size)),
        8 => (any_stream(), size(), 0usize..4)
            .prop_map(|(stream, size, meanwhile)| Step::SendFrom(stream, size, meanwhile)),
        8 => (any_stream(), size()).prop_map(|(stream, size)| Step::Read(stream, size)),
        8 => any_stream().prop_map(Step::Take),
        8 => (side(), 1usize..40).prop_map(|(side, count)| Step::Send(side, count)),
        8 => (side(), 1usize..40).prop_map(|(side, count)| Step::Deliver(side, count)),
        1 => any_stream().prop_map(Step::Shutdown),
        1 => any_stream().prop_map(Step::DropWriter),
        1 => any_stream().prop_map(Step::DropReader),
        1 => any::<u8>().prop_map(Step::Exit),
    ]
}

/// How a stream ended for its reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Open,
    Eof,
    Failed(ErrorKind),
}

/// One stream with both its users. The bytes sent are a running pattern.
#[derive(Debug)]
struct Flow {
    writer: Option<StreamWriter>,
    reader: Option<StreamReader>,
    written: usize,
    read: usize,
    shut: bool,
    seen: Seen,
}

/// After so many bytes the pattern begins again.
const PERIOD: usize = 251 * 256;

/// What a flow carries from any byte on, up to a frame of it: compared as a whole,
/// which is what Miri can do in time.
fn expected(from: usize, size: usize) -> &'static [u8] {
    static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let byte = |at| u8::try_from((at + at / 251) % 256).unwrap();
        (0..PERIOD + MAX_DATA).map(byte).collect()
    });
    &PATTERN[from % PERIOD..][..size]
}

/// What a relay reads from; `meanwhile` happens first.
pub(super) struct Source<'a, F> {
    pub(super) bytes: &'a [u8],
    pub(super) meanwhile: Option<F>,
}

impl<F: FnOnce() + Unpin> AsyncRead for Source<'_, F> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(meanwhile) = self.meanwhile.take() {
            meanwhile();
        }
        let count = self.bytes.len().min(buf.remaining());
        buf.put_slice(&self.bytes[..count]);
        Poll::Ready(Ok(()))
    }
}

/// No more than one frame is taken at a time.
fn pattern(from: usize, size: usize) -> &'static [u8] {
    expected(from, size.min(MAX_DATA))
}

pub(super) fn poll<T>(poll: impl FnOnce(&mut Context<'_>) -> Poll<T>) -> Option<T> {
    match poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

impl Flow {
    /// Writes what is taken at once; true if anything was.
    fn write(&mut self, size: usize) -> bool {
        let Some(writer) = self.writer.as_mut() else {
            return false;
        };
        let bytes = pattern(self.written, size);
        let taken = poll(|cx| Pin::new(writer).poll_write(cx, bytes));
        self.wrote(taken)
    }

    /// The same without a copy in between.
    fn send_from(&mut self, size: usize, meanwhile: impl FnOnce() + Unpin) -> bool {
        let Some(writer) = self.writer.as_mut() else {
            return false;
        };
        let mut source = Source {
            bytes: pattern(self.written, size),
            meanwhile: Some(meanwhile),
        };
        let taken = poll(|cx| pin!(writer.send_from(&mut source)).poll(cx));
        self.wrote(taken)
    }

    fn wrote(&mut self, taken: Option<io::Result<usize>>) -> bool {
        match taken {
            Some(Ok(count)) => {
                self.written += count;
                true
            }
            Some(Err(error)) => {
                assert_eq!(error.kind(), ErrorKind::BrokenPipe);
                false
            }
            None => false,
        }
    }

    /// Reads what is there; true if anything was.
    fn read(&mut self, size: usize) -> bool {
        let Some(reader) = self.reader.as_mut().filter(|_| self.seen == Seen::Open) else {
            return false;
        };
        let mut space = vec![0; size];
        let mut buffer = ReadBuf::new(&mut space);
        let taken = poll(|cx| Pin::new(reader).poll_read(cx, &mut buffer));
        let filled = buffer.filled();
        let piece = taken.map(|taken| taken.map(|()| (!filled.is_empty()).then_some(filled)));
        self.received(piece)
    }

    /// The same without a copy.
    fn take(&mut self) -> bool {
        let Some(reader) = self.reader.as_mut().filter(|_| self.seen == Seen::Open) else {
            return false;
        };
        let piece = poll(|cx| pin!(reader.chunk()).poll(cx));
        self.received(piece)
    }

    fn received(&mut self, piece: Option<io::Result<Option<impl AsRef<[u8]>>>>) -> bool {
        match piece {
            None => return false,
            Some(Err(error)) => self.seen = Seen::Failed(error.kind()),
            Some(Ok(None)) => self.seen = Seen::Eof,
            Some(Ok(Some(bytes))) => {
                for received in bytes.as_ref().chunks(MAX_DATA) {
                    let expected = expected(self.read, received.len());
                    assert!(received == expected, "lost or out of order");
                    self.read += received.len();
                }
            }
        }
        true
    }

    fn shutdown(&mut self) {
        if let Some(writer) = self.writer.as_mut() {
            // Pending while something is queued, an error if its reader is gone.
            let said = poll(|cx| Pin::new(writer).poll_shutdown(cx));
            if let Some(Err(error)) = said {
                assert_eq!(error.kind(), ErrorKind::BrokenPipe);
            }
            self.shut = true;
        }
    }
}

struct Session {
    ends: [Arc<Shared>; 2],
    /// Frames on their way to each end.
    wire: [VecDeque<Frame>; 2],
    flows: [Flow; 3],
    exit: Option<u8>,
}

impl Session {
    fn new() -> Self {
        let [host, guest] = [Shared::new(Side::Host), Shared::new(Side::Guest)];
        let flows = Stream::ALL.map(|stream| {
            let (from, to) = match stream {
                Stream::Input => (&host, &guest),
                Stream::Output | Stream::Error => (&guest, &host),
            };
            Flow {
                writer: Some(StreamWriter::new(from, stream)),
                reader: Some(StreamReader::new(to, stream)),
                written: 0,
                read: 0,
                shut: false,
                seen: Seen::Open,
            }
        });
        Self {
            ends: [host, guest],
            wire: Default::default(),
            flows,
            exit: None,
        }
    }

    fn end(&self, side: Side) -> &Arc<Shared> {
        &self.ends[side as usize]
    }

    fn send(&mut self, side: Side, most: usize) -> bool {
        let mut moved = false;
        for _ in 0..most {
            let Some(frame) = next(self.end(side)) else {
                break;
            };
            self.wire[1 - side as usize].push_back(frame);
            moved = true;
        }
        moved
    }

    fn deliver(&mut self, side: Side, most: usize) -> bool {
        deliver(
            &self.ends[side as usize],
            &mut self.wire[side as usize],
            most,
        )
    }

    /// Of what arrives meanwhile a part is credit, an end or a stop.
    fn send_from(&mut self, stream: Stream, size: usize, meanwhile: usize) {
        let side = match stream {
            Stream::Input => Side::Host,
            Stream::Output | Stream::Error => Side::Guest,
        };
        let (end, wire) = (&self.ends[side as usize], &mut self.wire[side as usize]);
        let arrive = || {
            deliver(end, wire, meanwhile);
        };
        self.flows[stream as usize].send_from(size, arrive);
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Write(stream, size) => drop(self.flows[stream as usize].write(size)),
            Step::SendFrom(stream, size, meanwhile) => self.send_from(stream, size, meanwhile),
            Step::Read(stream, size) => drop(self.flows[stream as usize].read(size)),
            Step::Take(stream) => drop(self.flows[stream as usize].take()),
            Step::Shutdown(stream) => self.flows[stream as usize].shutdown(),
            Step::DropWriter(stream) => self.flows[stream as usize].writer = None,
            Step::DropReader(stream) => self.flows[stream as usize].reader = None,
            Step::Send(side, count) => drop(self.send(side, count)),
            Step::Deliver(side, count) => drop(self.deliver(side, count)),
            Step::Exit(code) => {
                if self.exit.is_none() {
                    self.exit = Some(code);
                    self.end(Side::Guest).lock().send_exit(code);
                }
            }
        }
        self.check_bounds();
    }

    fn check_bounds(&self) {
        for end in &self.ends {
            check_bounds(end);
        }
    }

    /// Lets everybody do what they can until nobody can do more.
    fn settle(&mut self) {
        loop {
            let mut moved = false;
            for side in [Side::Host, Side::Guest] {
                moved |= self.send(side, usize::MAX);
                moved |= self.deliver(side, usize::MAX);
            }
            for flow in &mut self.flows {
                moved |= flow.read(WINDOW);
            }
            self.check_bounds();
            if !moved {
                return;
            }
        }
    }
}

/// The next frame of an end, which has been handed to the connection then.
pub(super) fn next(end: &Shared) -> Option<Frame> {
    let frame = poll(|cx| end.poll_frame(cx))??;
    if let Some(stream) = frame.data_of {
        end.lock().written(stream);
    }
    let mut bytes = BytesMut::from(&frame.bytes[..]);
    Some(Frame::decode(&mut bytes).unwrap().unwrap())
}

fn deliver(end: &Shared, wire: &mut VecDeque<Frame>, most: usize) -> bool {
    let mut moved = false;
    for frame in wire.drain(..most.min(wire.len())) {
        let end = end.lock().deliver(frame);
        assert!(!matches!(end, Some(End::Failed(_))), "{end:?}");
        moved = true;
    }
    moved
}

fn check_bounds(end: &Shared) {
    let mut state = end.lock();
    for stream in Stream::ALL {
        if let Some(incoming) = state.incoming(stream) {
            assert!(incoming.buffer.len() <= WINDOW);
        }
        if let Some(outgoing) = state.outgoing(stream) {
            assert!(outgoing.credit <= WINDOW);
            assert!(outgoing.queue.len() <= 4);
            assert!(outgoing.unwritten >= outgoing.queue.len());
            assert!(
                outgoing
                    .queue
                    .iter()
                    .all(|it| it.len() <= HEADER + MAX_DATA)
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever two ends of ours do, neither breaks the other's rules, no byte
    /// is lost or moved, and everything ends.
    #[test]
    fn two_honest_ends_lose_nothing_and_end(steps in prop::collection::vec(any_step(), 1..120)) {
        let mut session = Session::new();
        for step in steps {
            session.take(step);
        }
        // What a user still wants to say is said, however much it is.
        for index in 0..3 {
            for _ in 0..WINDOW / MAX_DATA + 2 {
                let flow = &mut session.flows[index];
                if flow.shut || flow.writer.is_none() || !flow.write(WINDOW) {
                    break;
                }
                session.settle();
            }
            session.flows[index].shutdown();
        }
        session.settle();
        for flow in &session.flows {
            if flow.reader.is_none() {
                continue;
            }
            prop_assert_eq!(flow.read, flow.written, "every byte arrives");
            let expected = if flow.shut { Seen::Eof } else { Seen::Failed(ErrorKind::ConnectionAborted) };
            prop_assert_eq!(flow.seen, expected);
        }
        // The exit code comes after all ends.
        prop_assert_eq!(session.end(Side::Host).lock().exit, session.exit);
        session.end(Side::Host).lock().want_close();
        session.settle();
        let end = session.end(Side::Guest).lock().end.clone();
        prop_assert!(matches!(end, Some(End::Closed)));
    }

    /// A peer that says anything gets a named error, makes nothing grow and
    /// wakes nothing that panics.
    #[test]
    fn a_dishonest_peer_gets_a_named_error(
        host in any::<bool>(),
        script in prop::collection::vec((any_frame(), any_step()), 1..200),
    ) {
        let side = if host { Side::Host } else { Side::Guest };
        let mut session = Session::new();
        let mut first: Option<String> = None;
        for (frame, step) in script {
            let end = session.end(side).lock().deliver(frame);
            match &end {
                Some(End::Failed(SessionError::Protocol(error))) => {
                    let text = error.to_string();
                    prop_assert_eq!(first.get_or_insert(text.clone()), &text, "the first reason stays");
                }
                Some(End::Failed(other)) => prop_assert!(false, "{other:?}"),
                Some(End::Closed) | None => {}
            }
            // Its user goes on; what it sends is not carried to the other end.
            match step {
                Step::Write(..) | Step::Shutdown(_) | Step::DropWriter(_) | Step::DropReader(_) => {
                    session.take(step);
                }
                Step::SendFrom(stream, size, _) => {
                    session.flows[stream as usize].send_from(size, || {});
                }
                Step::Send(..) => {
                    session.send(side, 3);
                }
                Step::Read(stream, size) => {
                    // The pattern is not the peer's.
                    if let Some(reader) = session.flows[stream as usize].reader.as_mut() {
                        let mut space = vec![0; size];
                        let mut buffer = ReadBuf::new(&mut space);
                        drop(poll(|cx| Pin::new(reader).poll_read(cx, &mut buffer)));
                    }
                }
                Step::Take(stream) => {
                    if let Some(reader) = session.flows[stream as usize].reader.as_mut() {
                        drop(poll(|cx| pin!(reader.chunk()).poll(cx)));
                    }
                }
                Step::Deliver(..) | Step::Exit(_) => {}
            }
            check_bounds(session.end(side));
        }
    }
}
