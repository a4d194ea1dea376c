// SPDX-License-Identifier: Apache-2.0
//! What can be put into a shared tree.

use std::path::PathBuf;

use podhull_types::UserNamespace;

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
    /// Owners that the container sees instead of the files'.
    pub ids: Option<MappedIds>,
}

/// A volume's owners, shown as those of a user namespace: what belongs to root on
/// its file system belongs to that namespace's root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappedIds {
    /// What is mapped.
    pub users: UserNamespace,
    /// Also in what is mounted below the volume.
    pub recursive: bool,
}

/// Whether mounts that the host makes below a volume later are seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// They are not.
    Private,
    /// They are.
    HostToContainer,
}
