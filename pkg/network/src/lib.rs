// SPDX-License-Identifier: Apache-2.0
//! A pod's network on the host: what the CNI made, handed to a VM.
//!
//! In the pod's network namespace a tap is tied to the CNI's interface, both
//! ways, below the namespace's own stack; the guest gets the interface's
//! hardware address, addresses, routes and neighbours, and so is the pod. What
//! the host connects to the namespace's loopback is taken by a listener.
//!
//! Invariants: the tap goes with its last descriptor; nothing outside the pod's
//! namespace is touched; no thread of the runtime ever changes its namespace.
//!
//! Reading order: [`pod`], `inside`, `wire`, `read`, [`loopback`], `redirect`.

pub mod error;
mod inside;
pub mod loopback;
#[cfg(test)]
#[path = "../tests/shared/netns.rs"]
mod netns;
pub mod pod;
mod read;
mod redirect;
mod sys;
mod wire;

pub use error::NetworkError;
pub use loopback::LoopbackListener;
pub use pod::{PodNetwork, sweep};
pub use read::{GuestNetwork, Interface, Neighbour, Route};
