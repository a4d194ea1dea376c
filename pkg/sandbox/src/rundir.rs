// SPDX-License-Identifier: Apache-2.0
//! A sandbox's folder on the host.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

use podhull_types::{BootTimes, SandboxId};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::SandboxError;

/// What a fresh process must know to clean up after a shim that crashed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's id.
    pub id: String,
    /// The pod's network namespace.
    pub netns: Option<PathBuf>,
    /// The sandbox's cgroup as given.
    pub cgroups_path: Option<String>,
}

/// `<run_dir>/<hash>`, mode 0700. The hash stands for namespace and sandbox, so
/// that the paths of sockets in it stay short enough.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir(PathBuf);

/// Files of the sandbox in the folder; everything else belongs to the VMM or to
/// the shared tree, which remove what they made.
const SANDBOX_FILES: [&str; 2] = ["sandbox.json", "boot.json"];
/// Files of the shim, which may outlive its sandbox: containerd still asks.
const SHIM_FILES: [&str; 6] = [
    "shim.log",
    "shim.1",
    "shim.sock",
    "shim.new",
    "shim.json",
    "metrics.sock",
];

impl RunDir {
    /// The folder of a sandbox; it need not exist.
    #[must_use]
    pub fn of(run_dir: &Path, namespace: &str, id: &SandboxId) -> Self {
        let mut hash = Sha256::new();
        hash.update(namespace.as_bytes());
        hash.update([0]);
        hash.update(id.as_str().as_bytes());
        let name: String = hash
            .finalize()
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Self(run_dir.join(name))
    }

    /// Makes the folder.
    ///
    /// # Errors
    /// [`SandboxError::File`] if it cannot be made.
    pub fn create(&self) -> Result<(), SandboxError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.0)
            .map_err(|source| self.failed("create folder", source))
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The tree that is shared with the guest.
    #[must_use]
    pub fn share(&self) -> PathBuf {
        self.0.join("share")
    }

    /// The VMM's and its helpers' files.
    #[must_use]
    pub fn vm(&self) -> PathBuf {
        self.0.join("vm")
    }

    /// The shim's log file.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.0.join("shim.log")
    }

    /// Where the shim's numbers are read.
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.0.join("metrics.sock")
    }

    /// The shim's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.0.join("shim.sock")
    }

    /// Which process is the shim, for another that has to end it.
    #[must_use]
    pub fn shim(&self) -> PathBuf {
        self.0.join("shim.json")
    }

    /// The FIFOs of streams that containerd opens at the shim's socket.
    #[must_use]
    pub fn streams(&self) -> PathBuf {
        self.0.join("streams")
    }

    /// Removes what a shim left in the folder of its FIFOs, and the folder.
    fn remove_streams(&self) -> Result<(), SandboxError> {
        let folder = self.streams();
        let failed = |source| SandboxError::File {
            what: "look into",
            path: folder.clone(),
            source,
        };
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(failed)?,
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            if entry.file_type().map_err(failed)?.is_fifo() {
                remove(&entry.path(), fs::remove_file)?;
            }
        }
        remove(&folder, fs::remove_dir)
    }

    fn failed(&self, what: &'static str, source: io::Error) -> SandboxError {
        SandboxError::File {
            what,
            path: self.0.clone(),
            source,
        }
    }

    /// Keeps `record` for a process that may have to clean up.
    ///
    /// # Errors
    /// [`SandboxError::File`] if it cannot be written.
    pub fn write_record(&self, record: &Record) -> Result<(), SandboxError> {
        let text = serde_json::to_vec_pretty(record).map_err(io::Error::other);
        text.and_then(|text| fs::write(self.0.join("sandbox.json"), text))
            .map_err(|source| self.failed("write sandbox.json in", source))
    }

    /// The record, if there is one that can be read.
    #[must_use]
    pub fn read_record(&self) -> Option<Record> {
        serde_json::from_slice(&fs::read(self.0.join("sandbox.json")).ok()?).ok()
    }

    /// Writes the boot's phases to `boot.json`, for people and tools.
    pub(crate) fn write_boot(&self, times: &BootTimes) {
        let phases: Vec<_> = times
            .iter()
            .map(|(phase, at)| {
                serde_json::json!({ "name": phase.name(), "ms": at.as_secs_f64() * 1000.0 })
            })
            .collect();
        let text = serde_json::json!({ "phases": phases }).to_string();
        if let Err(error) = fs::write(self.0.join("boot.json"), text) {
            tracing::warn!(%error, "boot.json not written");
        }
    }

    /// Removes the sandbox's files and folders; the shim's stay. Nothing else is
    /// removed: a folder that is not empty is an error.
    ///
    /// # Errors
    /// [`SandboxError::File`] naming what could not be removed.
    pub(crate) fn release(&self) -> Result<(), SandboxError> {
        for name in SANDBOX_FILES {
            remove(&self.0.join(name), fs::remove_file)?;
        }
        remove(&self.vm(), fs::remove_dir)?;
        remove(&self.share(), fs::remove_dir)
    }

    /// Removes everything of ours and the folder. Nothing else is removed: a
    /// folder that is not empty then is an error.
    ///
    /// # Errors
    /// [`SandboxError::File`] naming what could not be removed.
    pub fn remove(&self) -> Result<(), SandboxError> {
        self.release()?;
        self.remove_streams()?;
        for name in SHIM_FILES {
            remove(&self.0.join(name), fs::remove_file)?;
        }
        remove(&self.0, fs::remove_dir)
    }
}

fn remove(path: &Path, how: fn(PathBuf) -> io::Result<()>) -> Result<(), SandboxError> {
    match how(path.to_path_buf()) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(SandboxError::File {
            what: "remove",
            path: path.into(),
            source,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_dir(root: &Path) -> RunDir {
        RunDir::of(root, "k8s.io", &SandboxId::new("s1").unwrap())
    }

    #[test]
    fn namespaces_do_not_share_folders() {
        let id = SandboxId::new("s1").unwrap();
        let root = Path::new("/run/podhull");
        assert_ne!(RunDir::of(root, "a", &id), RunDir::of(root, "b", &id));
        let longest = RunDir::of(
            root,
            &"n".repeat(76),
            &SandboxId::new("i".repeat(76)).unwrap(),
        );
        assert!(longest.socket().as_os_str().len() < 100);
    }

    #[test]
    fn remove_takes_only_what_is_ours() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = run_dir(root.path());
        run_dir.create().unwrap();
        run_dir.write_boot(&BootTimes::default());
        let stranger = run_dir.path().join("precious");
        fs::write(&stranger, "x").unwrap();
        assert!(run_dir.remove().is_err());
        assert!(stranger.exists());
        fs::remove_file(&stranger).unwrap();
        run_dir.remove().unwrap();
        run_dir.remove().unwrap();
        assert!(!run_dir.path().exists());
    }

    #[test]
    fn remove_takes_fifos_of_streams_and_no_file() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = run_dir(root.path());
        fs::create_dir_all(run_dir.streams()).unwrap();
        let fifo = run_dir.streams().join("c1-stdout");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let stranger = run_dir.streams().join("precious");
        fs::write(&stranger, "x").unwrap();
        assert!(run_dir.remove().is_err());
        assert!(stranger.exists() && !fifo.exists());
        fs::remove_file(&stranger).unwrap();
        run_dir.remove().unwrap();
        assert!(!run_dir.path().exists());
    }

    #[test]
    fn the_record_survives() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = run_dir(root.path());
        assert_eq!(run_dir.read_record(), None);
        run_dir.create().unwrap();
        let record = Record {
            namespace: "k8s.io".into(),
            id: "s1".into(),
            netns: Some("/run/netns/x".into()),
            cgroups_path: None,
        };
        run_dir.write_record(&record).unwrap();
        assert_eq!(run_dir.read_record(), Some(record));
    }
}
