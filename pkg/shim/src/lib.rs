// SPDX-License-Identifier: Apache-2.0
//! containerd's contract with a shim: how it is started and found, the Task and
//! Sandbox services, and the events it publishes.
//!
//! One process serves one pod. `start` makes it, or finds the one of the pod
//! that a container belongs to; `delete` releases what a shim left that died.
//! Requests are decoded here, handed to [`podhull_sandbox`], and its errors
//! become status codes in one place, `status`.
//!
//! This crate must not know transports, the agent, or which VMM there is, and it
//! writes nothing to standard output: what containerd reads is returned.
//!
//! Reading order: [`args`], [`bootstrap`], [`server`], `shim`, `task_service`,
//! `sandbox_service`, `streaming`, `bundle`, `address`, `cri`, `publisher`, `status`.

mod address;
pub mod args;
pub mod bootstrap;
mod bundle;
mod called;
mod connections;
mod cri;
mod cri_fields;
pub mod delete;
mod error;
#[cfg(test)]
mod fixture;
mod identity;
pub mod info;
mod metrics;
mod publisher;
mod sandbox_service;
pub mod server;
mod shim;
mod stats;
mod status;
mod streaming;
mod task_service;
mod wire;

/// What this process runs, for those that it starts itself: itself, also once
/// another version has taken its file's place.
const SELF: &str = "/proc/self/exe";

pub use args::{Action, Args};
pub use error::ShimError;
