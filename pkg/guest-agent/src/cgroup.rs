// SPDX-License-Identifier: Apache-2.0
//! The guest's cgroup v2 tree.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use oci_spec::runtime::{LinuxMemory, LinuxResources};
use podhull_api::agent::{IoStat, StatsResponse};
use podhull_types::{ContainerId, Deadline};

use crate::error::GuestError;
use crate::sys;

mod freezer;
mod limits;

use limits::Write;

const ROOT: &str = "/sys/fs/cgroup";
/// Our branch, as an OCI `cgroupsPath`.
const BRANCH: &str = "podhull";
/// How often a removal is tried again: the kernel says EBUSY until the last
/// process is fully gone, and tells nobody when.
const RETRY: Duration = Duration::from_millis(5);
/// How many processes are held at a time, each by a descriptor.
const HELD: usize = 256;

/// Mounts the tree and passes every controller on to our branch.
pub(crate) fn set_up() -> Result<(), GuestError> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("cgroup2"),
        ROOT,
        Some("cgroup2"),
        flags,
        Some("nsdelegate"),
    )
    .map_err(|errno| GuestError::file("mount", ROOT)(errno.into()))?;
    delegate(Path::new(ROOT))?;
    let branch = Path::new(ROOT).join(BRANCH);
    fs::create_dir(&branch).map_err(GuestError::file("make cgroup", &branch))?;
    delegate(&branch)
}

fn delegate(folder: &Path) -> Result<(), GuestError> {
    let path = folder.join("cgroup.controllers");
    let controllers = fs::read_to_string(&path).map_err(GuestError::file("read", &path))?;
    let all: Vec<String> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    let path = folder.join("cgroup.subtree_control");
    fs::write(&path, all.join(" ")).map_err(GuestError::file("write", &path))
}

/// A container's cgroup.
#[derive(Debug, Clone)]
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    pub(crate) fn of(container: &ContainerId) -> Self {
        Self(Path::new(ROOT).join(BRANCH).join(container.as_str()))
    }

    /// The path that goes into an OCI spec.
    pub(crate) fn oci_path(container: &ContainerId) -> String {
        format!("/{BRANCH}/{container}")
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    fn read(&self, name: &str) -> io::Result<String> {
        fs::read_to_string(self.0.join(name))
    }

    fn write(&self, name: &str, value: &str) -> Result<(), GuestError> {
        let path = self.0.join(name);
        fs::write(&path, value).map_err(GuestError::file("write", path))
    }

    fn number(&self, name: &str) -> u64 {
        self.read(name)
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        let text = self.read("cgroup.procs").unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Signals every process in it.
    pub(crate) fn signal(&self, signal: i32) -> Result<(), GuestError> {
        signal_all(|| self.pids(), signal).map_err(GuestError::system("signal a process"))
    }

    /// Kills every process in it at once. An absent cgroup has none.
    pub(crate) fn kill(&self) -> Result<(), GuestError> {
        if !self.0.exists() {
            return Ok(());
        }
        self.write("cgroup.kill", "1")
    }

    /// How many processes the kernel killed for want of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        let events: HashMap<String, u64> = self
            .read("memory.events")
            .map(|text| parse_flat(&text))
            .unwrap_or_default();
        events.get("oom_kill").copied().unwrap_or(0)
    }

    /// Removes it, waiting for its last process to be gone.
    pub(crate) async fn remove(&self, by: Deadline) -> Result<(), GuestError> {
        loop {
            match fs::remove_dir(&self.0) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && !by.passed() => {
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(GuestError::file("remove cgroup", &self.0)(error)),
            }
        }
    }

    /// Applies new limits; what `resources` leaves out stays.
    pub(crate) fn update(&self, resources: &LinuxResources) -> Result<(), GuestError> {
        let memory = resources.memory().as_ref();
        let limit = memory.and_then(LinuxMemory::limit);
        if let (Some(limit), Some(true)) = (
            limit.and_then(|bytes| u64::try_from(bytes).ok()),
            memory.and_then(LinuxMemory::check_before_update),
        ) {
            let used = self.number("memory.current");
            if used > limit {
                return Err(GuestError::Invalid {
                    field: "linux.resources.memory.limit",
                    reason: format!("{limit} is below the {used} bytes that are in use"),
                });
            }
        }
        for Write { file, value } in limits::writes(resources)? {
            self.write(&file, &value)?;
        }
        Ok(())
    }

    pub(crate) fn stats(&self) -> StatsResponse {
        let flat = |name: &str| {
            self.read(name)
                .map(|text| parse_flat(&text))
                .unwrap_or_default()
        };
        StatsResponse {
            cpu_stat: flat("cpu.stat"),
            memory_current: self.number("memory.current"),
            memory_max: self.number("memory.max"),
            memory_stat: flat("memory.stat"),
            memory_events: flat("memory.events"),
            pids_current: self.number("pids.current"),
            pids_max: self.number("pids.max"),
            io: self
                .read("io.stat")
                .map(|text| parse_io(&text))
                .unwrap_or_default(),
            memory_swap_current: self.number("memory.swap.current"),
            memory_swap_max: self.number("memory.swap.max"),
        }
    }
}

/// Signals the processes that `list` lists. Most are not our children, so a PID
/// may be another's by the time it is used: a process is held first, and must be
/// listed still.
fn signal_all(list: impl Fn() -> Vec<u32>, signal: i32) -> io::Result<()> {
    for pids in list().chunks(HELD) {
        let held: Vec<_> = pids
            .iter()
            .filter_map(|pid| Some((pid, sys::hold(*pid).ok()?)))
            .collect();
        let still: HashSet<_> = list().into_iter().collect();
        for (_, process) in held.iter().filter(|(pid, _)| still.contains(pid)) {
            match sys::signal_held(process, signal) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// A flat keyed file: `key value` lines.
fn parse_flat<K: FromStr + std::hash::Hash + Eq>(text: &str) -> HashMap<K, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.parse().ok()?, value.trim().parse().ok()?))
        })
        .collect()
}

/// io.stat: `major:minor key=value …` lines.
fn parse_io(text: &str) -> Vec<IoStat> {
    text.lines()
        .filter_map(|line| {
            let (device, rest) = line.split_once(' ')?;
            let (major, minor) = device.split_once(':')?;
            let values: HashMap<&str, u64> = rest
                .split_whitespace()
                .filter_map(|pair| pair.split_once('='))
                .filter_map(|(key, value)| Some((key, value.parse().ok()?)))
                .collect();
            let value = |key| values.get(key).copied().unwrap_or(0);
            Some(IoStat {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                rbytes: value("rbytes"),
                wbytes: value("wbytes"),
                rios: value("rios"),
                wios: value("wios"),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io::{BufRead, BufReader};
    use std::process::{Child, ChildStdout, Command, Stdio};

    use super::*;

    /// Says whether a signal or its input's end came first. Nobody counts on its
    /// exit: another test reaps all children of the process.
    fn listener() -> (Child, BufReader<ChildStdout>) {
        let script = "trap 'echo signal; exit' TERM; echo ready; read line; echo end";
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        (child, output)
    }

    #[test]
    fn only_processes_that_are_still_listed_are_signalled() {
        let (mut member, member_said) = listener();
        // Its PID was a member's when the list was read.
        let (mut stranger, stranger_said) = listener();
        let (one, two) = (member.id(), stranger.id());
        // No process has this one.
        let lists = RefCell::new(vec![vec![one], vec![one, two, u32::MAX >> 1]]);
        signal_all(|| lists.borrow_mut().pop().unwrap(), libc::SIGTERM).unwrap();
        assert_eq!(io::read_to_string(member_said).unwrap(), "signal\n");
        drop(stranger.stdin.take());
        assert_eq!(io::read_to_string(stranger_said).unwrap(), "end\n");
        let _ = (member.wait(), stranger.wait());
    }

    #[test]
    fn flat_files_are_parsed_and_odd_lines_skipped() {
        let parsed: HashMap<String, u64> = parse_flat("low 0\noom_kill 3\nodd\nmax x\n");
        assert_eq!(parsed.get("oom_kill"), Some(&3));
        assert_eq!(parsed.len(), 2);
    }

    #[test]
    fn io_is_told_by_device() {
        let io = parse_io("254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n");
        assert_eq!(io.len(), 1);
        assert_eq!((io[0].major, io[0].rbytes, io[0].wios), (254, 10, 2));
    }
}
