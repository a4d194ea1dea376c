// SPDX-License-Identifier: Apache-2.0
//! The control channel to one guest agent.
//!
//! [`wait_for_agent`] returns the channel and its transport as one value, so
//! nobody can keep one without the other. Closing shuts gRPC down first and
//! then closes the transport, whatever became of the first step.
//!
//! This crate is given transports; it must not know how they are made (no VMM)
//! nor what is asked of the agent (no containers).
//!
//! Reading order: [`channel`], [`mod@line`], [`ready`], [`error`].

pub mod channel;
pub mod error;
mod executor;
pub mod line;
pub mod ready;

pub use channel::{AgentChannel, Client};
pub use error::{AgentError, RpcKind, words};
pub use ready::{Connected, wait_for_agent};
