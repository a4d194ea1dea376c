// SPDX-License-Identifier: Apache-2.0
//! The life of one pod sandbox: boot, containers, exec processes, teardown.
//!
//! A [`Sandbox`] owns everything its pod needs on the host: network, shared
//! tree, VMM and helpers, the channel to the agent, and one session per process.
//! Whatever way it ends, [`teardown`] runs the same steps in the same order.
//!
//! This crate must not know ttrpc, containerd's messages, or which VMM it runs.
//!
//! Reading order: [`spec`], [`sandbox`], `boot`, `container`, `exec`, `calls`,
//! `stdio`, `forward`, `watch`, [`teardown`], [`mod@cleanup`].

mod blocking;
mod boot;
mod calls;
pub mod cleanup;
mod container;
pub mod error;
mod exec;
pub mod fields;
#[cfg(test)]
mod fixture;
mod forward;
mod gauges;
mod guest_counts;
mod pids;
mod process;
pub mod rundir;
pub mod sandbox;
pub mod spec;
mod stdio;
pub mod teardown;
mod translate;
pub mod users;
mod watch;

pub use cleanup::cleanup;
pub use error::{ErrorKind, SandboxError};
pub use podhull_api::agent::StatsResponse as ContainerStats;
pub use podhull_storage::{RootfsMount, can_map_ids};
pub use rundir::RunDir;
pub use sandbox::Sandbox;
pub use spec::{
    ContainerSpec, Deleted, EventSink, PodFiles, ProcessState, Runtime, SandboxEvent, SandboxSpec,
    Status, Stdio,
};
pub use translate::OCI_FIELDS;
