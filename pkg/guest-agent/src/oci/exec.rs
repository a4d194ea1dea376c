// SPDX-License-Identifier: Apache-2.0
//! `oci exec`: an added process, confined exactly as the container's init.
//!
//! libcontainer's own way installs no seccomp filter, so this is ours: the same
//! steps in the same order as for init.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use libcontainer::capabilities;
use libcontainer::syscall::syscall::create_syscall;
use nix::sched::{CloneFlags, setns};
use nix::unistd::{Gid, Pid, Uid};
use oci_spec::runtime::{LinuxSeccomp, PosixRlimitType, Process};
use podhull_types::UserNamespace;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde::{Deserialize, Serialize};

use super::{floor, lookup};
use crate::error::GuestError;
use crate::helper::{Line, Report, receive};
use crate::pod::{self, Mapping};
use crate::stdio::{self, console};
use crate::sys;

/// What the helper is to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Task {
    /// The container's init process, as the agent sees it.
    pub init: i32,
    /// The container's cgroup folder.
    pub cgroup: PathBuf,
    /// The process.
    pub process: Process,
    /// The container's seccomp profile.
    pub seccomp: Option<LinuxSeccomp>,
    /// Where the terminal's other end is to be sent.
    pub console: Option<PathBuf>,
    /// What the pod's user namespace maps.
    pub(crate) users: Option<Mapping>,
}

fn enter(task: &Task) -> Result<(), GuestError> {
    let init = rustix::process::Pid::from_raw(task.init)
        .ok_or_else(|| GuestError::Start("the container has no process".into()))?;
    let pidfd = rustix::process::pidfd_open(init, rustix::process::PidfdFlags::empty())
        .map_err(GuestError::system("open the container's process"))?;
    let procs = task.cgroup.join("cgroup.procs");
    fs::write(&procs, "0").map_err(GuestError::file("join cgroup", &procs))?;
    if let Some(score) = task.process.oom_score_adj() {
        let path = "/proc/self/oom_score_adj";
        fs::write(path, score.to_string()).map_err(GuestError::file("write", path))?;
    }
    floor::install()?;
    let mut namespaces =
        CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWCGROUP;
    if let Some(users) = task.users {
        prepare_outside(&task.process, &users.users()?)?;
        namespaces |= CloneFlags::CLONE_NEWUSER
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC;
    }
    setns(&pidfd, namespaces).map_err(GuestError::system("enter the container's namespaces"))?;
    if task.users.is_some() {
        pod::become_root()?;
    }
    // Entering a mount namespace leaves root and working directory in the old one
    // only by name: the kernel has set both to the new root.
    Ok(())
}

fn open_terminal(task: &Task, socket: &UnixStream) -> Result<(), GuestError> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .map_err(GuestError::system("open a terminal"))?;
    grantpt(&master).map_err(GuestError::system("grant the terminal"))?;
    unlockpt(&master).map_err(GuestError::system("unlock the terminal"))?;
    let name = ptsname(&master, Vec::new()).map_err(GuestError::system("name the terminal"))?;
    if let Some(size) = task.process.console_size() {
        stdio::resize(&master, size.width(), size.height())?;
    }
    let path = PathBuf::from(name.to_string_lossy().into_owned());
    let slave: OwnedFd = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(GuestError::file("open terminal", &path))?
        .into();
    console::send(socket, &master)?;
    rustix::stdio::dup2_stdin(&slave).map_err(GuestError::system("attach the terminal"))?;
    rustix::stdio::dup2_stdout(&slave).map_err(GuestError::system("attach the terminal"))?;
    rustix::stdio::dup2_stderr(&slave).map_err(GuestError::system("attach the terminal"))?;
    sys::take_controlling_terminal().map_err(GuestError::system("take the terminal"))
}

fn resource(kind: PosixRlimitType) -> rustix::process::Resource {
    use rustix::process::Resource;
    match kind {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}

fn set_limits(process: &Process) -> Result<(), GuestError> {
    for limit in process.rlimits().iter().flatten() {
        let value = |value: u64| (value != u64::MAX).then_some(value);
        let new = rustix::process::Rlimit {
            current: value(limit.soft()),
            maximum: value(limit.hard()),
        };
        rustix::process::setrlimit(resource(limit.typ()), new)
            .map_err(GuestError::system("set a resource limit"))?;
    }
    Ok(())
}

/// Does what nobody may do any more in a pod's user namespace: raises the limits
/// that the process is to have, and gives it the pipes that are its streams.
pub(super) fn prepare_outside(process: &Process, users: &UserNamespace) -> Result<(), GuestError> {
    for limit in process.rlimits().iter().flatten() {
        let kind = resource(limit.typ());
        let mut now = rustix::process::getrlimit(kind);
        let hard = Some(limit.hard()).filter(|hard| *hard != u64::MAX);
        // No limit is the highest.
        now.maximum = now.maximum.zip(hard).map(|(now, hard)| now.max(hard));
        rustix::process::setrlimit(kind, now)
            .map_err(GuestError::system("raise a resource limit"))?;
    }
    let user = process.user();
    let (uid, gid) = pod::outside(users, user.uid(), user.gid());
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    for stream in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
        let failed = GuestError::system("give away a stream");
        let kind = match rustix::fs::fstat(stream) {
            Ok(stat) => rustix::fs::FileType::from_raw_mode(stat.st_mode),
            Err(errno) => return Err(failed(errno)),
        };
        // The guest's /dev/null stays its own.
        if kind == rustix::fs::FileType::Fifo {
            let (uid, gid) = (
                rustix::fs::Uid::from_raw(uid),
                rustix::fs::Gid::from_raw(gid),
            );
            rustix::fs::fchown(stream, Some(uid), Some(gid)).map_err(failed)?;
        }
    }
    Ok(())
}

/// Gives the standard streams to the user, as runc does, so that /dev/stdout can
/// be opened.
fn give_streams(user: Uid) -> Result<(), GuestError> {
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    for stream in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
        match rustix::fs::fchown(stream, Some(rustix::fs::Uid::from_raw(user.as_raw())), None) {
            // What cannot be given away, as /dev/null on a read-only /dev, stays.
            Ok(())
            | Err(rustix::io::Errno::PERM | rustix::io::Errno::ROFS | rustix::io::Errno::INVAL) => {
            }
            Err(errno) => return Err(GuestError::system("give away a stream")(errno)),
        }
    }
    Ok(())
}

fn become_user(process: &Process) -> Result<(), GuestError> {
    let user = process.user();
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    if !uid.is_root() {
        give_streams(uid)?;
    }
    if let Some(mask) = user.umask() {
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(mask));
    }
    let syscall = create_syscall();
    let capabilities = process.capabilities().clone();
    sys::set_keep_capabilities(true).map_err(GuestError::system("keep capabilities"))?;
    let groups: Vec<Gid> = user
        .additional_gids()
        .iter()
        .flatten()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    nix::unistd::setgroups(&groups).map_err(GuestError::system("set supplemental groups"))?;
    nix::unistd::setresgid(gid, gid, gid).map_err(GuestError::system("set the group"))?;
    nix::unistd::setresuid(uid, uid, uid).map_err(GuestError::system("set the user"))?;
    sys::set_keep_capabilities(false).map_err(GuestError::system("keep capabilities"))?;
    let failed = |error: libcontainer::syscall::SyscallError| GuestError::System {
        what: "set capabilities",
        source: io::Error::other(error.to_string()),
    };
    capabilities::reset_effective(syscall.as_ref()).map_err(failed)?;
    if process.no_new_privileges() == Some(true) {
        nix::sys::prctl::set_no_new_privs().map_err(GuestError::system("set no_new_privs"))?;
    }
    if let Some(capabilities) = capabilities {
        capabilities::drop_privileges(&capabilities, syscall.as_ref()).map_err(failed)?;
    }
    Ok(())
}

/// Enters the working directory, which must be in the container: a path through
/// an inherited descriptor could lead out of it.
fn enter_cwd(process: &Process) -> Result<(), GuestError> {
    let cwd = process.cwd();
    let failed = |error: io::Error| {
        let why = lookup::words(&error);
        GuestError::Start(format!(
            "chdir to cwd ({cwd:?}) set in config.json failed: {why}"
        ))
    };
    std::env::set_current_dir(cwd).map_err(failed)?;
    let place = std::env::current_dir().map_err(failed)?;
    if place.is_absolute() {
        return Ok(());
    }
    Err(GuestError::Start(format!(
        "cwd ({cwd:?}) is outside of the container"
    )))
}

fn filter(seccomp: &LinuxSeccomp) -> Result<(), GuestError> {
    libcontainer::seccomp::initialize_seccomp(seccomp)
        .map(drop)
        .map_err(|error| GuestError::System {
            what: "install seccomp",
            source: io::Error::other(error.to_string()),
        })
}

/// HOME as runc sets it: from the container's own passwd.
fn home(uid: u32) -> String {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let home = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let user = fields.nth(2)?;
        (user.parse() == Ok(uid)).then(|| fields.nth(2).unwrap_or("/").to_owned())
    });
    home.filter(|home| !home.is_empty())
        .unwrap_or_else(|| "/".into())
}

/// Becomes the process; returns only if that fails.
fn become_process(task: &Task, socket: Option<&UnixStream>) -> GuestError {
    let prepare = || -> Result<(PathBuf, Vec<String>, Vec<String>), GuestError> {
        nix::unistd::setsid().map_err(GuestError::system("make a session"))?;
        if let Some(socket) = socket {
            open_terminal(task, socket)?;
        }
        set_limits(&task.process)?;
        let mut env = task.process.env().clone().unwrap_or_default();
        if !env.iter().any(|entry| entry.starts_with("HOME=")) {
            env.push(format!("HOME={}", home(task.process.user().uid())));
        }
        // Without no_new_privs a filter needs privilege, which the user may not
        // have; with it, it comes as late as possible.
        let early = task.process.no_new_privileges() != Some(true);
        if let (Some(seccomp), true) = (&task.seccomp, early) {
            filter(seccomp)?;
        }
        let entered = enter_cwd(&task.process);
        become_user(&task.process)?;
        // What root may not enter, on a file system of its own, the user may.
        entered.or_else(|_| enter_cwd(&task.process))?;
        if let (Some(seccomp), false) = (&task.seccomp, early) {
            filter(seccomp)?;
        }
        let args = task.process.args().clone().unwrap_or_default();
        let name = args
            .first()
            .ok_or(GuestError::Start("args must not be empty".into()))?;
        let program = lookup::program(name, &env).map_err(GuestError::Start)?;
        Ok((program, args, env))
    };
    match prepare() {
        Ok((program, args, env)) => GuestError::Start(lookup::execute(&program, &args, &env)),
        Err(error) => error,
    }
}

fn run(task: &Task, report: &Report) -> Result<Pid, GuestError> {
    let socket = match &task.console {
        Some(path) => {
            Some(UnixStream::connect(path).map_err(GuestError::file("connect to", path))?)
        }
        None => None,
    };
    enter(task)?;
    let words = report.clone();
    sys::fork(move || {
        let error = become_process(task, socket.as_ref());
        words.send(&Line::Error(error.to_string()));
        1
    })
    .map_err(GuestError::system("fork"))
}

pub(super) fn main() -> bool {
    let Ok((task, report)) = receive::<Task>() else {
        return false;
    };
    match run(&task, &report) {
        Ok(pid) => report.send(&Line::Pid(pid.as_raw())),
        Err(error) => report.send(&Line::Error(error.to_string())),
    }
    true
}
