// SPDX-License-Identifier: Apache-2.0
//! The system calls that have no safe wrapper. All of the crate's `unsafe`.
#![allow(unsafe_code, reason = "fork, and calls without safe wrappers")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::unistd::{ForkResult, Pid};

fn check(result: i64) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Runs `child` in a new process and returns its PID to the parent.
///
/// The child never returns into the caller's code: it exits with what `child`
/// says.
pub(crate) fn fork(child: impl FnOnce() -> i32) -> io::Result<Pid> {
    // SAFETY: only helpers call this, and a helper has one thread (see
    // `oci::main`), so no lock can be held by a thread that is not copied.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let code = child();
            // SAFETY: `_exit` ends the process without running the parent's
            // exit handlers; it does not return.
            unsafe { libc::_exit(code) }
        }
    }
}

/// Makes the process not dumpable: neither traced nor read by others.
pub(crate) fn set_not_dumpable() -> io::Result<()> {
    // SAFETY: PR_SET_DUMPABLE takes an integer and touches no memory.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }.into())
}

/// Keeps the permitted capabilities over a change of user.
pub(crate) fn set_keep_capabilities(keep: bool) -> io::Result<()> {
    let keep = libc::c_ulong::from(keep);
    // SAFETY: PR_SET_KEEPCAPS takes an integer and touches no memory.
    check(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, keep, 0, 0, 0) }.into())
}

/// Makes the terminal at standard input the controlling one of this session.
pub(crate) fn take_controlling_terminal() -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer; descriptor 0 is open.
    check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }.into())
}

/// Takes ownership of the descriptor that the agent passed as `number`.
pub(crate) fn inherited(number: i32) -> OwnedFd {
    // SAFETY: the agent opened this number for this helper (see `helper`), and
    // each number is taken once, at the start of the helper's main.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Gives SIGPIPE its default effect back. Rust's runtime ignores it, and what is
/// ignored stays so over execve: a container's `yes | head` would not end.
pub(crate) fn default_broken_pipe() -> io::Result<()> {
    // SAFETY: no handler is installed; the default one runs no code of ours.
    let before = unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    if before == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sends a signal by its number, real-time ones too.
pub(crate) fn kill_raw(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: `kill` takes integers and touches no memory.
    check(unsafe { libc::kill(pid.as_raw(), signal) }.into())
}

/// Holds a process: what is done with the descriptor is done to it or, once it
/// has been reaped, to nobody.
pub(crate) fn hold(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(
        pid,
        rustix::process::PidfdFlags::empty(),
    )?)
}

/// Sends a signal by its number, real-time ones too, to a held process.
pub(crate) fn signal_held(process: &OwnedFd, signal: i32) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the descriptor is open, and without siginfo_t the call takes
    // integers only and touches no memory.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal,
            none,
            0,
        )
    })
}

/// Installs a seccomp filter as a privileged process does, leaving no_new_privs
/// as it is.
pub(crate) fn seccomp_without_no_new_privs(program: &[seccompiler::sock_filter]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let filter = libc::sock_fprog {
        len: length,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: `filter` points at `length` instructions that live until the call
    // returns, and the kernel only reads them; both instruction types are the
    // kernel's `struct sock_filter`.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const filter,
        )
    })
}
