// SPDX-License-Identifier: Apache-2.0
//! Mounts, cgroups, and the folders that programs leave things in.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::{Context, Result};

use super::{Kind, Snapshot};

/// Searched whole, but for [`APART`] and what is mounted below them. Not /tmp: it
/// is the machine's, and nothing tells who made what is in it.
const FOLDERS: [&str; 8] = [
    // podhull's and containerd's run folders, FIFOs, sockets, netns, CNI's addresses, runc's state.
    "/run",
    "/dev/shm",
    // What CNI remembers about each attachment.
    "/var/lib/cni",
    "/var/log/pods",
    "/var/lib/kubelet",
    "/var/lib/containerd/io.containerd.grpc.v1.cri",
    "/var/lib/containerd/io.containerd.runtime.v2.task",
    "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots",
];
/// What changes with use and is no leak: host-local's note of the address it
/// gave last, and the content of a snapshot.
const APART: [&str; 1] = ["last_reserved_ip."];

pub(super) fn look(snapshot: &mut Snapshot) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read mountinfo")?;
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let kind = line
            .split_once(" - ")
            .and_then(|(_, tail)| tail.split(' ').next());
        if let (Some(point), Some(kind)) = (fields.get(4), kind) {
            snapshot.add(Kind::Mount, format!("{point} ({kind})"));
        }
    }
    cgroups(snapshot, Path::new("/sys/fs/cgroup"))?;
    for folder in FOLDERS {
        // Only the names of snapshots: what is in them is the image's.
        let depth = if folder.ends_with("/snapshots") {
            1
        } else {
            32
        };
        walk(snapshot, Path::new(folder), depth)?;
    }
    abstract_sockets(snapshot)
}

/// Every cgroup below the node's own, in every hierarchy.
fn cgroups(snapshot: &mut Snapshot, folder: &Path) -> Result<()> {
    for entry in entries(folder)? {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            snapshot.add(Kind::Cgroup, entry.path().display().to_string());
            cgroups(snapshot, &entry.path())?;
        }
    }
    Ok(())
}

fn walk(snapshot: &mut Snapshot, folder: &Path, depth: usize) -> Result<()> {
    for entry in entries(folder)? {
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        let name = entry.file_name();
        if APART
            .iter()
            .any(|apart| name.to_string_lossy().starts_with(apart))
        {
            continue;
        }
        let word = match kind {
            kind if kind.is_dir() => "folder",
            kind if kind.is_symlink() => "link",
            kind if kind.is_socket() => "socket",
            kind if kind.is_fifo() => "FIFO",
            _ => "file",
        };
        let path = entry.path();
        snapshot.add(Kind::File, format!("{word} {}", path.display()));
        // A mount below, as a container's root, is known as a mount.
        if kind.is_dir() && depth > 1 && !mounted(&path, folder) {
            walk(snapshot, &path, depth - 1)?;
        }
    }
    Ok(())
}

fn mounted(path: &Path, parent: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (fs::metadata(path), fs::metadata(parent)) {
        (Ok(path), Ok(parent)) => path.dev() != parent.dev(),
        // Gone meanwhile: nothing to look into.
        _ => true,
    }
}

fn entries(folder: &Path) -> Result<Vec<fs::DirEntry>> {
    match fs::read_dir(folder) {
        Ok(entries) => Ok(entries.flatten().collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        // A cgroup that is being removed.
        Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENODEV as i32) => {
            Ok(Vec::new())
        }
        Err(error) => Err(error).with_context(|| format!("read {}", folder.display())),
    }
}

/// Listening sockets whose name is not a file, in the node's network namespace.
fn abstract_sockets(snapshot: &mut Snapshot) -> Result<()> {
    const LISTENING: &str = "00010000";
    let sockets = fs::read_to_string("/proc/net/unix").context("read /proc/net/unix")?;
    for line in sockets.lines().skip(1) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let (Some(flags), Some(name)) = (fields.get(3), fields.get(7))
            && *flags == LISTENING
            && name.starts_with('@')
        {
            snapshot.add(Kind::AbstractSocket, (*name).to_owned());
        }
    }
    Ok(())
}
