// SPDX-License-Identifier: Apache-2.0
//! Sessions: one connection per exec, attach or forwarded port, whose bytes,
//! ends, errors and exit code travel as frames.
//!
//! Each stream has credit of its own, so one that nobody reads never holds up
//! another. The ends of streams are frames because half-close does not survive
//! most vsock backends. `frame` is the wire format, `state` what both ends agree
//! on, `engine` the two tasks, `handle` who owns them and the transport,
//! `stream` what users read and write, `open` how a session begins, `relay` a
//! session that carries a TCP connection.

mod buffer;
mod engine;
pub(crate) mod frame;
#[cfg(test)]
mod frame_tests;
mod handle;
mod locked;
mod open;
#[cfg(test)]
mod peer_tests;
mod relay;
pub(crate) mod state;
#[cfg(test)]
mod state_tests;
mod stream;
#[cfg(test)]
mod stream_tests;

pub use handle::SessionHandle;
pub use open::{IncomingSession, SessionTarget, open_session, receive_session};
pub use relay::{RelayReport, reset};
pub use stream::{StreamReader, StreamWriter};

/// The host's end of a session.
#[derive(Debug)]
pub struct HostSession {
    /// What the guest's process or server reads.
    pub input: StreamWriter,
    /// What it writes: stdout, or the server's answer.
    pub output: StreamReader,
    /// Its stderr.
    pub error: StreamReader,
    /// The session itself.
    pub handle: SessionHandle,
}

/// The guest's end of a session.
#[derive(Debug)]
pub struct GuestSession {
    /// What the host sends.
    pub input: StreamReader,
    /// Goes to the host: stdout, or the server's answer.
    pub output: StreamWriter,
    /// Goes to the host: stderr.
    pub error: StreamWriter,
    /// The session itself.
    pub handle: SessionHandle,
}
