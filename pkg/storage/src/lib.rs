// SPDX-License-Identifier: Apache-2.0
//! The tree that a pod shares with its guest: root filesystems and volumes.
//!
//! [`SharedTree`] is a folder that the file server serves. Everything in it is
//! a mount point, or a file that this crate wrote; what is mounted later is
//! seen by the server, because the tree is a shared mount.
//!
//! Invariants: nothing is ever removed recursively, so that nothing of a
//! volume can be; a mount is undone by a name below the tree, without following
//! links; what is not ours stays and is reported.
//!
//! Reading order: [`tree`], [`volume`], `mounts`, `idmap`.

pub mod error;
mod idmap;
mod mounts;
mod sys;
mod table;
pub mod tree;
pub mod volume;

pub use error::StorageError;
pub use sys::can_map_ids;
pub use tree::{GuestPath, RemoveReport, SharedTree, sweep};
pub use volume::{MappedIds, Propagation, RootfsMount, Volume};
