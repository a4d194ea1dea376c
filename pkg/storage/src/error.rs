// SPDX-License-Identifier: Apache-2.0
//! Why something cannot be put into a shared tree, or taken out.

use std::io;
use std::path::PathBuf;

/// A mount or file of a shared tree.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// A volume's source cannot be used.
    #[error("bind source {}: {source}", path.display())]
    Source {
        /// The source on the host.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A mount, file or folder of the tree.
    #[error("{what} {}: {source}", path.display())]
    Path {
        /// What was being done.
        what: &'static str,
        /// With which path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A container came without a root filesystem.
    #[error("rootfs: the snapshotter gave no mounts")]
    NoRootfs,
}

impl StorageError {
    pub(crate) fn path<E: Into<io::Error>>(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| Self::Path {
            what,
            path,
            source: source.into(),
        }
    }
}
