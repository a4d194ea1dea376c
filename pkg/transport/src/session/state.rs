// SPDX-License-Identifier: Apache-2.0
//! The state that a session's two tasks share with its streams. It knows no
//! connection: frames go in and come out.
//!
//! A queue holds only what the peer has given credit for, so flushing never
//! depends on the peer's users, and every buffer is bounded by [`WINDOW`]. What
//! is owed to the peer is kept as flags and sums, so a peer that takes nothing
//! makes nothing grow.

use std::collections::VecDeque;
use std::sync::PoisonError;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;

use super::buffer::Buffer;
use super::frame::{Frame, Stream, WINDOW};
use super::locked::Locked;
use crate::error::{ProtocolError, SessionError};
use crate::sync::{Arc, Mutex};

/// Credit is given back in pieces of at least this size.
const CREDIT_PIECE: usize = WINDOW / 4;

/// Which end of a session this is; it decides the streams' directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Host,
    Guest,
}

impl Side {
    fn sends(self, stream: Stream) -> bool {
        (self == Self::Host) == (stream == Stream::Input)
    }
}

/// How far the end of an outgoing stream has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    Open,
    /// EOF or ABORT is to be sent after what is queued.
    Eof,
    Abort,
    Sent,
}

#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) credit: usize,
    pub(crate) queue: VecDeque<Bytes>,
    /// Frames that were queued and not handed to the connection yet; it stays
    /// above zero once some never will be.
    pub(crate) unwritten: usize,
    pub(crate) ending: Ending,
    /// The peer does not read any more.
    pub(crate) stopped: bool,
    pub(crate) waker: Option<Waker>,
}

impl Outgoing {
    /// Gives who is to be woken.
    fn stop(&mut self) -> Option<Waker> {
        self.stopped = true;
        self.queue.clear();
        self.waker.take()
    }
}

#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) buffer: Buffer,
    /// How much more the peer may send.
    window: usize,
    /// Read by the user, not yet given back to the peer as credit.
    unreported: usize,
    pub(crate) eof: bool,
    pub(crate) aborted: bool,
    /// Nobody reads here any more.
    dropped: bool,
    /// The peer is to be told that.
    stop_to_send: bool,
    pub(crate) waker: Option<Waker>,
}

impl Incoming {
    fn ended(&self) -> bool {
        self.eof || self.aborted
    }

    fn credit_due(&self) -> bool {
        !self.ended() && !self.dropped && self.unreported >= CREDIT_PIECE
    }

    /// What the peer has to be told about the stream. The window grows only with
    /// the frame that says so: a peer that does not read cannot send on.
    fn owed(&mut self, stream: Stream) -> Option<Frame> {
        if std::mem::take(&mut self.stop_to_send) {
            return Some(Frame::Stop(stream));
        }
        if !self.credit_due() {
            return None;
        }
        let bytes = std::mem::take(&mut self.unreported);
        self.window += bytes;
        Some(Frame::Credit(stream, bytes))
    }
}

/// A frame on its way out.
#[derive(Debug)]
pub(crate) struct Outbound {
    pub(crate) bytes: Bytes,
    /// The stream whose data it carries.
    pub(crate) data_of: Option<Stream>,
}

impl From<Frame> for Outbound {
    fn from(frame: Frame) -> Self {
        Self {
            bytes: frame.encode(),
            data_of: None,
        }
    }
}

/// Why a session is over.
#[derive(Debug, Clone)]
pub(crate) enum End {
    Closed,
    Failed(SessionError),
}

impl End {
    pub(crate) fn error(&self) -> SessionError {
        match self {
            Self::Closed => SessionError::Closed,
            Self::Failed(error) => error.clone(),
        }
    }
}

#[derive(Debug)]
pub(crate) struct State {
    side: Side,
    outgoing: [Option<Outgoing>; 3],
    incoming: [Option<Incoming>; 3],
    /// Where the next round over the outgoing streams begins.
    turn: usize,
    exit_to_send: Option<u8>,
    pub(super) exit: Option<u8>,
    close_wanted: bool,
    pub(super) close_sent: bool,
    pub(crate) end: Option<End>,
    /// The task that writes frames, when there is nothing to write.
    writer: Option<Waker>,
    /// Who waits for the exit code or the session's end.
    watchers: Vec<Waker>,
    /// Who is woken once the lock is free: it may want that at once.
    pub(super) woken: Vec<Waker>,
}

impl State {
    pub(crate) fn outgoing(&mut self, stream: Stream) -> Option<&mut Outgoing> {
        self.outgoing[stream as usize].as_mut()
    }

    pub(crate) fn incoming(&mut self, stream: Stream) -> Option<&mut Incoming> {
        self.incoming[stream as usize].as_mut()
    }

    /// Gives `read` bytes back to the peer; small amounts are saved up.
    pub(crate) fn return_credit(&mut self, stream: Stream, read: usize) {
        if let Some(incoming) = self.incoming(stream) {
            incoming.unreported += read;
            if incoming.credit_due() {
                self.wake_writer();
            }
        }
    }

    /// Stops an incoming stream because its reader is gone.
    pub(crate) fn stop_reading(&mut self, stream: Stream) {
        if let Some(incoming) = self.incoming(stream) {
            incoming.dropped = true;
            incoming.buffer = Buffer::default();
            if !incoming.ended() {
                incoming.stop_to_send = true;
                self.wake_writer();
            }
        }
    }

    /// Ends an outgoing stream; the first ending stays.
    pub(crate) fn end_writing(&mut self, stream: Stream, ending: Ending) {
        if let Some(outgoing) = self.outgoing(stream)
            && outgoing.ending == Ending::Open
        {
            outgoing.ending = ending;
            self.wake_writer();
        }
    }

    /// Fails what is written from now on: the peer takes nothing any more.
    pub(crate) fn stop_writing(&mut self) {
        let outgoing = self.outgoing.iter_mut().flatten();
        self.woken.extend(outgoing.filter_map(Outgoing::stop));
    }

    /// A frame with data of `stream` has been handed to the connection.
    pub(crate) fn written(&mut self, stream: Stream) {
        if let Some(outgoing) = self.outgoing(stream) {
            outgoing.unwritten -= 1;
            if outgoing.unwritten == 0 {
                let flushes = outgoing.waker.take();
                self.woken.extend(flushes);
            }
        }
    }

    /// The peer has said that it takes nothing more: by CLOSE, or by EXIT, a
    /// guest's last word.
    pub(crate) fn peer_is_done(&self) -> bool {
        self.exit.is_some() || matches!(self.end, Some(End::Closed))
    }

    /// Sends `code` once every outgoing stream has ended.
    pub(crate) fn send_exit(&mut self, code: u8) {
        self.exit_to_send = Some(code);
        self.wake_writer();
    }

    /// Sends CLOSE after what is queued.
    pub(crate) fn want_close(&mut self) {
        self.close_wanted = true;
        self.wake_writer();
    }

    /// There may be something to write.
    pub(crate) fn wake_writer(&mut self) {
        self.woken.extend(self.writer.take());
    }

    /// The next frame to be written, or `None` if there is nothing to write now.
    fn next_frame(&mut self) -> Option<Outbound> {
        if self.close_sent {
            return None;
        }
        for stream in Stream::ALL {
            if let Some(frame) = self.incoming(stream).and_then(|it| it.owed(stream)) {
                return Some(frame.into());
            }
        }
        for step in 0..Stream::ALL.len() {
            let index = (self.turn + step) % Stream::ALL.len();
            let stream = Stream::ALL[index];
            let Some(outgoing) = self.outgoing[index].as_mut() else {
                continue;
            };
            if let Some(bytes) = outgoing.queue.pop_front() {
                self.turn = index + 1;
                self.woken.extend(outgoing.waker.take());
                let data_of = Some(stream);
                return Some(Outbound { bytes, data_of });
            }
            let last = match outgoing.ending {
                Ending::Open | Ending::Sent => continue,
                Ending::Eof => Frame::Eof(stream),
                Ending::Abort => Frame::Abort(stream),
            };
            outgoing.ending = Ending::Sent;
            return Some(last.into());
        }
        if self.all_sent()
            && let Some(code) = self.exit_to_send.take()
        {
            return Some(Frame::Exit(code).into());
        }
        if self.close_wanted && !matches!(self.end, Some(End::Failed(_))) {
            self.close_sent = true;
            return Some(Frame::Close.into());
        }
        None
    }

    fn all_sent(&self) -> bool {
        self.outgoing
            .iter()
            .flatten()
            .all(|outgoing| outgoing.ending == Ending::Sent)
    }

    /// Takes a frame of the peer. Returns why the session is over, if it is.
    pub(crate) fn deliver(&mut self, frame: Frame) -> Option<End> {
        if self.end.is_none()
            && let Err(error) = self.receive(frame)
        {
            self.finish(End::Failed(error.into()));
        }
        self.end.clone()
    }

    fn receive(&mut self, frame: Frame) -> Result<(), ProtocolError> {
        let name = frame.name();
        match frame {
            Frame::Data(stream, bytes) => {
                let incoming = self.open_incoming(stream, name)?;
                if let Some(by) = bytes.len().checked_sub(incoming.window + 1) {
                    let stream = stream as u8;
                    return Err(ProtocolError::CreditOverrun { stream, by: by + 1 });
                }
                incoming.window -= bytes.len();
                if !incoming.dropped {
                    incoming.buffer.push(bytes);
                    let reads = incoming.waker.take();
                    self.woken.extend(reads);
                }
            }
            Frame::Eof(stream) => {
                let incoming = self.open_incoming(stream, name)?;
                incoming.eof = true;
                let reads = incoming.waker.take();
                self.woken.extend(reads);
            }
            Frame::Abort(stream) => {
                let incoming = self.open_incoming(stream, name)?;
                incoming.aborted = true;
                let reads = incoming.waker.take();
                self.woken.extend(reads);
            }
            Frame::Credit(stream, bytes) => {
                let outgoing = self
                    .outgoing(stream)
                    .ok_or(ProtocolError::UnknownStream(stream as u8))?;
                if bytes > WINDOW - outgoing.credit {
                    return Err(ProtocolError::CreditOverflow {
                        stream: stream as u8,
                    });
                }
                outgoing.credit += bytes;
                let writes = outgoing.waker.take();
                self.woken.extend(writes);
            }
            Frame::Stop(stream) => {
                let outgoing = self
                    .outgoing(stream)
                    .ok_or(ProtocolError::UnknownStream(stream as u8))?;
                let writes = outgoing.stop();
                self.woken.extend(writes);
            }
            Frame::Exit(code) => {
                let may_come = self.side == Side::Host && self.exit.is_none();
                if !may_come || !self.incoming.iter().flatten().all(Incoming::ended) {
                    return Err(ProtocolError::Unexpected(name));
                }
                self.exit = Some(code);
                self.wake_watchers();
            }
            Frame::Close => self.finish(End::Closed),
            Frame::Hello(_) | Frame::Accept | Frame::Refuse(_) => {
                return Err(ProtocolError::Unexpected(name));
            }
        }
        Ok(())
    }

    fn open_incoming(
        &mut self,
        stream: Stream,
        name: &'static str,
    ) -> Result<&mut Incoming, ProtocolError> {
        let incoming = self
            .incoming(stream)
            .ok_or(ProtocolError::UnknownStream(stream as u8))?;
        if incoming.ended() {
            return Err(ProtocolError::Unexpected(name));
        }
        Ok(incoming)
    }

    /// Ends the session; the first reason stays.
    pub(crate) fn finish(&mut self, end: End) {
        self.end.get_or_insert(end);
        self.wake_writer();
        self.wake_watchers();
        let incoming = self.incoming.iter_mut().flatten();
        self.woken.extend(incoming.filter_map(|it| it.waker.take()));
        let outgoing = self.outgoing.iter_mut().flatten();
        self.woken.extend(outgoing.filter_map(|it| it.waker.take()));
    }

    fn wake_watchers(&mut self) {
        self.woken.append(&mut self.watchers);
    }
}

#[derive(Debug)]
pub(crate) struct Shared(Mutex<State>);

impl Shared {
    pub(crate) fn new(side: Side) -> Arc<Self> {
        let outgoing = Stream::ALL.map(|stream| {
            side.sends(stream).then(|| Outgoing {
                credit: WINDOW,
                queue: VecDeque::new(),
                unwritten: 0,
                ending: Ending::Open,
                stopped: false,
                waker: None,
            })
        });
        let incoming = Stream::ALL.map(|stream| {
            (!side.sends(stream)).then(|| Incoming {
                buffer: Buffer::default(),
                window: WINDOW,
                unreported: 0,
                eof: false,
                aborted: false,
                dropped: false,
                stop_to_send: false,
                waker: None,
            })
        });
        Arc::new(Self(Mutex::new(State {
            side,
            outgoing,
            incoming,
            turn: 0,
            exit_to_send: None,
            exit: None,
            close_wanted: false,
            close_sent: false,
            end: None,
            writer: None,
            watchers: Vec::new(),
            woken: Vec::new(),
        })))
    }

    pub(crate) fn lock(&self) -> Locked<'_> {
        // No statement under this lock can panic half-way through a change.
        Locked::new(self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The next frame to be written; `None` when there will be no more.
    pub(crate) fn poll_frame(&self, cx: &Context<'_>) -> Poll<Option<Outbound>> {
        let mut state = self.lock();
        match state.next_frame() {
            None if !state.close_sent && state.end.is_none() => {
                state.writer = Some(cx.waker().clone());
                Poll::Pending
            }
            last => Poll::Ready(last),
        }
    }

    /// Ready once `look` finds something; it is asked again when the exit code
    /// came and when the session ended.
    pub(crate) fn poll_for<T>(
        &self,
        cx: &Context<'_>,
        look: impl FnOnce(&State) -> Option<T>,
    ) -> Poll<T> {
        let mut state = self.lock();
        if let Some(found) = look(&state) {
            return Poll::Ready(found);
        }
        let waker = cx.waker();
        if !state.watchers.iter().any(|old| old.will_wake(waker)) {
            state.watchers.push(waker.clone());
        }
        Poll::Pending
    }
}
