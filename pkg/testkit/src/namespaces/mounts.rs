// SPDX-License-Identifier: Apache-2.0
//! The node's mounts: the host's tree, with everything that containerd, CNI
//! and podhull write private to the node. Real paths inside, so that programs
//! find what they find on a node.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::cgroup::{self, Hierarchy};

/// Folders that get a private upper layer over the host's.
const OVERLAYS: [&str; 3] = ["/etc", "/var/lib", "/var/log"];
/// Folders that are plain parts of a disk: an overlay cannot be the upper
/// layer of another, and containerd's snapshotter makes overlays.
const ON_DISK: [&str; 3] = ["/var/lib/containerd", "/var/lib/kubelet", "/var/log/pods"];
/// Host settings that must not leak into the node.
const EMPTY: [&str; 4] = [
    "/etc/containerd",
    "/etc/podhull",
    "/etc/cni",
    "/var/lib/cni",
];

pub(super) fn build(folder: &Path, hierarchies: &[Hierarchy]) -> Result<()> {
    // A slave first: nothing that is mounted here reaches the host.
    remount("/", MsFlags::MS_SLAVE)?;
    attach("proc", "/proc", "proc", None)?;
    for target in OVERLAYS {
        overlay(folder, target)?;
    }
    for target in ON_DISK {
        let source = folder.join(target.trim_start_matches('/').replace('/', "-"));
        make_dir(&source)?;
        make_dir(Path::new(target))?;
        mount(
            Some(&source),
            target,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .with_context(|| format!("bind {target}"))?;
    }
    for target in EMPTY {
        make_dir(Path::new(target))?;
        attach("tmpfs", target, "tmpfs", Some("mode=0755"))?;
    }
    attach("tmpfs", "/run", "tmpfs", Some("mode=0755"))?;
    attach("tmpfs", "/dev/shm", "tmpfs", Some("mode=1777"))?;
    cgroups(hierarchies)?;
    remount("/", MsFlags::MS_SHARED)
}

fn overlay(folder: &Path, target: &str) -> Result<()> {
    let name = target.trim_start_matches('/').replace('/', "-");
    let upper = folder.join(format!("{name}-upper"));
    let work = folder.join(format!("{name}-work"));
    make_dir(&upper)?;
    make_dir(&work)?;
    let options = format!(
        "lowerdir={target},upperdir={},workdir={}",
        upper.display(),
        work.display()
    );
    attach("overlay", target, "overlay", Some(&options))
}

/// A new sysfs (of our network namespace) and our own view of every hierarchy.
fn cgroups(hierarchies: &[Hierarchy]) -> Result<()> {
    umount2("/sys", MntFlags::MNT_DETACH).context("detach /sys")?;
    attach("sysfs", "/sys", "sysfs", None)?;
    let root = Path::new("/sys/fs/cgroup");
    if let [only] = hierarchies
        && only.is_unified()
    {
        attach("cgroup2", "/sys/fs/cgroup", "cgroup2", None)?;
        // Processes may not stay in the root: it is to have children with controllers.
        make_dir(&root.join("init"))?;
        fs::write(root.join("init/cgroup.procs"), "0").context("leave the root cgroup")?;
        return cgroup::enable_controllers(root);
    }
    attach("tmpfs", "/sys/fs/cgroup", "tmpfs", Some("mode=0755"))?;
    for hierarchy in hierarchies {
        let Ok(relative) = hierarchy.mount_point.strip_prefix(root) else {
            continue;
        };
        let target = root.join(relative);
        make_dir(&target)?;
        let kind = if hierarchy.options.is_some() {
            "cgroup"
        } else {
            "cgroup2"
        };
        let target = target.to_string_lossy();
        attach("cgroup", &target, kind, hierarchy.options.as_deref())?;
    }
    Ok(())
}

fn attach(source: &str, target: &str, kind: &str, options: Option<&str>) -> Result<()> {
    let flags = match kind {
        "proc" | "sysfs" | "cgroup" | "cgroup2" => {
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC
        }
        "tmpfs" => MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        _ => MsFlags::empty(),
    };
    mount(Some(source), target, Some(kind), flags, options).with_context(|| {
        format!(
            "mount {kind} on {target} ({})",
            options.unwrap_or("no options")
        )
    })
}

fn remount(target: &str, propagation: MsFlags) -> Result<()> {
    let flags = MsFlags::MS_REC | propagation;
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("set the propagation of {target}"))
}

fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .with_context(|| format!("create {}", path.display()))
}
