// SPDX-License-Identifier: Apache-2.0
//! Confines the process and then becomes the program of its task.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use caps::CapSet;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};
use nix::unistd::{Gid, Uid, execve, pivot_root, setgroups, setresgid, setresuid};
use serde::{Deserialize, Serialize};

use super::{at, die_with_shim, join_cgroups, shim};
use crate::child::FIRST_FD;
use crate::sys;

/// The helper's name on the command line.
pub(crate) const ROLE: &str = "jail";

/// Read-only parts of the host that programs are loaded from.
const SYSTEM: [&str; 6] = [
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/sbin",
    "/etc/ld.so.cache",
];

/// A path of the host that is visible in the jail.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Bind {
    pub(crate) source: PathBuf,
    /// Absolute, in the jail.
    pub(crate) target: PathBuf,
    pub(crate) writable: bool,
}

/// A process to be confined.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) cgroups: Vec<PathBuf>,
    /// An empty folder that becomes the jail's root.
    pub(crate) root: PathBuf,
    pub(crate) binds: Vec<Bind>,
    /// Character devices beside /dev/null and /dev/urandom.
    pub(crate) devices: Vec<PathBuf>,
    /// User and group; `None` stays root.
    pub(crate) user: Option<u32>,
    /// How many descriptors it is given.
    pub(crate) fds: u32,
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<String>,
}

pub(crate) fn run(task: &Task) -> io::Result<()> {
    // The jail's user must be able to enter what is made here.
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
    sys::close_from(FIRST_FD.unsigned_abs() + task.fds).map_err(at("close descriptors"))?;
    let shim = shim();
    join_cgroups(&task.cgroups)?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWPID;
    unshare(namespaces).map_err(at("unshare"))?;
    build_root(task)?;
    enter_root(&task.root)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(at("forbid core dumps"))?;
    give_up_rights(task.user)?;
    // A new PID namespace is for children to come. This one is the shim's, so
    // that nobody has to wait here, with the rights to see the node's processes.
    if sys::fork_for_parent().map_err(at("fork"))? {
        die_with_shim(shim)?;
        become_program(task)?;
    }
    Ok(())
}

fn build_root(task: &Task) -> io::Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(at("make mounts private"))?;
    mount(
        Some("jail"),
        &task.root,
        Some("tmpfs"),
        MsFlags::MS_NOSUID,
        Some("mode=0755,size=64k,nr_inodes=256"),
    )
    .map_err(at("mount the root"))?;
    for path in SYSTEM.map(Path::new) {
        match fs::symlink_metadata(path) {
            Ok(meta) if meta.is_symlink() => {
                std::os::unix::fs::symlink(fs::read_link(path)?, inside(&task.root, path))?;
            }
            Ok(_) => bind(&task.root, path, path, false)?,
            Err(_) => {}
        }
    }
    if !SYSTEM.iter().any(|folder| task.program.starts_with(folder)) {
        bind(&task.root, &task.program, &task.program, false)?;
    }
    for entry in &task.binds {
        bind(&task.root, &entry.source, &entry.target, entry.writable)?;
    }
    fs::create_dir(task.root.join("dev"))?;
    for device in ["/dev/null", "/dev/urandom"].map(Path::new) {
        make_device(&task.root, device, task.user)?;
    }
    for device in &task.devices {
        make_device(&task.root, device, task.user)?;
    }
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID;
    mount(none, &task.root, none, read_only | MsFlags::MS_BIND, none)
        .map_err(at("make the root read-only"))
}

fn inside(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn bind(root: &Path, source: &Path, target: &Path, writable: bool) -> io::Result<()> {
    let step = || format!("bind {}", source.display());
    let target = inside(root, target);
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(at(step()))?;
    }
    if fs::metadata(source).map_err(at(step()))?.is_dir() {
        fs::create_dir_all(&target).map_err(at(step()))?;
    } else {
        fs::write(&target, "").map_err(at(step()))?;
    }
    let none = None::<&str>;
    mount(Some(source), &target, none, MsFlags::MS_BIND, none).map_err(at(step()))?;
    let mut flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    if writable {
        flags |= MsFlags::MS_NOEXEC;
    } else {
        flags |= MsFlags::MS_RDONLY;
    }
    mount(none, &target, none, flags, none).map_err(at(step()))
}

/// A node of the jail's own, for its user alone.
fn make_device(root: &Path, device: &Path, user: Option<u32>) -> io::Result<()> {
    let step = || format!("make {}", device.display());
    let meta = fs::metadata(device).map_err(at(step()))?;
    let number = std::os::unix::fs::MetadataExt::rdev(&meta);
    let number = makedev(nix::sys::stat::major(number), nix::sys::stat::minor(number));
    let target = inside(root, device);
    mknod(
        &target,
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o600),
        number,
    )
    .map_err(at(step()))?;
    std::os::unix::fs::chown(&target, user, user).map_err(at(step()))
}

fn enter_root(root: &Path) -> io::Result<()> {
    std::env::set_current_dir(root).map_err(at("enter the root"))?;
    pivot_root(".", ".").map_err(at("pivot"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(at("leave the old root"))?;
    std::env::set_current_dir("/").map_err(at("enter the new root"))
}

fn give_up_rights(user: Option<u32>) -> io::Result<()> {
    for capability in caps::all() {
        // What this kernel does not know, it cannot grant either.
        if caps::has_cap(None, CapSet::Bounding, capability).unwrap_or(false) {
            caps::drop(None, CapSet::Bounding, capability).map_err(io::Error::other)?;
        }
    }
    if let Some(id) = user {
        let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
        setgroups(&[]).map_err(at("give up groups"))?;
        setresgid(gid, gid, gid).map_err(at("change the group"))?;
        setresuid(uid, uid, uid).map_err(at("change the user"))?;
    }
    for set in [
        CapSet::Ambient,
        CapSet::Inheritable,
        CapSet::Effective,
        CapSet::Permitted,
    ] {
        caps::clear(None, set).map_err(io::Error::other)?;
    }
    nix::sys::prctl::set_no_new_privs().map_err(at("set no_new_privs"))
}

fn become_program(task: &Task) -> io::Result<()> {
    let c = |bytes: &[u8]| CString::new(bytes).map_err(io::Error::other);
    let program = c(task.program.as_os_str().as_bytes())?;
    let mut args = vec![program.clone()];
    for arg in &task.args {
        args.push(c(arg.as_bytes())?);
    }
    let environment = [c(b"PATH=/usr/bin:/bin")?];
    let Err(errno) = execve(&program, &args, &environment);
    Err(at(format!("execute {}", task.program.display()))(errno))
}
