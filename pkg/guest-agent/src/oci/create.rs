// SPDX-License-Identifier: Apache-2.0
//! `oci create`: makes a container whose init process waits for Start.

use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::sys::wait::{WaitStatus, waitpid};
use oci_spec::runtime::{Mount, Process};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2};
use serde::{Deserialize, Serialize};

use super::executor::ReportingExecutor;
use super::{exec, floor, lookup};
use crate::error::GuestError;
use crate::helper::{Line, Report, receive};
use crate::pod::{self, Mapping};
use crate::sys;

/// What the helper is to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Task {
    /// The container's id.
    pub id: String,
    /// Folder with config.json.
    pub bundle: PathBuf,
    /// Folder for libcontainer's state.
    pub state: PathBuf,
    /// Where a terminal's other end is to be sent.
    pub console: Option<PathBuf>,
    /// The process's working directory.
    pub cwd: WorkingDirectory,
    /// The process, as the bundle has it.
    pub process: Option<Process>,
    /// What the pod's user namespace maps.
    pub(crate) users: Option<Mapping>,
}

/// A container's working directory, to be made if it is absent (runc's
/// `prepareRootfs`), where the container will see it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingDirectory {
    /// As the container names it.
    path: PathBuf,
    /// What is mounted above it: the root filesystem, or a volume's source.
    tree: PathBuf,
    /// The place in `tree`.
    inside: PathBuf,
}

impl WorkingDirectory {
    /// Where `path` is in a container with `rootfs` and `mounts`; of several
    /// mounts above it the last counts, which hides the others.
    #[must_use]
    pub fn find(path: &Path, rootfs: &Path, mounts: &[Mount]) -> Self {
        let above = mounts.iter().rev().find_map(|mount| {
            let inside = path.strip_prefix(mount.destination()).ok()?;
            let bound = mount.typ().as_deref() == Some("bind");
            // A file system of its own is empty until it is mounted.
            let tree = mount.source().as_ref().filter(|_| bound)?;
            Some((tree.as_path(), inside))
        });
        let (tree, inside) = above.unwrap_or((rootfs, path));
        Self {
            path: path.to_owned(),
            tree: tree.to_owned(),
            inside: inside.to_owned(),
        }
    }

    /// Makes it within its tree, following no link out of that.
    fn make(&self) -> Result<(), GuestError> {
        let failed = |errno: rustix::io::Errno| {
            let why = lookup::words(&errno.into());
            GuestError::Start(format!("mkdir {}: {why}", self.path.display()))
        };
        let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, &self.tree, folder, Mode::empty()).map_err(failed)?;
        let open = |name: &OsStr| {
            let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            openat2(&root, name, folder, Mode::empty(), inside)
        };
        let mut parent = open(OsStr::new(".")).map_err(failed)?;
        let mut so_far = PathBuf::new();
        for component in self.inside.components() {
            let Component::Normal(name) = component else {
                continue;
            };
            so_far.push(name);
            parent = match open(so_far.as_os_str()) {
                Ok(there) => there,
                Err(rustix::io::Errno::NOENT) => {
                    match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                        Err(errno) => return Err(failed(errno)),
                    }
                    open(so_far.as_os_str()).map_err(failed)?
                }
                Err(errno) => return Err(failed(errno)),
            };
        }
        Ok(())
    }
}

/// The folder is to be the container's root's: of a pod with a user namespace, a
/// process in that makes it.
fn make_cwd(task: &Task, report: &Report) -> Result<(), GuestError> {
    if task.users.is_none() {
        return task.cwd.make();
    }
    let made = sys::fork(|| {
        let entered = pod::enter("user").map_err(GuestError::file("enter", pod::path("user")));
        match entered
            .and_then(|()| pod::become_root())
            .and_then(|()| task.cwd.make())
        {
            Ok(()) => 0,
            Err(error) => {
                report.send(&Line::Error(error.to_string()));
                1
            }
        }
    });
    let pid = made.map_err(GuestError::system("fork"))?;
    match waitpid(pid, None).map_err(GuestError::system("wait for a process"))? {
        WaitStatus::Exited(_, 0) => Ok(()),
        // It has told the reason.
        other => Err(GuestError::Start(format!("mkdir of cwd: {other:?}"))),
    }
}

fn create(task: &Task, report: &Report) -> Result<i32, GuestError> {
    floor::install()?;
    make_cwd(task, report)?;
    if let (Some(users), Some(process)) = (task.users, &task.process) {
        exec::prepare_outside(process, &users.users()?)?;
    }
    let failed = |error: libcontainer::error::LibcontainerError| {
        let mut words = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(source) = cause {
            words = format!("{words}: {source}");
            cause = source.source();
        }
        GuestError::Start(words)
    };
    let container = ContainerBuilder::new(task.id.clone(), SyscallType::default())
        .with_executor(ReportingExecutor::new(report.clone()))
        .with_root_path(&task.state)
        .map_err(failed)?
        .with_console_socket(task.console.as_ref())
        .as_init(&task.bundle)
        .with_systemd(false)
        .with_detach(true)
        .build()
        .map_err(failed)?;
    container
        .pid()
        .map(|pid| pid.as_raw())
        .ok_or_else(|| GuestError::Start("the container has no process".into()))
}

pub(super) fn main() -> bool {
    let Ok((task, report)) = receive::<Task>() else {
        return false;
    };
    match create(&task, &report) {
        Ok(pid) => {
            report.send(&Line::Pid(pid));
            true
        }
        Err(error) => {
            // If the init process has told the real reason, it came first.
            report.send(&Line::Error(error.to_string()));
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::MountBuilder;

    use super::*;

    fn cwd(tree: &Path, path: &str) -> WorkingDirectory {
        WorkingDirectory::find(Path::new(path), tree, &[])
    }

    #[test]
    fn a_working_directory_is_made_inside_only() {
        let folder = tempfile::tempdir().unwrap();
        let rootfs = folder.path().join("rootfs");
        std::fs::create_dir(&rootfs).unwrap();
        cwd(&rootfs, "/a/b/c").make().unwrap();
        cwd(&rootfs, "/a/b/c").make().unwrap();
        assert!(rootfs.join("a/b/c").is_dir());
        cwd(&rootfs, "/").make().unwrap();

        // A link that leads out is followed inside the root.
        std::os::unix::fs::symlink(folder.path(), rootfs.join("out")).unwrap();
        let made = cwd(&rootfs, "/out/x").make();
        assert!(made.is_err() || !folder.path().join("x").exists());
        assert!(!folder.path().join("x").exists());
    }

    #[test]
    fn a_file_in_the_place_is_told_in_runcs_words() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        for path in ["/file", "/file/below"] {
            let error = cwd(folder.path(), path).make().unwrap_err().to_string();
            assert_eq!(error, format!("mkdir {path}: not a directory"));
        }
    }

    #[test]
    fn a_working_directory_is_looked_for_in_the_last_volume_above_it() {
        let mount = |typ: &str, source: &str, destination: &str| {
            let mount = MountBuilder::default().typ(typ).source(source);
            mount.destination(destination).build().unwrap()
        };
        let mounts = [
            mount("tmpfs", "tmpfs", "/scratch"),
            mount("bind", "/volumes/0", "/data"),
            mount("bind", "/volumes/1", "/data/deep"),
            mount("bind", "/volumes/2", "/dat"),
        ];
        let rootfs = Path::new("/rootfs");
        for (path, tree, inside) in [
            ("/data/deep/x/y", "/volumes/1", "x/y"),
            ("/data/deeper", "/volumes/0", "deeper"),
            ("/data", "/volumes/0", ""),
            ("/scratch/x", "/rootfs", "/scratch/x"),
            ("/elsewhere", "/rootfs", "/elsewhere"),
        ] {
            let found = WorkingDirectory::find(Path::new(path), rootfs, &mounts);
            let expected = WorkingDirectory {
                path: path.into(),
                tree: tree.into(),
                inside: inside.into(),
            };
            assert_eq!(found, expected);
        }
    }
}
