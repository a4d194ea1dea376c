// SPDX-License-Identifier: Apache-2.0
//! The cgroup hierarchies of this machine, and a child of ours in each.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// One mounted cgroup hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// The options that mount it again: `cpu`, `none,name=systemd`; none for v2.
    pub options: Option<String>,
    /// The caller's own cgroup in it, relative to the mount point.
    own: PathBuf,
    /// True if v2 is the only hierarchy here.
    unified: bool,
}

/// The mounted hierarchies, as this process sees them.
///
/// # Errors
/// If /proc cannot be read.
pub fn hierarchies() -> Result<Vec<Hierarchy>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read mountinfo")?;
    let memberships = fs::read_to_string("/proc/self/cgroup").context("read /proc/self/cgroup")?;
    Ok(parse(&mounts, &memberships))
}

fn parse(mounts: &str, memberships: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mounts.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        let (&[_, _, _, root, point, ..], &[kind, _, options]) = (&left[..], &right[..]) else {
            continue;
        };
        let options = match kind {
            "cgroup" => Some(v1_options(options)),
            "cgroup2" => None,
            _ => continue,
        };
        let Some(own) = membership(memberships, options.as_deref()) else {
            continue;
        };
        // In a container the mount shows a subtree; the membership names the whole path.
        let own = own.strip_prefix(root.trim_end_matches('/')).unwrap_or(own);
        if found.iter().any(|known| known.options == options) {
            continue;
        }
        found.push(Hierarchy {
            mount_point: point.into(),
            options,
            own: own.trim_start_matches('/').into(),
            unified: false,
        });
    }
    if let [only] = &mut found[..]
        && only.options.is_none()
    {
        only.unified = true;
    }
    found
}

/// What is left of a superblock's options once read-write and the like are gone.
fn v1_options(options: &str) -> String {
    let names: Vec<&str> = options
        .split(',')
        .filter(|word| !matches!(*word, "rw" | "ro" | "xattr" | "clone_children" | "noprefix"))
        .filter(|word| !word.starts_with("release_agent="))
        .collect();
    if names.iter().all(|word| word.starts_with("name=")) {
        format!("none,{}", names.join(","))
    } else {
        names.join(",")
    }
}

/// The path of the line of /proc/self/cgroup that belongs to a hierarchy.
fn membership<'a>(memberships: &'a str, options: Option<&str>) -> Option<&'a str> {
    memberships.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let wanted = match options {
            None => controllers.is_empty(),
            Some(options) => {
                let mut left: Vec<&str> = controllers.split(',').collect();
                let mut right: Vec<&str> = options.split(',').filter(|w| *w != "none").collect();
                left.sort_unstable();
                right.sort_unstable();
                left == right
            }
        };
        wanted.then_some(path)
    })
}

impl Hierarchy {
    /// Where a child called `name` is: below the caller's own cgroup, except
    /// on a pure v2 machine, where only the root may have both processes and
    /// children with controllers.
    #[must_use]
    pub fn child(&self, name: &str) -> PathBuf {
        if self.unified {
            self.mount_point.join(name)
        } else {
            self.mount_point.join(&self.own).join(name)
        }
    }

    /// Makes the child.
    pub(super) fn create(&self, name: &str) -> Result<()> {
        let path = self.child(name);
        if self.unified {
            enable_controllers(&self.mount_point)?;
        }
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        if self
            .options
            .as_deref()
            .is_some_and(|o| o.split(',').any(|word| word == "cpuset"))
        {
            let parent = path.parent().unwrap_or(&self.mount_point);
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let value = fs::read_to_string(parent.join(file))
                    .with_context(|| format!("read {file}"))?;
                fs::write(path.join(file), value.trim())
                    .with_context(|| format!("write {file}"))?;
            }
        }
        Ok(())
    }

    /// Moves the calling process into the child.
    pub(super) fn join(&self, name: &str) -> Result<()> {
        let procs = self.child(name).join("cgroup.procs");
        fs::write(&procs, "0").with_context(|| format!("write {}", procs.display()))
    }

    /// True if v2 is the only hierarchy here.
    #[must_use]
    pub fn is_unified(&self) -> bool {
        self.unified
    }
}

/// Lets children of `cgroup` have every controller that it has.
pub(super) fn enable_controllers(cgroup: &Path) -> Result<()> {
    let read = |file| -> io::Result<String> { fs::read_to_string(cgroup.join(file)) };
    let there = read("cgroup.controllers").context("read cgroup.controllers")?;
    let enabled = read("cgroup.subtree_control").context("read cgroup.subtree_control")?;
    for controller in there.split_whitespace() {
        if !enabled.split_whitespace().any(|word| word == controller) {
            fs::write(
                cgroup.join("cgroup.subtree_control"),
                format!("+{controller}"),
            )
            .with_context(|| format!("enable {controller} below {}", cgroup.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_hierarchies_are_found_with_the_options_that_mount_them() {
        let mounts = "\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw shared:3 - cgroup cgroup rw,cpu,cpuacct
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";
        let memberships = "9:name=systemd:/\n4:memory:/ci/job\n1:cpuacct,cpu:/\n0::/\n";
        let found = parse(mounts, memberships);
        let options: Vec<_> = found.iter().map(|h| h.options.as_deref()).collect();
        assert_eq!(
            options,
            [
                Some("memory"),
                Some("cpu,cpuacct"),
                Some("none,name=systemd"),
                None
            ]
        );
        assert_eq!(
            found[0].child("x"),
            Path::new("/sys/fs/cgroup/memory/ci/job/x")
        );
        assert!(found.iter().all(|h| !h.is_unified()));
    }

    #[test]
    fn a_lone_v2_hierarchy_gets_its_child_at_the_root() {
        let mounts = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = parse(mounts, "0::/user.slice/session-1.scope\n");
        assert!(found[0].is_unified());
        assert_eq!(found[0].child("x"), Path::new("/sys/fs/cgroup/x"));
    }

    #[test]
    fn a_container_sees_its_subtree() {
        let mounts = "35 31 0:32 /docker/abc /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n";
        let found = parse(mounts, "4:pids:/docker/abc/inner\n");
        assert_eq!(
            found[0].child("x"),
            Path::new("/sys/fs/cgroup/pids/inner/x")
        );
    }
}
