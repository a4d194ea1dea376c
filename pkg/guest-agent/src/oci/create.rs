// SPDX-License-Identifier: Apache-2.0
//! `oci create`: makes a container whose init process waits for Start.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2};
use serde::{Deserialize, Serialize};

use super::executor::ReportingExecutor;
use super::floor;
use crate::error::GuestError;
use crate::helper::{Line, Report, receive};

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
    /// The root filesystem.
    pub rootfs: PathBuf,
    /// The process's working directory; made if absent, as runc does.
    pub cwd: PathBuf,
}

/// Makes the working directory within the root filesystem, following no link
/// out of it.
fn make_cwd(rootfs: &Path, cwd: &Path) -> Result<(), GuestError> {
    let failed = || GuestError::file("make working directory", cwd);
    let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root =
        openat(CWD, rootfs, folder, Mode::empty()).map_err(|errno| failed()(errno.into()))?;
    let open = |at: &OwnedFd, name: &OsStr| {
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(at, name, folder, Mode::empty(), inside)
    };
    let mut so_far = PathBuf::new();
    for component in cwd.components() {
        let Component::Normal(name) = component else {
            continue;
        };
        so_far.push(name);
        if open(&root, so_far.as_os_str()).is_ok() {
            continue;
        }
        let parent = so_far
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let parent = open(&root, parent.as_os_str()).map_err(|errno| failed()(errno.into()))?;
        match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            // A file in its place is the container's to fail on.
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(failed()(errno.into())),
        }
    }
    Ok(())
}

fn create(task: &Task, report: &Report) -> Result<i32, GuestError> {
    floor::install()?;
    make_cwd(&task.rootfs, &task.cwd)?;
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
    use super::*;

    #[test]
    fn a_working_directory_is_made_inside_only() {
        let folder = tempfile::tempdir().unwrap();
        let rootfs = folder.path().join("rootfs");
        std::fs::create_dir(&rootfs).unwrap();
        make_cwd(&rootfs, Path::new("/a/b/c")).unwrap();
        make_cwd(&rootfs, Path::new("/a/b/c")).unwrap();
        assert!(rootfs.join("a/b/c").is_dir());
        make_cwd(&rootfs, Path::new("/")).unwrap();

        // A link that leads out is followed inside the root.
        std::os::unix::fs::symlink(folder.path(), rootfs.join("out")).unwrap();
        let made = make_cwd(&rootfs, Path::new("/out/x"));
        assert!(made.is_err() || !folder.path().join("x").exists());
        assert!(!folder.path().join("x").exists());
    }
}
