// SPDX-License-Identifier: Apache-2.0
//! The system calls that have no safe wrapper. All of the crate's `unsafe`.
#![allow(unsafe_code, reason = "an ioctl without a safe wrapper")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

nix::ioctl_write_ptr_bad!(
    /// linux/if_tun.h
    tun_set_iff,
    0x4004_54ca,
    libc::ifreq
);

/// Makes the tap `name` in the calling thread's network namespace, with the
/// header that lets the guest offload checksums and segmentation.
pub(crate) fn make_tap(name: &str) -> io::Result<OwnedFd> {
    let tun: File = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: `ifreq` is plain data for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(flags).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the ioctl reads and writes one `ifreq`, which outlives the call.
    unsafe { tun_set_iff(tun.as_raw_fd(), &raw const request) }?;
    Ok(tun.into())
}
