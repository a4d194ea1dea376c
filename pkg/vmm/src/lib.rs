// SPDX-License-Identifier: Apache-2.0
//! One microVM: QEMU and its helpers as confined, supervised children.
//!
//! [`launch`] starts the vsock device, the file server and QEMU, each through a
//! re-execution of our own program ([`helper`]) that confines itself before it
//! becomes the child. What it returns is a [`Vm`]: whoever holds one can ask
//! how the VM is and end it, and needs not know which VMM it is.
//!
//! Invariants: a child dies with the shim (parent-death signal from a thread
//! that lives as long as the process) and with each other; it is signalled
//! through a pidfd only; it inherits the descriptors that it was given and no
//! others; the VM is stopped after its leases, and says who still held one.
//!
//! This crate must not know gRPC, containers, or where taps and trees come from.
//!
//! Reading order: [`config`], [`vm`], `launch`, `qemu`, `vsock`, `child`,
//! [`helper`].

pub mod accel;
pub mod cgroup;
mod child;
pub mod config;
mod console;
pub mod error;
pub mod helper;
mod image;
mod launch;
mod qemu;
mod sys;
pub mod vm;
mod vsock;

pub use accel::{AccelPolicy, Acceleration, probe_acceleration};
pub use cgroup::CgroupPlacement;
pub use config::{Programs, SHARE_TAG, VmConfig, VmNetwork, VmUser};
pub use error::VmmError;
pub use helper::helper_main;
pub use launch::{Launched, launch, sweep};
pub use vm::{StopReport, Vm, VmDeath};
