// SPDX-License-Identifier: Apache-2.0
//! The only owner of connections to a guest.
//!
//! A [`VsockTransport`] owns one descriptor and a [`Lease`] on the VM behind it,
//! so neither can go while async code still uses the other. Nothing else in
//! podhull opens, duplicates or closes such a descriptor, and none leaves this
//! crate as a number.
//!
//! Invariants: descriptors are closed once, by `OwnedFd`; a view that is still
//! in use keeps its descriptor open, so its number cannot be reused under it;
//! closing is explicit and reports, dropping is a safety net that is counted.
//!
//! This crate must not know gRPC, ttrpc, VMMs or containers.
//!
//! Reading order: [`lease`], [`transport`], [`dial`], [`listener`],
//! [`handshake`], [`session`].

mod conn;
pub mod dial;
pub mod error;
pub mod handshake;
pub mod lease;
pub mod listener;
pub mod metrics;
pub mod report;
pub mod session;
mod sync;
pub mod transport;

pub use dial::{GuestAddress, dial_host};
pub use error::{SessionError, TransportError};
pub use handshake::{GuestTimes, announce, welcome};
pub use lease::{Closing, HeldLease, Holder, HolderKind, Lease, LeaseSet};
pub use listener::VsockListener;
pub use report::{CloseReport, Outcome};
pub use session::{
    GuestSession, HostSession, IncomingSession, RelayReport, SessionHandle, SessionTarget,
    StreamReader, StreamWriter, open_session, receive_session, reset,
};
pub use transport::{Peer, TransportIo, VsockTransport};
