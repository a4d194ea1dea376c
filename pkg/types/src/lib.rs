// SPDX-License-Identifier: Apache-2.0
//! Values that every podhull crate speaks of. No I/O, no state.
//!
//! Reading order: [`id`], [`exit`], [`port`], [`token`], [`deadline`], [`phase`],
//! [`mod@chain`], [`accept`], [`userns`].

pub mod accept;
pub mod chain;
pub mod deadline;
pub mod exit;
pub mod id;
pub mod phase;
pub mod port;
pub mod token;
pub mod userns;

pub use accept::accept_again;
pub use chain::chain;
pub use deadline::{Deadline, Elapsed};
pub use exit::ExitStatus;
pub use id::{ContainerId, ExecId, IdError, ProcessRef, SandboxId};
pub use phase::{BootPhase, BootTimes};
pub use port::{Cid, VsockPort};
pub use token::Token;
pub use userns::{IdMapping, MappingError, UserNamespace};
