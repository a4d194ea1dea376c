// SPDX-License-Identifier: Apache-2.0
//! What podhull's suites stand on: a test node, images, a CRI client, and the
//! leak oracle.
//!
//! Owns: the namespaces a suite runs in, the containerd it runs against, and
//! the answer to "is anything left?". Must not know: podhull's crates. The
//! suites see the product as containerd and a node's root see it.
//!
//! Invariants: nothing outside the node's own folder, cgroups and namespaces
//! is changed; when the program ends, however it ends, all of it is gone.
//!
//! Reading order: `namespaces`, `node`, `programs`, `image`, `containerd`,
//! `cri`, `oracle`, `pod_processes`, `pod_netns`, `context_id`, `evidence`.

pub mod containerd;
pub mod context_id;
pub mod cri;
pub mod evidence;
pub mod image;
pub mod namespaces;
pub mod node;
pub mod oracle;
pub mod pod_netns;
pub mod pod_processes;
pub mod programs;
mod sys;

pub use containerd::{Containerd, Release};
pub use node::Node;
