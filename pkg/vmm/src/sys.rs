// SPDX-License-Identifier: Apache-2.0
//! The system calls that have no safe wrapper. All of the crate's `unsafe`.
#![allow(unsafe_code, reason = "calls without safe wrappers")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use kvm_ioctls::{Kvm, VcpuExit};
use tokio::io::unix::AsyncFd;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap};

nix::ioctl_write_ptr!(
    /// linux/vhost.h
    vhost_vsock_set_guest_cid,
    0xAF,
    0x60,
    u64
);

/// A descriptor that was inherited under a number agreed upon.
pub(crate) fn inherited(fd: RawFd) -> OwnedFd {
    // SAFETY: a helper calls this once per number that its parent mapped for
    // it, before anything else could open or own a descriptor of that number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A descriptor that tells when it is readable.
pub(crate) fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` always refers to the same descriptor, which stays
    // open while the `AsyncFd` owns it.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

/// Closes every descriptor from `first` on.
pub(crate) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: called in a helper that owns no descriptor above its list.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Copies the calling process, as `fork` does, but as another child of its
/// parent. True in the copy, which is the first process of a PID namespace that
/// the caller has made.
pub(crate) fn fork_for_parent() -> io::Result<bool> {
    let flags = libc::c_long::from(libc::CLONE_PARENT | libc::SIGCHLD);
    // SAFETY: called in a helper that has one thread, so the copy has no lock
    // that nobody releases; without a stack of its own it goes on here, in a copy
    // of the memory. The zeros are what the kernel takes on every architecture.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(pid == 0)
}

/// Gives the vhost device `device` the guest context id `cid`.
pub(crate) fn set_guest_cid(device: &File, cid: u64) -> io::Result<()> {
    // SAFETY: the ioctl reads one u64, which outlives the call.
    unsafe { vhost_vsock_set_guest_cid(device.as_raw_fd(), &raw const cid) }?;
    Ok(())
}

/// Runs a virtual machine whose only instruction halts it.
pub(crate) fn run_halting_vm() -> io::Result<()> {
    const HLT: u8 = 0xf4;
    const AT: u64 = 0x1000;
    let fail = |error: kvm_ioctls::Error| io::Error::from_raw_os_error(error.errno());
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(AT), 0x1000)])
        .map_err(io::Error::other)?;
    vm_memory::Bytes::write_obj(&memory, HLT, GuestAddress(AT)).map_err(io::Error::other)?;
    let host = memory
        .get_host_address(GuestAddress(AT))
        .map_err(io::Error::other)?;
    let vm = Kvm::new()
        .and_then(|kvm| kvm.create_vm())
        .map_err(|error| io::Error::other(format!("/dev/kvm: {}", fail(error))))?;
    let region = kvm_bindings::kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: AT,
        memory_size: 0x1000,
        userspace_addr: host as u64,
    };
    // SAFETY: the region is mapped for as long as `memory`, which outlives the VM.
    unsafe { vm.set_user_memory_region(region) }.map_err(fail)?;
    let mut vcpu = vm.create_vcpu(0).map_err(fail)?;
    let mut sregs = vcpu.get_sregs().map_err(fail)?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).map_err(fail)?;
    let mut regs = vcpu.get_regs().map_err(fail)?;
    (regs.rip, regs.rflags) = (AT, 2);
    vcpu.set_regs(&regs).map_err(fail)?;
    match vcpu.run().map_err(fail)? {
        VcpuExit::Hlt => Ok(()),
        other => Err(io::Error::other(format!("unexpected exit {other:?}"))),
    }
}
