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
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use podhull_types::{ContainerId, Deadline};

use crate::error::StorageError;
use crate::mounts::{self, Unmounted};
use crate::table;
use crate::volume::{Propagation, RootfsMount, Volume};

const ROOTFS: &str = "rootfs";

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
        let point = self.folder(container)?.join(ROOTFS);
        let mut containers = self.containers();
        let made = containers.entry(container.clone()).or_default();
        fs::create_dir(self.writable(&point)).map_err(StorageError::path("make folder", &point))?;
        made.points.push(point.clone());
        if entries.is_empty() {
            return Err(StorageError::NoRootfs);
        }
        for entry in entries {
            mounts::mount_rootfs(entry, &point)?;
        }
        Ok(self.relative(&point))
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
        let folder = self.folder(container)?;
        let mut containers = self.containers();
        let made = containers.entry(container.clone()).or_default();
        let point = folder.join(format!("v{}", made.points.len()));
        mounts::make_point(&volume.source, &self.writable(&point))?;
        made.points.push(point.clone());
        mounts::bind(volume, &self.writable(&point), &point)?;
        Ok(self.relative(&point))
    }

    /// Writes a file that the container sees and may write to, as to those that
    /// containerd makes; `name` has no slash.
    ///
    /// # Errors
    /// [`StorageError::Path`] if it cannot be written.
    pub fn write_file(
        &self,
        container: &ContainerId,
        name: &str,
        content: &[u8],
    ) -> Result<GuestPath, StorageError> {
        let path = self.folder(container)?.join(name);
        let writable = self.writable(&path);
        let written = fs::write(&writable, content)
            .and_then(|()| fs::set_permissions(&writable, fs::Permissions::from_mode(0o644)));
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
        _by: Deadline,
    ) -> Result<RemoveReport, StorageError> {
        let made = self.containers().remove(container).unwrap_or_default();
        self.remove(container, &made)
    }

    fn remove(&self, container: &ContainerId, made: &Made) -> Result<RemoveReport, StorageError> {
        let folder = self.root.join(container.as_str());
        let mut report = RemoveReport::default();
        unmount_below(&folder, &mut report)?;
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
    pub fn teardown(&self, _by: Deadline) -> Result<RemoveReport, StorageError> {
        let containers = std::mem::take(&mut *self.containers());
        let mut report = RemoveReport::default();
        for (container, made) in containers {
            let removed = self.remove(&container, &made)?;
            report.detached.extend(removed.detached);
            report.problems.extend(removed.problems);
        }
        unmount_below(&self.root, &mut report)?;
        report.note(&self.root, fs::remove_dir(&self.root));
        Ok(report)
    }
}

/// Undoes the mounts at and below `folder`, the last first.
fn unmount_below(folder: &Path, report: &mut RemoveReport) -> Result<(), StorageError> {
    for point in table::below(folder)? {
        match mounts::unmount(&point) {
            Ok(Unmounted::Detached) => report.detached.push(point),
            Ok(_) => {}
            Err(error) => report.problems.push(error.to_string()),
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
pub fn sweep(root: &Path, _by: Deadline) -> Result<RemoveReport, StorageError> {
    let mut report = RemoveReport::default();
    if !root.exists() {
        return Ok(report);
    }
    unmount_below(root, &mut report)?;
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
mod tests {
    use std::time::Duration;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(5))
    }

    /// Runs `test` on a thread with a mount namespace of its own.
    fn in_own_mounts(test: impl FnOnce(&Path) + Send) {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP: mounts need root");
            return;
        }
        std::thread::scope(|scope| {
            scope.spawn(|| {
                unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
                let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
                let none = None::<&str>;
                nix::mount::mount(none, "/", none, private, none).unwrap();
                let folder = tempfile::tempdir().unwrap();
                test(folder.path());
            });
        });
    }

    fn volume(source: &Path, read_only: bool) -> Volume {
        Volume {
            source: source.into(),
            recursive: true,
            read_only,
            recursive_read_only: false,
            propagation: Propagation::Private,
        }
    }

    #[test]
    fn a_tree_leaves_nothing_and_no_volume_is_touched() {
        in_own_mounts(|folder| {
            let precious = folder.join("precious");
            fs::create_dir(&precious).unwrap();
            fs::write(precious.join("data"), "kept").unwrap();
            let root = folder.join("share");
            let tree = SharedTree::create(&root).unwrap();
            let id = ContainerId::new("c1").unwrap();
            let rootfs = RootfsMount {
                fstype: "tmpfs".into(),
                source: "tmpfs".into(),
                options: vec!["size=64k".into()],
            };
            let path = tree.mount_rootfs(&id, &[rootfs]).unwrap();
            assert_eq!(path.as_path(), Path::new("c1/rootfs"));
            let bound = tree.bind(&id, &volume(&precious, false)).unwrap();
            assert!(root.join(bound.as_path()).join("data").exists());
            let file = tree
                .bind(&id, &volume(&precious.join("data"), true))
                .unwrap();
            assert!(fs::write(root.join(file.as_path()), "x").is_err());
            let hosts = tree.write_file(&id, "hosts", b"127.0.0.1 x").unwrap();
            fs::write(root.join(hosts.as_path()), "127.0.0.1 x").unwrap();
            assert_eq!(
                fs::read(root.join(hosts.as_path())).unwrap(),
                b"127.0.0.1 x"
            );
            // What the guest sees of the tree itself is read-only.
            assert!(fs::write(root.join("c1/evil"), "x").is_err());
            assert!(fs::rename(root.join("c1"), root.join("c2")).is_err());

            let report = tree.remove_container(&id, soon()).unwrap();
            assert_eq!(report, RemoveReport::default());
            assert!(!root.join("c1").exists());
            assert!(tree.remove_container(&id, soon()).unwrap().is_clean());
            assert!(tree.teardown(soon()).unwrap().is_clean());
            assert!(!root.exists());
            assert_eq!(fs::read(precious.join("data")).unwrap(), b"kept");
        });
    }

    #[test]
    fn a_missing_source_is_named_and_what_was_made_goes() {
        in_own_mounts(|folder| {
            let root = folder.join("share");
            let tree = SharedTree::create(&root).unwrap();
            let id = ContainerId::new("c1").unwrap();
            let absent = folder.join("absent");
            let error = tree.bind(&id, &volume(&absent, false)).unwrap_err();
            assert!(error.to_string().contains("absent"), "{error}");
            assert!(matches!(
                tree.mount_rootfs(&id, &[]),
                Err(StorageError::NoRootfs)
            ));
            assert!(tree.teardown(soon()).unwrap().is_clean());
            assert!(!root.exists());
        });
    }

    #[test]
    fn an_image_with_many_layers_is_mounted() {
        in_own_mounts(|folder| {
            // Overlays have no overlay below them: the layers are on a tmpfs.
            let layers = folder.join("a-folder-with-a-long-name-as-containerd-has-one");
            fs::create_dir(&layers).unwrap();
            let none = None::<&str>;
            let kind = Some("tmpfs");
            nix::mount::mount(kind, &layers, kind, nix::mount::MsFlags::empty(), none).unwrap();
            let mut lower = Vec::new();
            for number in 0..100 {
                let layer = layers.join(format!("snapshots-{number}/fs"));
                fs::create_dir_all(&layer).unwrap();
                fs::write(layer.join(format!("file-{number}")), "x").unwrap();
                lower.push(layer.to_string_lossy().into_owned());
            }
            for name in ["upper", "work"] {
                fs::create_dir(layers.join(name)).unwrap();
            }
            let rootfs = RootfsMount {
                fstype: "overlay".into(),
                source: "overlay".into(),
                options: vec![
                    format!("upperdir={}/upper", layers.display()),
                    format!("workdir={}/work", layers.display()),
                    format!("lowerdir={}", lower.join(":")),
                ],
            };
            let root = folder.join("share");
            let tree = SharedTree::create(&root).unwrap();
            let id = ContainerId::new("c1").unwrap();
            let path = root.join(tree.mount_rootfs(&id, &[rootfs]).unwrap().as_path());
            assert!(path.join("file-0").exists() && path.join("file-99").exists());
            fs::write(path.join("new"), "x").unwrap();
            assert!(layers.join("upper/new").exists());
            assert!(tree.teardown(soon()).unwrap().is_clean());
        });
    }

    #[test]
    fn a_sweep_keeps_what_is_not_empty() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("share");
        fs::create_dir_all(root.join("c1/rootfs/var")).unwrap();
        assert!(!sweep(&root, soon()).unwrap().is_clean());
        assert!(root.join("c1/rootfs/var").exists());
        fs::remove_dir(root.join("c1/rootfs/var")).unwrap();
        assert!(sweep(&root, soon()).unwrap().is_clean());
        assert!(sweep(&root, soon()).unwrap().is_clean());
        assert!(!root.exists());
    }

    #[test]
    fn a_busy_mount_is_detached() {
        in_own_mounts(|folder| {
            let root = folder.join("share");
            let tree = SharedTree::create(&root).unwrap();
            let id = ContainerId::new("c1").unwrap();
            let rootfs = RootfsMount {
                fstype: "tmpfs".into(),
                source: "tmpfs".into(),
                options: vec![],
            };
            let path = root.join(tree.mount_rootfs(&id, &[rootfs]).unwrap().as_path());
            let held = fs::File::create(path.join("held")).unwrap();
            let report = tree.remove_container(&id, soon()).unwrap();
            assert_eq!(report.detached.len(), 1);
            assert!(report.is_clean(), "{report:?}");
            drop(held);
            assert!(tree.teardown(soon()).unwrap().is_clean());
        });
    }
}
