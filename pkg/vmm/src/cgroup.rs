// SPDX-License-Identifier: Apache-2.0
//! The cgroup that accounts for a VM's processes.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use podhull_types::Deadline;

use crate::error::VmmError;

/// A cgroup below the root, in every hierarchy that the host has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupPlacement(Option<PathBuf>);

impl CgroupPlacement {
    /// Wherever the shim is.
    #[must_use]
    pub fn none() -> Self {
        Self(None)
    }

    /// From an OCI `linux.cgroupsPath`: a path, or systemd's
    /// `slice:prefix:name` (the convention of runc's `libcontainer/cgroups/systemd`).
    /// Parts that would lead out of the hierarchy are dropped.
    #[must_use]
    pub fn from_oci(path: &str) -> Self {
        let parts: Vec<_> = path.split(':').collect();
        let path = match parts[..] {
            [slice, prefix, name] => slice_path(slice).join(format!("{prefix}-{name}.scope")),
            _ => PathBuf::from(path),
        };
        let path: PathBuf = path
            .components()
            .filter(|part| matches!(part, Component::Normal(_)))
            .collect();
        Self((!path.as_os_str().is_empty()).then_some(path))
    }

    fn folders(&self) -> Vec<PathBuf> {
        let Some(path) = &self.0 else {
            return Vec::new();
        };
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        hierarchies(&mounts)
            .into_iter()
            .map(|root| root.join(path))
            .collect()
    }

    /// Makes the cgroup and returns its folders, one per hierarchy.
    pub(crate) fn make(&self) -> Result<Vec<PathBuf>, VmmError> {
        let folders = self.folders();
        for folder in &folders {
            make_cgroup(folder).map_err(VmmError::file("make cgroup", folder))?;
        }
        Ok(folders)
    }

    /// Whether the kernel has killed one of its processes because a limit, of
    /// this cgroup or of one above, was reached (`memory.events` of version 2,
    /// `memory.oom_control` of version 1).
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        let files = ["memory.events", "memory.oom_control"];
        let mut texts = self.folders().into_iter().flat_map(|folder| {
            files.map(|file| fs::read_to_string(folder.join(file)).unwrap_or_default())
        });
        texts.any(|text| oom_kills(&text) > 0)
    }

    /// Removes the cgroup once its processes are gone. containerd's own
    /// cgroups above it stay.
    pub(crate) async fn remove(&self, by: Deadline) -> Result<(), VmmError> {
        for folder in self.folders() {
            loop {
                match fs::remove_dir(&folder) {
                    Ok(()) => break,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                    // A process that was reaped leaves its cgroup a little later.
                    Err(error) if error.kind() == io::ErrorKind::ResourceBusy && !by.passed() => {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    Err(error) => return Err(VmmError::file("remove cgroup", folder)(error)),
                }
            }
        }
        Ok(())
    }
}

fn oom_kills(text: &str) -> u64 {
    let count = |line: &str| line.strip_prefix("oom_kill ")?.trim().parse().ok();
    text.lines().find_map(count).unwrap_or_default()
}

/// `a-b.slice` is `a.slice/a-b.slice`.
fn slice_path(slice: &str) -> PathBuf {
    let Some(name) = slice.strip_suffix(".slice") else {
        return PathBuf::from(slice);
    };
    let mut path = PathBuf::new();
    let mut prefix = String::new();
    for part in name.split('-').filter(|part| !part.is_empty()) {
        if !prefix.is_empty() {
            prefix.push('-');
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
    }
    path
}

/// Mount points of the hierarchies that account for something.
fn hierarchies(mountinfo: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let kind = right.split(' ').next().unwrap_or_default();
        let controllers = right.rsplit(' ').next().unwrap_or_default();
        let named = controllers.split(',').any(|word| word.starts_with("name="));
        let counts = kind == "cgroup2" || kind == "cgroup" && !named;
        if let Some(point) = left.split(' ').nth(4).filter(|_| counts) {
            found.push(PathBuf::from(point));
        }
    }
    // With both versions mounted, version 2 has no controllers left to use.
    if found.len() > 1 {
        found.retain(|point| !point.join("cgroup.controllers").exists());
    }
    found.sort();
    found.dedup();
    found
}

/// Makes a cgroup and what is above it; a new cpuset of version 1 takes its
/// parent's CPUs and memory nodes, without which nothing can enter it.
fn make_cgroup(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let parent = folder.parent().ok_or(io::ErrorKind::NotFound)?;
    make_cgroup(parent)?;
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let own = folder.join(name);
        let is_v1 = own.exists() && !folder.join("cgroup.controllers").exists();
        if is_v1 && fs::read_to_string(&own)?.trim().is_empty() {
            fs::write(&own, fs::read_to_string(parent.join(name))?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_both_kinds_are_understood() {
        let path = |text| CgroupPlacement::from_oci(text).0;
        assert_eq!(path("/k8s.io/x"), Some("k8s.io/x".into()));
        assert_eq!(
            path("kubepods-burstable-pod1.slice:cri-containerd:x"),
            Some(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-x.scope"
                    .into()
            )
        );
        assert_eq!(path("/a/../../b"), Some("a/b".into()));
        assert_eq!(path("/"), None);
        assert_eq!(path(""), None);
    }

    #[test]
    fn kills_for_want_of_memory_are_read_from_either_version() {
        let v1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n";
        let v2 = "low 0\nhigh 0\nmax 9\noom 1\noom_kill 1\noom_group_kill 0\n";
        assert_eq!((oom_kills(v1), oom_kills(v2)), (2, 1));
        assert_eq!(oom_kills("oom_kill_disable 0\nunder_oom 0\n"), 0);
    }

    #[test]
    fn hierarchies_are_found() {
        let v1 = "30 20 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
                  31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                  32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
                  33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n";
        assert_eq!(
            hierarchies(v1),
            [
                PathBuf::from("/sys/fs/cgroup/cpu,cpuacct"),
                PathBuf::from("/sys/fs/cgroup/memory"),
            ]
        );
        let v2 = "31 30 0:27 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(hierarchies(v2), [PathBuf::from("/sys/fs/cgroup")]);
    }
}
