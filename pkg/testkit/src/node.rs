// SPDX-License-Identifier: Apache-2.0
//! A node: containerd and its client in this program's own namespaces.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::containerd::{Containerd, Release};
use crate::namespaces;
use crate::programs::Programs;

/// A test node. Everything it runs ends with the program.
#[derive(Debug)]
pub struct Node {
    folder: PathBuf,
    programs: Programs,
}

impl Node {
    /// The node that this program is inside of.
    ///
    /// # Errors
    /// If it is not inside of one: call [`namespaces::enter`].
    pub fn here() -> Result<Self> {
        ensure!(namespaces::inside(), "not inside a test node");
        Ok(Self {
            folder: namespaces::folder()?,
            programs: Programs::find(),
        })
    }

    /// A folder on a disk, gone when the program ends.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The programs under test.
    #[must_use]
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// Starts containerd with the handlers runc and podhull, and on 2.x
    /// podhull-sandbox; images are there and pods can be run.
    ///
    /// # Errors
    /// If it does not become ready.
    pub async fn start_containerd(&self, release: Release) -> Result<Containerd> {
        Containerd::start(release, &self.programs, &self.folder).await
    }
}

/// Removes what is in a folder of the tests.
///
/// # Errors
/// If something in it cannot be removed.
pub fn empty(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        let removed = if path.is_dir() && !path.is_symlink() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}
