// SPDX-License-Identifier: Apache-2.0
//! The guest agent: PID 1 of a pod's microVM.
//!
//! It sets up the guest, tells the host that it is ready, and then serves the
//! control channel and one session per process. Containers are made by
//! [`oci`] helpers: re-executions of the agent's own program with one thread,
//! because namespaces cannot safely be entered from a process with many.
//!
//! Invariants: one place reaps children ([`reaper`]); a PID is signalled only
//! while it is known not to be reaped; every process's exit is told once.
//!
//! This crate must not know anything of the host's side.
//!
//! Reading order: [`agent`], [`init`], [`server`], `pod`, [`containers`],
//! [`process`], [`stdio`], [`oci`].

pub mod agent;
pub mod cgroup;
pub mod containers;
pub mod error;
pub mod events;
pub mod helper;
pub mod init;
pub mod network;
pub mod oci;
mod pod;
pub mod process;
pub mod reaper;
pub mod server;
pub mod sessions;
pub mod status;
pub mod stdio;
mod sys;
pub mod tally;

pub use agent::run;
pub use error::GuestError;
