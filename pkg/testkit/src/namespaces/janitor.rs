// SPDX-License-Identifier: Apache-2.0
//! The janitor: makes the node's folder and cgroups, starts PID 1, and removes
//! everything when PID 1 ends or the user's process is gone.

use std::env;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{self, Child, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::setsid;

use super::cgroup::{self, Hierarchy};
use super::{CGROUP, FOLDER, INIT, exit_code, kill_and_wait, report, signal_set, stage};

const PREFIX: &str = "podhull-node-";
const LOCK: &str = "lock";
/// Killed processes leave their cgroups a moment later.
const CGROUPS_EMPTY_WITHIN: Duration = Duration::from_secs(10);

pub(super) fn run() -> Result<ExitCode> {
    setsid().context("setsid")?;
    let signals = signal_set(&[Signal::SIGCHLD, Signal::SIGTERM]);
    signals.thread_block().context("block signals")?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("signalfd")?;

    sweep();
    let node = Remains::create()?;
    let result = start_init(&node).and_then(|mut init| supervise(&mut init, &signals));
    let removed = node.remove();
    if let Err(error) = &removed {
        report(error);
    }
    let code = result?;
    Ok(if removed.is_ok() {
        code
    } else {
        ExitCode::FAILURE
    })
}

/// Where test nodes keep their files: a disk, since overlayfs and the
/// kubelet's statistics want one.
fn parent() -> PathBuf {
    env::var_os("PODHULL_TEST_DIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
}

/// Removes what runs left behind whose janitor was killed.
fn sweep() {
    let Ok(entries) = fs::read_dir(parent()) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let ours = name.to_str().is_some_and(|name| name.starts_with(PREFIX));
        if !ours || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        // Its owner holds the lock for as long as it lives.
        let Ok(lock) = File::open(entry.path().join(LOCK)) else {
            continue;
        };
        let Ok(lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else {
            continue;
        };
        let stale = Remains {
            folder: entry.path(),
            cgroup: name.to_string_lossy().into_owned(),
            hierarchies: cgroup::hierarchies().unwrap_or_default(),
            _lock: lock,
        };
        if let Err(error) = stale.remove() {
            report(&error.context("sweep an earlier run"));
        }
    }
}

/// What has to go at the end.
struct Remains {
    folder: PathBuf,
    cgroup: String,
    hierarchies: Vec<Hierarchy>,
    _lock: Flock<File>,
}

impl Remains {
    fn create() -> Result<Self> {
        let cgroup = format!("{PREFIX}{}", process::id());
        let folder = parent().join(&cgroup);
        DirBuilder::new()
            .mode(0o755)
            .create(&folder)
            .with_context(|| format!("create {}", folder.display()))?;
        let lock = File::create(folder.join(LOCK)).context("create the lock")?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| errno)
            .context("lock the node's folder")?;
        let hierarchies = cgroup::hierarchies().context("find the cgroup hierarchies")?;
        let remains = Self {
            folder,
            cgroup,
            hierarchies,
            _lock: lock,
        };
        for hierarchy in &remains.hierarchies {
            if let Err(error) = hierarchy.create(&remains.cgroup) {
                report_failed_cleanup(&remains);
                return Err(error);
            }
        }
        Ok(remains)
    }

    fn remove(&self) -> Result<()> {
        let by = Instant::now() + CGROUPS_EMPTY_WITHIN;
        let mut first = None;
        for hierarchy in &self.hierarchies {
            if let Err(error) = remove_cgroups(&hierarchy.child(&self.cgroup), by) {
                first.get_or_insert(error);
            }
        }
        // The lock goes last: a folder with a free lock is a stale one.
        let removed = fs::remove_dir_all(&self.folder)
            .with_context(|| format!("remove {}", self.folder.display()));
        match (first, removed) {
            (Some(error), _) | (None, Err(error)) => Err(error),
            (None, Ok(())) => Ok(()),
        }
    }
}

fn report_failed_cleanup(remains: &Remains) {
    if let Err(error) = remains.remove() {
        report(&error);
    }
}

/// Removes a cgroup and those below it, deepest first.
fn remove_cgroups(path: &Path, by: Instant) -> Result<()> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path(), by)?;
        }
    }
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // A zombie's cgroup is busy until it is reaped; v1 has no event for that.
            Err(error)
                if error.raw_os_error() == Some(Errno::EBUSY as i32) && Instant::now() < by =>
            {
                thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error).with_context(|| format!("remove {}", path.display())),
        }
    }
}

fn start_init(node: &Remains) -> Result<Child> {
    // Children of this process are born into the new namespace; the first is its PID 1.
    unshare(CloneFlags::CLONE_NEWPID).context("unshare the PID namespace (are you root?)")?;
    stage(INIT)
        .env(FOLDER, &node.folder)
        .env(CGROUP, &node.cgroup)
        .stdin(Stdio::null())
        .spawn()
        .context("start PID 1")
}

/// Waits until PID 1 ends by itself, or until the user's process is gone.
fn supervise(init: &mut Child, signals: &SignalFd) -> Result<ExitCode> {
    let stdin = io::stdin();
    loop {
        if let Some(status) = init.try_wait().context("wait for PID 1")? {
            return Ok(exit_code(status));
        }
        let mut fds = [
            PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        let user_gone = fds[0].revents().is_some_and(|events| !events.is_empty());
        let mut told_to_end = false;
        while let Some(info) = signals.read_signal().context("read a signal")? {
            told_to_end |= info.ssi_signo == Signal::SIGTERM as u32;
        }
        if user_gone || told_to_end {
            return Ok(exit_code(kill_and_wait(init).context("kill PID 1")?));
        }
    }
}
