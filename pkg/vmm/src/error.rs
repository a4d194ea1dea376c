// SPDX-License-Identifier: Apache-2.0
//! Why a VM cannot be started or swept.

use std::io;
use std::path::PathBuf;

use podhull_transport::TransportError;

/// A VM cannot be started, or what it left cannot be removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// KVM does not work and emulation is not allowed.
    #[error(
        "KVM cannot be used: {0}; emulation is not an isolation boundary and is off (allow_emulation)"
    )]
    NoKvm(String),
    /// A file of the product is missing or is not what it should be.
    #[error("{what} {}: {reason}", path.display())]
    Unusable {
        /// The setting that names it.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The node has not enough memory.
    #[error(
        "no memory for the VM: it needs {needed_mib} MiB and the node has {available_mib} MiB available"
    )]
    NoMemory {
        /// What the VM needs.
        needed_mib: u64,
        /// What the kernel says is available.
        available_mib: u64,
    },
    /// A file or folder of the VM.
    #[error("{what} {}", path.display())]
    File {
        /// What was being done.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A step of the start failed.
    #[error("{what}")]
    System {
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A child ended during the start.
    #[error("{name} ended at start ({status}): {said}")]
    ChildDied {
        /// Which.
        name: &'static str,
        /// How.
        status: String,
        /// Its last words.
        said: String,
    },
    /// A child did not become ready.
    #[error("{name} did not become ready in time: {said}")]
    ChildSlow {
        /// Which.
        name: &'static str,
        /// Its last words.
        said: String,
    },
    /// The host's listener for the guest's READY.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

impl VmmError {
    pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System {
            what,
            source: source.into(),
        }
    }

    pub(crate) fn file<E: Into<io::Error>>(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| Self::File {
            what,
            path,
            source: source.into(),
        }
    }
}
