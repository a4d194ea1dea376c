// SPDX-License-Identifier: Apache-2.0
//! The two tasks of a session and the state that they share with its streams.
//!
//! The reader task fills the incoming streams' buffers, the writer task empties
//! the queues. A queue holds only what the peer has given credit for, so
//! flushing never depends on the peer's users, and every buffer is bounded by
//! [`WINDOW`].

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::Notify;

use super::frame::{Frame, HEADER, MAX_DATA, Stream, WINDOW};
use crate::error::{ProtocolError, SessionError};
use crate::metrics;
use crate::transport::TransportIo;

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
    pub(crate) ending: Ending,
    /// The peer does not read any more.
    pub(crate) stopped: bool,
    pub(crate) waker: Option<Waker>,
}

#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) buffer: BytesMut,
    /// How much more the peer may send.
    window: usize,
    /// Read by the user, not yet given back to the peer as credit.
    unreported: usize,
    pub(crate) eof: bool,
    pub(crate) aborted: bool,
    /// Nobody reads here any more.
    dropped: bool,
    pub(crate) waker: Option<Waker>,
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
    control: VecDeque<Frame>,
    /// Where the next round over the outgoing streams begins.
    turn: usize,
    pub(super) exit_to_send: Option<u8>,
    pub(super) exit: Option<u8>,
    pub(super) close_wanted: bool,
    close_sent: bool,
    pub(crate) end: Option<End>,
}

impl State {
    pub(crate) fn outgoing(&mut self, stream: Stream) -> Option<&mut Outgoing> {
        self.outgoing[stream as usize].as_mut()
    }

    pub(crate) fn incoming(&mut self, stream: Stream) -> Option<&mut Incoming> {
        self.incoming[stream as usize].as_mut()
    }

    /// Gives `read` bytes back to the peer; small amounts are saved up. True if
    /// a frame was queued.
    pub(crate) fn return_credit(&mut self, stream: Stream, read: usize) -> bool {
        let Some(incoming) = self.incoming(stream) else {
            return false;
        };
        incoming.unreported += read;
        if incoming.eof || incoming.unreported < WINDOW / 4 {
            return false;
        }
        let bytes = std::mem::take(&mut incoming.unreported);
        incoming.window += bytes;
        self.control.push_back(Frame::Credit(stream, bytes));
        true
    }

    /// Stops an incoming stream because its reader is gone. True if a frame was
    /// queued.
    pub(crate) fn stop_reading(&mut self, stream: Stream) -> bool {
        let Some(incoming) = self.incoming(stream) else {
            return false;
        };
        incoming.dropped = true;
        incoming.buffer = BytesMut::new();
        if incoming.eof || incoming.aborted {
            return false;
        }
        self.control.push_back(Frame::Stop(stream));
        true
    }

    /// The next frame to be written, or `None` if there is nothing to write now.
    fn next_frame(&mut self) -> Option<Bytes> {
        if let Some(frame) = self.control.pop_front() {
            return Some(frame.encode());
        }
        for step in 0..Stream::ALL.len() {
            let index = (self.turn + step) % Stream::ALL.len();
            let stream = Stream::ALL[index];
            let Some(outgoing) = self.outgoing[index].as_mut() else {
                continue;
            };
            if let Some(frame) = outgoing.queue.pop_front() {
                self.turn = index + 1;
                if let Some(waker) = outgoing.waker.take() {
                    waker.wake();
                }
                return Some(frame);
            }
            let last = match outgoing.ending {
                Ending::Open | Ending::Sent => continue,
                Ending::Eof => Frame::Eof(stream),
                Ending::Abort => Frame::Abort(stream),
            };
            outgoing.ending = Ending::Sent;
            return Some(last.encode());
        }
        if self.all_sent()
            && let Some(code) = self.exit_to_send.take()
        {
            return Some(Frame::Exit(code).encode());
        }
        if self.close_wanted && !self.close_sent {
            self.close_sent = true;
            return Some(Frame::Close.encode());
        }
        None
    }

    fn all_sent(&self) -> bool {
        self.outgoing
            .iter()
            .flatten()
            .all(|outgoing| outgoing.ending == Ending::Sent)
    }

    /// Takes a frame of the peer.
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
                    incoming.buffer.extend_from_slice(&bytes);
                    wake(&mut incoming.waker);
                }
            }
            Frame::Eof(stream) => {
                let incoming = self.open_incoming(stream, name)?;
                incoming.eof = true;
                wake(&mut incoming.waker);
            }
            Frame::Abort(stream) => {
                let incoming = self.open_incoming(stream, name)?;
                incoming.aborted = true;
                wake(&mut incoming.waker);
            }
            Frame::Credit(stream, bytes) => {
                let outgoing = self
                    .outgoing(stream)
                    .ok_or(ProtocolError::UnknownStream(stream as u8))?;
                outgoing.credit += bytes;
                if outgoing.credit > WINDOW {
                    return Err(ProtocolError::CreditOverflow {
                        stream: stream as u8,
                    });
                }
                wake(&mut outgoing.waker);
            }
            Frame::Stop(stream) => {
                let outgoing = self
                    .outgoing(stream)
                    .ok_or(ProtocolError::UnknownStream(stream as u8))?;
                outgoing.stopped = true;
                outgoing.queue.clear();
                wake(&mut outgoing.waker);
            }
            Frame::Exit(code) => {
                let first = self.side == Side::Host && self.exit.replace(code).is_none();
                let ended = |incoming: &Incoming| incoming.eof || incoming.aborted;
                if !first || !self.incoming.iter().flatten().all(ended) {
                    return Err(ProtocolError::Unexpected(name));
                }
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
        if incoming.eof || incoming.aborted {
            return Err(ProtocolError::Unexpected(name));
        }
        Ok(incoming)
    }

    /// Ends the session; the first reason stays.
    fn finish(&mut self, end: End) {
        self.end.get_or_insert(end);
        for incoming in self.incoming.iter_mut().flatten() {
            wake(&mut incoming.waker);
        }
        for outgoing in self.outgoing.iter_mut().flatten() {
            wake(&mut outgoing.waker);
        }
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

#[derive(Debug)]
pub(crate) struct Shared {
    state: Mutex<State>,
    /// There may be something to write.
    pub(crate) to_write: Notify,
    /// The exit code came, or the session ended.
    changed: Notify,
}

impl Shared {
    pub(crate) fn new(side: Side) -> Arc<Self> {
        let outgoing = Stream::ALL.map(|stream| {
            side.sends(stream).then(|| Outgoing {
                credit: WINDOW,
                queue: VecDeque::new(),
                ending: Ending::Open,
                stopped: false,
                waker: None,
            })
        });
        let incoming = Stream::ALL.map(|stream| {
            (!side.sends(stream)).then(|| Incoming {
                buffer: BytesMut::new(),
                window: WINDOW,
                unreported: 0,
                eof: false,
                aborted: false,
                dropped: false,
                waker: None,
            })
        });
        Arc::new(Self {
            state: Mutex::new(State {
                side,
                outgoing,
                incoming,
                control: VecDeque::new(),
                turn: 0,
                exit_to_send: None,
                exit: None,
                close_wanted: false,
                close_sent: false,
                end: None,
            }),
            to_write: Notify::new(),
            changed: Notify::new(),
        })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // No statement under this lock can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn finish(&self, end: End) {
        self.lock().finish(end);
        self.changed.notify_waiters();
        self.to_write.notify_one();
    }

    pub(super) async fn wait_for<T>(&self, mut look: impl FnMut(&mut State) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(found) = look(&mut self.lock()) {
                return found;
            }
            changed.await;
        }
    }
}

/// Reads frames until the connection or the session ends.
pub(super) async fn read_frames(
    mut io: ReadHalf<TransportIo>,
    mut buffer: BytesMut,
    shared: Arc<Shared>,
) {
    let end = loop {
        match Frame::decode(&mut buffer) {
            Ok(Some(frame)) => {
                let (result, ended) = {
                    let mut state = shared.lock();
                    (state.receive(frame), state.end.clone())
                };
                shared.changed.notify_waiters();
                match (result, ended) {
                    (Err(error), _) => break protocol_error(error),
                    (Ok(()), Some(end)) => break end,
                    (Ok(()), None) => continue,
                }
            }
            Ok(None) => {}
            Err(error) => break protocol_error(error),
        }
        buffer.reserve(HEADER + MAX_DATA);
        match io.read_buf(&mut buffer).await {
            Ok(0) => break End::Failed(SessionError::Lost("ended without CLOSE".into())),
            Ok(_) => {}
            Err(error) => break End::Failed(SessionError::Lost(error.to_string())),
        }
    };
    shared.finish(end);
}

fn protocol_error(error: ProtocolError) -> End {
    metrics::PROTOCOL_ERRORS.inc();
    tracing::warn!(%error, "session ended: the peer broke the protocol");
    End::Failed(error.into())
}

/// Writes frames until CLOSE is written or the session has ended.
pub(super) async fn write_frames(mut io: WriteHalf<TransportIo>, shared: Arc<Shared>) {
    loop {
        let (frame, over) = {
            let mut state = shared.lock();
            let frame = state.next_frame();
            let over = state.close_sent || state.end.is_some();
            (frame, over)
        };
        match frame {
            Some(frame) => {
                if let Err(error) = io.write_all(&frame).await {
                    shared.finish(End::Failed(SessionError::Lost(error.to_string())));
                    return;
                }
            }
            None if over => return,
            None => shared.to_write.notified().await,
        }
    }
}
