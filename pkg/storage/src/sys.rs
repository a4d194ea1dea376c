// SPDX-License-Identifier: Apache-2.0
//! The system calls that have no safe wrapper. All of the crate's `unsafe`.
#![allow(unsafe_code, reason = "calls without safe wrappers")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::process::Pid;

/// Shows the owners of a mount that is nowhere yet as those of the namespace
/// `users`, with what is mounted below it if `recursive`.
pub(crate) fn map_ids(
    mount: BorrowedFd<'_>,
    users: BorrowedFd<'_>,
    read_only: bool,
    recursive: bool,
) -> io::Result<()> {
    let number = u64::try_from(users.as_raw_fd()).map_err(io::Error::other)?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP
            | if read_only {
                libc::MOUNT_ATTR_RDONLY
            } else {
                0
            },
        attr_clr: 0,
        propagation: 0,
        userns_fd: number,
    };
    let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: both descriptors are open, the path is an empty string, and the
    // kernel reads no more than the one structure, which outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether the host's kernel has user namespaces and mounts that show other owners.
#[must_use]
pub fn can_map_ids() -> bool {
    // SAFETY: with a size of 0 the kernel reads nothing and says EINVAL; one
    // without idmapped mounts, which came with this call, says ENOSYS.
    let result = unsafe {
        let nothing = std::ptr::null::<libc::mount_attr>();
        libc::syscall(libc::SYS_mount_setattr, -1, c"".as_ptr(), 0, nothing, 0)
    };
    let known = result == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOSYS);
    known && std::path::Path::new("/proc/self/ns/user").exists()
}

/// A process that does nothing, in a user namespace of its own.
pub(crate) fn process_in_user_namespace() -> io::Result<Pid> {
    // With the same table of descriptors: a copy would keep open what is closed here.
    let flags = libc::c_long::from(libc::CLONE_NEWUSER | libc::CLONE_FILES | libc::SIGCHLD);
    // SAFETY: without a stack of its own the copy goes on here, in a copy of the
    // memory, where it makes system calls only: no lock that another thread holds
    // is ever asked for. The zeros are what the kernel takes on every architecture.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if pid == 0 {
        // SAFETY: neither call touches memory, and this process never goes on.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            loop {
                libc::pause();
            }
        }
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.ok_or_else(|| io::Error::other("a process without a number"))
}
