// SPDX-License-Identifier: Apache-2.0
//! What can be put into a shared tree.

use std::path::PathBuf;

/// One of a snapshotter's mounts (containerd's `api/types/mount.proto`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RootfsMount {
    /// Filesystem type, `overlay` or `bind` for example.
    pub fstype: String,
    /// What is mounted.
    pub source: String,
    /// Options as `mount -o` takes them.
    pub options: Vec<String>,
}

/// A file or folder of the host that a container sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// The file or folder.
    pub source: PathBuf,
    /// With what is mounted below it.
    pub recursive: bool,
    /// The guest cannot write to it.
    pub read_only: bool,
    /// Nor to what is mounted below it.
    pub recursive_read_only: bool,
    /// Whether later mounts of the host appear.
    pub propagation: Propagation,
}

/// Whether mounts that the host makes below a volume later are seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// They are not.
    Private,
    /// They are.
    HostToContainer,
}
