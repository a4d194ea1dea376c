// SPDX-License-Identifier: Apache-2.0
//! The tree of one sandbox.
//!
//! `<tree>/<container>/rootfs`, `<tree>/<container>/v<number>` for volumes, and
//! files that were written beside them. The tree itself is served read-only: a
//! guest that could rename or link there could choose where the host mounts.
//! The host makes its mount points through a descriptor of the folder below.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use podhull_types::{ContainerId, Deadline, UserNamespace, chain};

use crate::error::StorageError;
use crate::idmap::UserNamespaces;
use crate::mounts::{self, Unmounted};
use crate::table;
use crate::volume::{Propagation, RootfsMount, Volume};

const ROOTFS: &str = "rootfs";
/// How long the file server may take to close what the guest has given back.
const GIVEN_BACK: Duration = Duration::from_millis(500);

/// A path relative to the tree, as the guest has it below its mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestPath(PathBuf);

impl GuestPath {
    /// The path, relative.
    #[must_use]
    pub fn as_path(&self) -> &Path {
        &self.0
    }
}

/// What removing a container or a tree met.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RemoveReport {
    /// Mounts that were in use and were detached.
    pub detached: Vec<PathBuf>,
    /// What could not be removed, with the reason.
    pub problems: Vec<String>,
}

impl RemoveReport {
    /// True if everything is gone.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }

    fn note(&mut self, path: &Path, result: io::Result<()>) {
        match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                self.problems.push(format!("{}: {error}", path.display()));
            }
            _ => {}
        }
    }
}

/// What was made for a container, in order.
#[derive(Debug, Default)]
struct Made {
    points: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

/// The tree of a sandbox. Ended by [`teardown`](Self::teardown); dropped
/// without it, its mounts end with the mount namespace of the process.
#[derive(Debug)]
pub struct SharedTree {
    root: PathBuf,
    /// The same folder, without the read-only mount over it.
    below: File,
    containers: Mutex<HashMap<ContainerId, Made>>,
    namespaces: UserNamespaces,
}

impl SharedTree {
    /// Makes the tree at `root`, a folder below one that exists.
    ///
    /// # Errors
    /// [`StorageError::Path`] if it cannot be made.
    pub fn create(root: &Path) -> Result<Self, StorageError> {
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(root);
        made.map_err(StorageError::path("make folder", root))?;
        let below = File::open(root).map_err(StorageError::path("open", root))?;
        mounts::make_shared(root)?;
        Ok(Self {
            root: root.into(),
            below,
            containers: Mutex::default(),
            namespaces: UserNamespaces::default(),
        })
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<ContainerId, Made>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The name by which the host can write to `path` of the tree.
    fn writable(&self, path: &Path) -> PathBuf {
        let below = format!("/proc/self/fd/{}", self.below.as_raw_fd());
        Path::new(&below).join(self.relative(path).0)
    }

    fn folder(&self, container: &ContainerId) -> Result<PathBuf, StorageError> {
        let folder = self.root.join(container.as_str());
        match fs::create_dir(self.writable(&folder)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(StorageError::path("make folder", folder)(error))
            }
            _ => Ok(folder),
        }
    }

    fn relative(&self, path: &Path) -> GuestPath {
        GuestPath(path.strip_prefix(&self.root).unwrap_or(path).into())
    }

    /// Notes a mount point to be made for a container: its folder and the number
    /// of those before it give its name. What makes it may block for as long as a
    /// server is away, and holds nobody else up.
    fn note(
        &self,
        container: &ContainerId,
        name: impl FnOnce(usize) -> String,
    ) -> Result<PathBuf, StorageError> {
        let folder = self.folder(container)?;
        let mut containers = self.containers();
        let made = containers.entry(container.clone()).or_default();
        let point = folder.join(name(made.points.len()));
        made.points.push(point.clone());
        Ok(point)
    }

    /// What came of a mount at `point`. If its container was removed meanwhile,
    /// whoever did that has not seen it.
    fn made(
        &self,
        container: &ContainerId,
        point: PathBuf,
        mounted: Result<(), StorageError>,
    ) -> Result<GuestPath, StorageError> {
        let noted = self
            .containers()
            .get(container)
            .is_some_and(|made| made.points.contains(&point));
        if noted {
            return mounted.map(|()| self.relative(&point));
        }
        let late = Made {
            points: vec![point],
            files: vec![],
        };
        let report = self.remove(container, &late, Deadline::after(Duration::ZERO))?;
        tracing::warn!(%container, ?report, "a mount came after its container's end");
        mounted.and(Err(StorageError::Removed(container.clone())))
    }

    /// Mounts a container's root filesystem from the snapshotter's mounts.
    ///
    /// # Errors
    /// [`StorageError`] naming the mount; what was made stays for
    /// [`remove_container`](Self::remove_container).
    pub fn mount_rootfs(
        &self,
        container: &ContainerId,
        entries: &[RootfsMount],
    ) -> Result<GuestPath, StorageError> {
        let point = self.note(container, |_| ROOTFS.into())?;
        let below = self.writable(&point);
        let mount = || {
            fs::create_dir(&below).map_err(StorageError::path("make folder", &point))?;
            if entries.is_empty() {
                return Err(StorageError::NoRootfs);
            }
            let mut entries = entries.iter();
            entries
                .try_for_each(|entry| mounts::mount_rootfs(entry, &self.namespaces, &below, &point))
        };
        let mounted = mount();
        self.made(container, point, mounted)
    }

    /// Binds a volume.
    ///
    /// # Errors
    /// [`StorageError::Source`] if the source is missing or cannot be bound.
    pub fn bind(
        &self,
        container: &ContainerId,
        volume: &Volume,
    ) -> Result<GuestPath, StorageError> {
        let point = self.note(container, |number| format!("v{number}"))?;
        let below = self.writable(&point);
        let mounted = mounts::make_point(&volume.source, &below)
            .and_then(|()| mounts::bind(volume, &self.namespaces, &below, &point));
        self.made(container, point, mounted)
    }

    /// Writes a file that the container sees and that its root, `users`' or the
    /// host's, may write to, as to those that containerd makes; `name` has no slash.
    ///
    /// # Errors
    /// [`StorageError::Path`] if it cannot be written.
    pub fn write_file(
        &self,
        container: &ContainerId,
        name: &str,
        content: &[u8],
        users: Option<UserNamespace>,
    ) -> Result<GuestPath, StorageError> {
        let path = self.folder(container)?.join(name);
        let writable = self.writable(&path);
        let written = fs::write(&writable, content)
            .and_then(|()| fs::set_permissions(&writable, fs::Permissions::from_mode(0o644)))
            .and_then(|()| match users {
                Some(users) => chown(&writable, Some(users.uids.root()), Some(users.gids.root())),
                None => Ok(()),
            });
        {
            let mut containers = self.containers();
            let made = containers.entry(container.clone()).or_default();
            made.files.push(path.clone());
        }
        written.map_err(StorageError::path("write", &path))?;
        // A mount of its own: the tree around it is read-only.
        let volume = Volume {
            source: writable,
            recursive: false,
            read_only: false,
            recursive_read_only: false,
            propagation: Propagation::Private,
            ids: None,
        };
        self.bind(container, &volume)
    }

    /// Undoes everything of a container. Succeeds if there is nothing.
    ///
    /// # Errors
    /// If the table of mounts cannot be read; all else is in the report.
    pub fn remove_container(
        &self,
        container: &ContainerId,
        by: Deadline,
    ) -> Result<RemoveReport, StorageError> {
        let made = self.containers().remove(container).unwrap_or_default();
        self.remove(container, &made, by)
    }

    fn remove(
        &self,
        container: &ContainerId,
        made: &Made,
        by: Deadline,
    ) -> Result<RemoveReport, StorageError> {
        let folder = self.root.join(container.as_str());
        let mut report = RemoveReport::default();
        unmount_below(&folder, by, &mut report)?;
        for point in &made.points {
            let point = self.writable(point);
            let is_dir = fs::symlink_metadata(&point).is_ok_and(|meta| meta.is_dir());
            let removed = if is_dir {
                fs::remove_dir(&point)
            } else {
                fs::remove_file(&point)
            };
            report.note(&point, removed);
        }
        for file in &made.files {
            report.note(file, fs::remove_file(self.writable(file)));
        }
        report.note(&folder, fs::remove_dir(self.writable(&folder)));
        Ok(report)
    }

    /// Undoes everything.
    ///
    /// # Errors
    /// If the table of mounts cannot be read; all else is in the report.
    pub fn teardown(&self, by: Deadline) -> Result<RemoveReport, StorageError> {
        let containers = std::mem::take(&mut *self.containers());
        let mut report = RemoveReport::default();
        for (container, made) in containers {
            let removed = self.remove(&container, &made, by)?;
            report.detached.extend(removed.detached);
            report.problems.extend(removed.problems);
        }
        unmount_below(&self.root, by, &mut report)?;
        report.note(&self.root, fs::remove_dir(&self.root));
        Ok(report)
    }
}

/// Undoes the mounts at and below `folder`, the last first. What is in use is
/// waited for once, for all of them.
fn unmount_below(
    folder: &Path,
    by: Deadline,
    report: &mut RemoveReport,
) -> Result<(), StorageError> {
    let given_back = by.at_most(GIVEN_BACK);
    for point in table::below(folder)? {
        match mounts::unmount(&point, given_back) {
            Ok(Unmounted::Detached) => report.detached.push(point),
            Ok(_) => {}
            Err(error) => report.problems.push(chain(&error)),
        }
    }
    Ok(())
}

/// Removes what a tree left whose process is gone: mounts, empty mount points
/// and the folders of ours. A file with content that a guest could have written
/// cannot be there, and one that is stays and is reported. Succeeds if there is
/// nothing.
///
/// # Errors
/// If the table of mounts cannot be read.
pub fn sweep(root: &Path, by: Deadline) -> Result<RemoveReport, StorageError> {
    let mut report = RemoveReport::default();
    if !root.exists() {
        return Ok(report);
    }
    unmount_below(root, by, &mut report)?;
    for container in entries(root) {
        for entry in entries(&container) {
            let is_dir = fs::symlink_metadata(&entry).is_ok_and(|meta| meta.is_dir());
            // A folder must be empty; a file is a mount point or one of ours.
            let removed = if is_dir {
                fs::remove_dir(&entry)
            } else {
                fs::remove_file(&entry)
            };
            report.note(&entry, removed);
        }
        report.note(&container, fs::remove_dir(&container));
    }
    report.note(root, fs::remove_dir(root));
    Ok(report)
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let read = fs::read_dir(folder).into_iter().flatten();
    read.filter_map(Result::ok)
        .map(|entry| entry.path())
        .collect()
}

#[cfg(test)]
mod tests;
