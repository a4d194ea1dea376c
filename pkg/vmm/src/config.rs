// SPDX-License-Identifier: Apache-2.0
//! What a VM is made from.

use std::hash::{Hash, Hasher};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::accel::Acceleration;
use crate::cgroup::CgroupPlacement;

/// Tag under which the guest mounts the shared tree.
pub const SHARE_TAG: &str = "podhull";

/// A VM to be launched.
#[derive(Debug)]
pub struct VmConfig {
    /// Name for logs.
    pub name: String,
    /// Folder for its sockets; made and removed by this crate.
    pub run_dir: PathBuf,
    /// Guest kernel: ELF with a PVH entry, or bzImage.
    pub kernel: PathBuf,
    /// Guest initramfs.
    pub initramfs: PathBuf,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// vCPUs.
    pub vcpus: u32,
    /// Its network device; `None` for a VM without network.
    pub network: Option<VmNetwork>,
    /// The host's folder that the guest mounts as [`SHARE_TAG`].
    pub share: PathBuf,
    /// The guest's containers have a user namespace: a user other than root may be
    /// their root.
    pub mapped_users: bool,
    /// Whether it may be emulated.
    pub acceleration: Acceleration,
    /// Where its processes are accounted.
    pub cgroup: CgroupPlacement,
    /// The programs.
    pub programs: Programs,
    /// From which users it gets one; `None` runs it as root without capabilities.
    pub user: Option<VmUser>,
    /// Bytes of the guest's console that are kept.
    pub console_bytes: usize,
}

/// Programs that a VM needs.
#[derive(Debug, Clone)]
pub struct Programs {
    /// QEMU.
    pub qemu: PathBuf,
    /// The vhost-user vsock daemon, for hosts without /dev/vhost-vsock.
    pub vsock_daemon: PathBuf,
    /// Our own program, which dispatches to [`helper_main`](crate::helper_main).
    pub helper: PathBuf,
}

/// A network device.
#[derive(Debug)]
pub struct VmNetwork {
    /// The tap, opened with `IFF_VNET_HDR`.
    pub tap: OwnedFd,
    /// The address that the guest's device has.
    pub mac: [u8; 6],
}

/// A range of 2^28 user and group ids, one of which each VM gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmUser {
    /// The first id.
    pub first: u32,
}

impl VmUser {
    const COUNT: u64 = 1 << 28;

    /// The id of the VM in `run_dir`. Two VMs of a node with 250 pods have the
    /// same id with a chance of one in 8,000; they are then kept apart by their
    /// roots and namespaces alone.
    #[must_use]
    pub fn of(self, run_dir: &Path) -> u32 {
        let mut hash = std::collections::hash_map::DefaultHasher::new();
        run_dir.hash(&mut hash);
        let offset = u32::try_from(hash.finish() % Self::COUNT).unwrap_or_default();
        self.first.saturating_add(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_stay_in_their_range_and_differ() {
        let user = VmUser { first: 0x7000_0000 };
        let a = user.of(Path::new("/run/podhull/a"));
        let b = user.of(Path::new("/run/podhull/b"));
        assert_ne!(a, b);
        assert!((0x7000_0000..0x8000_0000).contains(&a));
        assert_eq!(a, user.of(Path::new("/run/podhull/a")));
    }
}
