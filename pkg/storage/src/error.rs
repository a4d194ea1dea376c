// SPDX-License-Identifier: Apache-2.0
//! Why something cannot be put into a shared tree, or taken out.

use std::io;
use std::path::PathBuf;

use podhull_types::ContainerId;

/// A mount or file of a shared tree.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// A volume's source cannot be used.
    #[error("bind source {}", path.display())]
    Source {
        /// The source on the host.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A mount, file or folder of the tree.
    #[error("{what} {}", path.display())]
    Path {
        /// What was being done.
        what: &'static str,
        /// With which path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A mount came after the end of its container.
    #[error("container {0} was removed meanwhile")]
    Removed(ContainerId),
    /// A mount that is to show other owners cannot.
    #[error("{}: its file system cannot show other owners (no idmapped mount)", path.display())]
    Owners {
        /// What is mounted.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The snapshotter's options for other owners cannot be used.
    #[error("rootfs: {0}")]
    RootfsOwners(String),
    /// A container came without a root filesystem.
    #[error("rootfs: the snapshotter gave no mounts")]
    NoRootfs,
}

impl StorageError {
    /// Whether what was asked for cannot be had: everything else is the node's
    /// trouble, and may be gone at the next try.
    #[must_use]
    pub fn is_of_the_request(&self) -> bool {
        match self {
            Self::NoRootfs | Self::RootfsOwners(_) | Self::Owners { .. } => true,
            Self::Source { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::NotADirectory
                    | io::ErrorKind::IsADirectory
                    | io::ErrorKind::InvalidInput
            ),
            Self::Path { .. } | Self::Removed(_) => false,
        }
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_source_is_of_the_request_and_trouble_is_not() {
        let of = |kind: io::ErrorKind| StorageError::Source {
            path: "/volume".into(),
            source: kind.into(),
        };
        assert!(of(io::ErrorKind::NotFound).is_of_the_request());
        assert!(StorageError::NoRootfs.is_of_the_request());
        assert!(!of(io::ErrorKind::StaleNetworkFileHandle).is_of_the_request());
        let full = StorageError::path("make", "/share")(io::Error::from_raw_os_error(28));
        assert!(!full.is_of_the_request());
    }
}
