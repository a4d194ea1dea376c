// SPDX-License-Identifier: Apache-2.0
//! What can go wrong with a connection to a guest.

use std::io;

use podhull_types::{Cid, Elapsed, IdError, VsockPort};

use crate::lease::Closing;

/// A connection could not be made, accepted or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The VM is being stopped.
    #[error(transparent)]
    Closing(#[from] Closing),
    /// The transport's one view is taken already.
    #[error("transport is in use")]
    InUse,
    /// Connecting to a port of the guest failed.
    #[error("connect to guest port {port}")]
    Dial {
        /// The port.
        port: VsockPort,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The VMM's socket answered CONNECT with something else than OK.
    #[error("guest port {port} does not answer: {answer:?}")]
    Refused {
        /// The port.
        port: VsockPort,
        /// What came instead of OK; empty if the connection was closed.
        answer: String,
    },
    /// A listener could not be made.
    #[error("listen for the guest at {at}")]
    Listen {
        /// Path or port.
        at: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A connection came from another VM than the listener serves.
    #[error("connection from cid {cid}, expected {expected}")]
    WrongPeer {
        /// Who connected.
        cid: Cid,
        /// Who may.
        expected: Cid,
    },
    /// The guest's first bytes are not those of this version's agent.
    #[error("handshake: the guest's agent is not podhull's, or another version")]
    ForeignAgent,
    /// The host's are not those of this version's host.
    #[error("handshake: the host does not speak podhull's protocol")]
    ForeignHost,
    /// The deadline passed.
    #[error("{what}: deadline passed")]
    Deadline {
        /// What was waited for.
        what: &'static str,
        /// Marks the cause for callers that look for it.
        #[source]
        source: Elapsed,
    },
    /// Reading or writing failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl TransportError {
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    pub(crate) fn deadline(what: &'static str) -> impl FnOnce(Elapsed) -> Self {
        move |source| Self::Deadline { what, source }
    }
}

/// A session could not be opened, or ended otherwise than it should.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The peer refused it and said why. A guest is not to be trusted: its words
    /// are quoted, so that they cannot forge a line of the log.
    #[error("session refused: {reason:?}")]
    Refused {
        /// The peer's words.
        reason: String,
    },
    /// The peer's token is not ours.
    #[error("wrong token")]
    WrongToken,
    /// The peer broke the protocol.
    #[error("protocol error: {0}")]
    Protocol(ProtocolError),
    /// The connection ended without CLOSE.
    #[error("connection lost: {0}")]
    Lost(String),
    /// The session was closed by one of the two sides before the answer came.
    #[error("session is closed")]
    Closed,
    /// The deadline passed.
    #[error("{0}: deadline passed")]
    Deadline(&'static str),
}

/// How the peer broke the session protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// The frame's kind is not known.
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    /// The frame's stream is not one this side reads or writes.
    #[error("no stream {0} in this direction")]
    UnknownStream(u8),
    /// The frame is longer than its kind may be.
    #[error("frame of {length} bytes, at most {limit} are allowed")]
    TooLong {
        /// What the header says.
        length: u32,
        /// What is allowed.
        limit: u32,
    },
    /// The header's reserved bytes are in use: a version that this one is not.
    #[error("reserved bytes {0:02x?} in a frame's header")]
    Reserved([u8; 2]),
    /// The frame's payload is too short or malformed.
    #[error("malformed {0} frame")]
    Malformed(&'static str),
    /// The frame may not come now.
    #[error("unexpected {0} frame")]
    Unexpected(&'static str),
    /// More data than the receiver allowed.
    #[error("stream {stream} overran its credit by {by} bytes")]
    CreditOverrun {
        /// The stream.
        stream: u8,
        /// By how much.
        by: usize,
    },
    /// More credit than a window.
    #[error("credit for stream {stream} exceeds the window")]
    CreditOverflow {
        /// The stream.
        stream: u8,
    },
    /// Another protocol version.
    #[error("protocol version {theirs}, expected {ours}")]
    Version {
        /// The peer's.
        theirs: u16,
        /// This side's.
        ours: u16,
    },
    /// The frame names no valid process.
    #[error(transparent)]
    Id(#[from] IdError),
}

impl From<ProtocolError> for SessionError {
    fn from(error: ProtocolError) -> Self {
        Self::Protocol(error)
    }
}
