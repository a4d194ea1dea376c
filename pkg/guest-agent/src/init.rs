// SPDX-License-Identifier: Apache-2.0
//! What a Linux system needs before it can run containers.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use podhull_types::VsockPort;

use crate::error::GuestError;
use crate::sys;

/// The agent's program, for re-execution.
pub const SELF: &str = "/proc/self/exe";
/// Folder of everything the agent makes at run time.
pub const RUN: &str = "/run/podhull";
/// Where the shared tree is mounted.
pub const SHARE: &str = "/run/podhull/share";
/// The pod's shared memory.
pub const SHM: &str = "/run/podhull/shm";
const NEW_ROOT: &str = "/newroot";
/// Kernel modules in the initramfs.
const MODULES: &str = "/modules";

fn mounted(
    what: &str,
    at: &str,
    kind: &str,
    flags: MsFlags,
    options: Option<&str>,
) -> Result<(), GuestError> {
    mount(Some(what), at, Some(kind), flags, options)
        .map_err(|errno| GuestError::file("mount", at)(errno.into()))
}

fn folder(path: &str, mode: u32) -> Result<(), GuestError> {
    fs::create_dir_all(path).map_err(GuestError::file("make folder", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(GuestError::file("set the mode of", path))
}

/// Leaves the initramfs, which no container could pivot away from, for a tmpfs.
///
/// The agent's program stays reachable: it is copied.
fn leave_initramfs() -> Result<(), GuestError> {
    folder(NEW_ROOT, 0o755)?;
    mounted(
        "root",
        NEW_ROOT,
        "tmpfs",
        MsFlags::empty(),
        Some("mode=0755"),
    )?;
    let program = format!("{NEW_ROOT}/init");
    fs::copy("/init", &program).map_err(GuestError::file("copy the agent to", &program))?;
    std::env::set_current_dir(NEW_ROOT).map_err(GuestError::file("enter", NEW_ROOT))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(|errno| GuestError::file("move the root to", "/")(errno.into()))?;
    nix::unistd::chroot(".").map_err(GuestError::system("change root"))?;
    std::env::set_current_dir("/").map_err(GuestError::file("enter", "/"))
}

/// Loads the modules that the initramfs brings, in the order of their names: a
/// distribution's kernel has its drivers there, ours has none.
fn load_modules() -> Result<(), GuestError> {
    let entries = match fs::read_dir(MODULES) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(GuestError::file("read folder", MODULES))?,
    };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let file = fs::File::open(&path).map_err(GuestError::file("open module", &path))?;
        match finit_module(file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(errno) => return Err(GuestError::file("load module", &path)(errno.into())),
        }
    }
    Ok(())
}

/// Mounts what the kernel offers and makes the agent hard to disturb.
pub(crate) fn set_up() -> Result<(), GuestError> {
    load_modules()?;
    leave_initramfs()?;
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    for path in ["/proc", "/sys", "/dev", "/run", "/tmp"] {
        folder(path, 0o755)?;
    }
    mounted("proc", "/proc", "proc", safe, None)?;
    mounted("sysfs", "/sys", "sysfs", safe, None)?;
    mounted(
        "dev",
        "/dev",
        "devtmpfs",
        MsFlags::MS_NOSUID,
        Some("mode=0755"),
    )?;
    mounted(
        "run",
        "/run",
        "tmpfs",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=0755"),
    )?;
    for path in ["/dev/pts", "/dev/mqueue", RUN, SHARE, SHM] {
        folder(path, 0o755)?;
    }
    let pts = Some("newinstance,ptmxmode=0666,mode=0620,gid=5");
    mounted(
        "devpts",
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        pts,
    )?;
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        symlink(target, link).map_err(GuestError::file("link", link))?;
    }
    crate::cgroup::set_up()?;
    fs::write("/proc/self/oom_score_adj", "-1000")
        .map_err(GuestError::file("write", "/proc/self/oom_score_adj"))?;
    sys::set_not_dumpable().map_err(GuestError::system("become not dumpable"))
}

/// The host's port for READY, from the kernel's command line.
pub(crate) fn ready_port() -> Result<VsockPort, GuestError> {
    let path = "/proc/cmdline";
    let line = fs::read_to_string(path).map_err(GuestError::file("read", path))?;
    VsockPort::ready_on(&line).ok_or_else(|| GuestError::Invalid {
        field: "kernel command line",
        reason: format!(
            "no {}<port> in {:?}",
            VsockPort::READY_WORD,
            line.trim_end()
        ),
    })
}

/// Says on the console why the guest cannot go on, and ends the VM.
pub(crate) fn give_up(error: &dyn std::fmt::Display) {
    let line = format!("podhull-agent: {error}\n");
    for console in ["/dev/console", "/dev/kmsg"] {
        let written = fs::OpenOptions::new()
            .write(true)
            .open(console)
            .and_then(|mut console| console.write_all(line.as_bytes()));
        if written.is_ok() {
            break;
        }
    }
    power_off();
}

/// Ends the VM: with `reboot=t` and QEMU's `-no-reboot` a reset is its end.
pub(crate) fn power_off() {
    nix::unistd::sync();
    let Err(errno) = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT);
    tracing::error!(%errno, "the VM cannot be reset");
}

/// Whether this process is the guest's PID 1.
pub(crate) fn is_guest() -> bool {
    nix::unistd::getpid().as_raw() == 1 && Path::new("/init").exists()
}
