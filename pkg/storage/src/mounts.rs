// SPDX-License-Identifier: Apache-2.0
//! Making and undoing mounts.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use podhull_types::{Deadline, UserNamespace};

use crate::error::StorageError;
use crate::idmap::{self, Shown, UserNamespaces};
use crate::volume::{Propagation, RootfsMount, Volume};

const NONE: Option<&str> = None;
/// The step of which most can fail.
const ROOTFS: &str = "mount the root filesystem at";
/// Pause between two tries to unmount: nothing tells when the last user is gone.
const RETRY: Duration = Duration::from_millis(2);
/// Most bytes of options that the kernel takes.
const PAGE: usize = 4096;

/// Options of `mount` that are flags to the kernel (util-linux' `mount(8)`).
const FLAGS: [(&str, MsFlags); 14] = [
    ("ro", MsFlags::MS_RDONLY),
    ("nosuid", MsFlags::MS_NOSUID),
    ("nodev", MsFlags::MS_NODEV),
    ("noexec", MsFlags::MS_NOEXEC),
    ("sync", MsFlags::MS_SYNCHRONOUS),
    ("dirsync", MsFlags::MS_DIRSYNC),
    ("noatime", MsFlags::MS_NOATIME),
    ("nodiratime", MsFlags::MS_NODIRATIME),
    ("relatime", MsFlags::MS_RELATIME),
    ("strictatime", MsFlags::MS_STRICTATIME),
    ("bind", MsFlags::MS_BIND),
    ("rbind", MsFlags::MS_BIND.union(MsFlags::MS_REC)),
    ("rw", MsFlags::empty()),
    ("defaults", MsFlags::empty()),
];

/// Splits options into flags and what the filesystem itself reads.
fn split_options(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match FLAGS.iter().find(|(name, _)| name == option) {
            Some((_, flag)) => flags |= *flag,
            None => data.push(option.as_str()),
        }
    }
    (flags, data.join(","))
}

/// Mounts one of a snapshotter's mounts at `target`. `below` is the same mount
/// point under the shared tree, for what nobody else is to see.
pub(crate) fn mount_rootfs(
    entry: &RootfsMount,
    namespaces: &UserNamespaces,
    below: &Path,
    target: &Path,
) -> Result<(), StorageError> {
    let (users, options) = idmap::take_mapping(&entry.options)?;
    if let Some(users) = users {
        return mount_mapped(entry, users, &options, namespaces, below, target);
    }
    let (mut flags, data) = split_options(&options);
    let is_bind = is_bind(entry, flags);
    if is_bind {
        flags |= MsFlags::MS_BIND;
    }
    let fstype = (!is_bind).then_some(entry.fstype.as_str());
    let data = Some(data).filter(|data| !data.is_empty());
    let mounted = match data {
        Some(data) if data.len() >= PAGE => mount_long(entry, target, flags, &data),
        data => mount(
            Some(entry.source.as_str()),
            target,
            fstype,
            flags,
            data.as_deref(),
        ),
    };
    mounted.map_err(StorageError::path(ROOTFS, target))?;
    // The kernel ignores other flags while it binds.
    if is_bind && flags.contains(MsFlags::MS_RDONLY) {
        let again = flags | MsFlags::MS_REMOUNT;
        mount(NONE, target, NONE, again, NONE).map_err(StorageError::path(ROOTFS, target))?;
    }
    Ok(())
}

fn is_bind(entry: &RootfsMount, flags: MsFlags) -> bool {
    entry.fstype == "bind" || flags.contains(MsFlags::MS_BIND)
}

/// The same with the owners of `users`. An overlay itself shows whose its layers'
/// files are: those are mapped.
fn mount_mapped(
    entry: &RootfsMount,
    users: UserNamespace,
    options: &[String],
    namespaces: &UserNamespaces,
    below: &Path,
    target: &Path,
) -> Result<(), StorageError> {
    let (flags, _) = split_options(options);
    if is_bind(entry, flags) {
        let copy = namespaces.show(&Shown {
            source: Path::new(&entry.source),
            users,
            recursive: flags.contains(MsFlags::MS_REC),
            all: false,
            read_only: flags.contains(MsFlags::MS_RDONLY),
        })?;
        return idmap::put(&copy, target).map_err(StorageError::path(ROOTFS, target));
    }
    if entry.fstype != "overlay" {
        let reason = format!("a {} cannot show other owners", entry.fstype);
        return Err(StorageError::RootfsOwners(reason));
    }
    let (folder, options) = idmap::layers(options)?;
    let copy = namespaces.show(&Shown {
        source: &folder,
        users,
        recursive: false,
        all: false,
        read_only: true,
    })?;
    idmap::put(&copy, below).map_err(StorageError::path(ROOTFS, target))?;
    let (flags, data) = split_options(&options);
    let mounted = mount_in(below, entry, target, flags, &data);
    // The overlay has copies of its own.
    let detached = umount2(below, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH);
    mounted
        .and(detached)
        .map_err(StorageError::path(ROOTFS, target))
}

/// Mounts with options that are too long for the kernel, as those of an image
/// with many layers: their names are made relative to the folder that they share.
fn mount_long(entry: &RootfsMount, target: &Path, flags: MsFlags, data: &str) -> nix::Result<()> {
    let (folder, data) = shorten(data).ok_or(nix::Error::E2BIG)?;
    mount_in(&folder, entry, target, flags, &data)
}

/// Mounts with options whose names are relative to `folder`. A thread of its own
/// works there.
fn mount_in(
    folder: &Path,
    entry: &RootfsMount,
    target: &Path,
    flags: MsFlags,
    data: &str,
) -> nix::Result<()> {
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(folder)?;
            let fstype = Some(entry.fstype.as_str());
            mount(
                Some(entry.source.as_str()),
                target,
                fstype,
                flags,
                Some(data),
            )
        });
        work.join().unwrap_or(Err(nix::Error::EIO))
    })
}

/// The folder that all of `paths` are in, at whatever depth.
pub(crate) fn shared_folder<'a>(paths: impl Iterator<Item = &'a str>) -> Option<PathBuf> {
    paths
        .map(|path| Path::new(path).parent().unwrap_or(Path::new("/")))
        .map(Path::to_path_buf)
        .reduce(|shared, path| {
            let parts = shared.components().zip(path.components());
            parts.take_while(|(a, b)| a == b).map(|(a, _)| a).collect()
        })
}

/// The folder that all layers of an overlay are in, and the options with names
/// relative to it; `None` if they share none or are still too long.
fn shorten(data: &str) -> Option<(PathBuf, String)> {
    let is_layers = |option: &&str| {
        ["lowerdir=", "upperdir=", "workdir="]
            .iter()
            .any(|key| option.starts_with(key))
    };
    let paths = data
        .split(',')
        .filter(is_layers)
        .filter_map(|option| option.split_once('='))
        .flat_map(|(_, paths)| paths.split(':'));
    let shared = shared_folder(paths)?;
    let prefix = format!("{}/", shared.to_str()?.trim_end_matches('/'));
    let options: Vec<_> = data
        .split(',')
        .map(|option| {
            if is_layers(&option) {
                option.replace(&prefix, "")
            } else {
                option.into()
            }
        })
        .collect();
    let short = options.join(",");
    (prefix.len() > 1 && short.len() < PAGE).then_some((shared, short))
}

/// Binds a volume to `target`, which exists and is of the same kind. `below` is
/// the same mount point, under the shared tree: there the mount is made ready.
/// Made in the tree, the file server's copy would already follow the host's
/// mounts, and go on following them.
pub(crate) fn bind(
    volume: &Volume,
    namespaces: &UserNamespaces,
    below: &Path,
    target: &Path,
) -> Result<(), StorageError> {
    let failed = |source| StorageError::Source {
        path: volume.source.clone(),
        source,
    };
    match volume.ids {
        None => {
            let mut flags = MsFlags::MS_BIND;
            if volume.recursive {
                flags |= MsFlags::MS_REC;
            }
            mount(Some(&volume.source), below, NONE, flags, NONE)
                .map_err(|errno| failed(errno.into()))?;
        }
        // The kernel maps only what is not in a tree of mounts yet.
        Some(ids) => {
            let copy = namespaces.show(&Shown {
                source: &volume.source,
                users: ids.users,
                recursive: volume.recursive,
                all: ids.recursive,
                read_only: false,
            })?;
            idmap::put(&copy, below).map_err(failed)?;
        }
    }
    let placed = place(volume, below, target);
    if placed.is_err() {
        let undone = umount2(below, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH);
        tracing::debug!(?undone, "a mount that could not be placed");
    }
    placed
}

/// Makes the mount at `below` what `volume` says, then moves it to `target`.
fn place(volume: &Volume, below: &Path, target: &Path) -> Result<(), StorageError> {
    set_propagation(volume.propagation, below)
        .map_err(StorageError::path("set the propagation of", target))?;
    if volume.read_only {
        make_read_only(below, target, volume.recursive_read_only)
            .map_err(StorageError::path("make read-only", target))?;
    }
    mount(Some(below), target, NONE, MsFlags::MS_MOVE, NONE)
        .map_err(StorageError::path("place the mount", target))
}

/// A slave that is shared again passes on to the server what it gets.
fn set_propagation(propagation: Propagation, at: &Path) -> nix::Result<()> {
    let steps: &[MsFlags] = match propagation {
        Propagation::Private => &[MsFlags::MS_PRIVATE],
        Propagation::HostToContainer => &[MsFlags::MS_SLAVE, MsFlags::MS_SHARED],
    };
    steps
        .iter()
        .try_for_each(|step| mount(NONE, at, NONE, *step | MsFlags::MS_REC, NONE))
}

/// Makes the mount at `below` read-only, with what is mounted below it if asked
/// for. The kernel's table knows it by the name of `target`.
fn make_read_only(below: &Path, target: &Path, recursive: bool) -> io::Result<()> {
    let mut points = vec![below.to_path_buf()];
    if recursive {
        let listed = crate::table::below(target).map_err(io::Error::other)?;
        let inner = listed
            .iter()
            .filter_map(|point| point.strip_prefix(target).ok());
        points.extend(inner.map(|point| below.join(point)));
    }
    for point in points {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(NONE, &point, NONE, flags, NONE)?;
    }
    Ok(())
}

/// Makes `folder` a read-only mount of its own whose mounts are passed on.
pub(crate) fn make_shared(folder: &Path) -> Result<(), StorageError> {
    let failed = || StorageError::path("make a shared mount of", folder);
    mount(Some(folder), folder, NONE, MsFlags::MS_BIND, NONE).map_err(failed())?;
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    for step in [read_only, MsFlags::MS_PRIVATE, MsFlags::MS_SHARED] {
        mount(NONE, folder, NONE, step, NONE).map_err(failed())?;
    }
    Ok(())
}

/// Undoes the topmost mount at `target`. One that is in use until `by` is
/// detached: it ends with its last user, and the name is free at once.
pub(crate) fn unmount(target: &Path, by: Deadline) -> Result<Unmounted, StorageError> {
    loop {
        match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => return Ok(Unmounted::Clean),
            Err(nix::Error::EBUSY) if by.passed() => break,
            Err(nix::Error::EBUSY) => std::thread::sleep(RETRY),
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(Unmounted::Absent),
            Err(errno) => return Err(StorageError::path("unmount", target)(errno)),
        }
    }
    umount2(target, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH)
        .map_err(StorageError::path("detach", target))?;
    Ok(Unmounted::Detached)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unmounted {
    Clean,
    Detached,
    Absent,
}

/// An empty mount point of the kind that `source` is.
pub(crate) fn make_point(source: &Path, target: &Path) -> Result<(), StorageError> {
    let kind = fs::metadata(source).map_err(|error| StorageError::Source {
        path: source.into(),
        source: error,
    })?;
    let made = if kind.is_dir() {
        fs::create_dir(target)
    } else {
        fs::write(target, "")
    };
    made.map_err(StorageError::path("make", target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_many_layers_are_shortened() {
        let layer = |number| format!("/var/lib/containerd/snapshots/{number}/fs");
        let layers: Vec<_> = (0..200).map(layer).collect();
        let data = format!(
            "workdir=/var/lib/containerd/snapshots/9/work,upperdir={},index=off,lowerdir={}",
            layer(9),
            layers.join(":")
        );
        assert!(data.len() > PAGE);
        let (folder, short) = shorten(&data).unwrap();
        assert_eq!(folder, Path::new("/var/lib/containerd/snapshots"));
        assert!(short.starts_with("workdir=9/work,upperdir=9/fs,index=off,lowerdir=0/fs:1/fs:"));
        assert!(
            shorten("lowerdir=/a:/b").is_none(),
            "they share the root only"
        );
    }

    #[test]
    fn options_are_split() {
        let options = ["ro", "lowerdir=/a:/b", "noexec", "index=off"].map(str::to_owned);
        let (flags, data) = split_options(&options);
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC);
        assert_eq!(data, "lowerdir=/a:/b,index=off");
        let (flags, _) = split_options(&["rbind".to_owned()]);
        assert!(flags.contains(MsFlags::MS_BIND | MsFlags::MS_REC));
    }
}
