// SPDX-License-Identifier: Apache-2.0
//! The system call that has no safe wrapper. All of the crate's `unsafe`.
#![allow(unsafe_code, reason = "a call without a safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

nix::ioctl_write_ptr!(
    /// linux/vhost.h
    vhost_vsock_set_guest_cid,
    0xAF,
    0x60,
    u64
);

/// Gives the vhost device `device` the guest context id `cid`.
pub(crate) fn set_guest_cid(device: &File, cid: u64) -> io::Result<()> {
    // SAFETY: the ioctl reads one u64, which outlives the call.
    unsafe { vhost_vsock_set_guest_cid(device.as_raw_fd(), &raw const cid) }?;
    Ok(())
}
