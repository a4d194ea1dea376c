// SPDX-License-Identifier: Apache-2.0
//! Where the programs under test are: taken from the environment, which the
//! Makefile sets, else from the places where `make` puts them.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

const VSOCK_DAEMON: &str = "0.3.0";

/// The programs and files of the product, and what it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    /// `containerd-shim-podhull-v2`.
    pub shim: PathBuf,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
    /// QEMU.
    pub qemu: PathBuf,
    /// The vhost-user vsock daemon.
    pub vsock_daemon: PathBuf,
    /// The streaming client that is built from Kubernetes' library; only the
    /// suites need it.
    pub streams: PathBuf,
    /// The folder with the containerds that the set-up builds, each in a folder
    /// `containerd-VERSION` with its ctr and its runc shim.
    pub containerds: PathBuf,
}

impl Programs {
    /// From the environment, or where `make` puts them.
    #[must_use]
    pub fn find() -> Self {
        let root = workspace();
        let cache = cache();
        let target =
            env::var_os("CARGO_TARGET_DIR").map_or_else(|| cache.join("target"), PathBuf::from);
        let or = |name: &str, default: PathBuf| env::var_os(name).map_or(default, PathBuf::from);
        Self {
            shim: or(
                "PODHULL_SHIM",
                target.join("release/containerd-shim-podhull-v2"),
            ),
            kernel: or("PODHULL_KERNEL", root.join("target/guest/vmlinux")),
            initramfs: or(
                "PODHULL_INITRAMFS",
                root.join("target/guest/initramfs.cpio"),
            ),
            qemu: or("PODHULL_QEMU", "/usr/bin/qemu-system-x86_64".into()),
            vsock_daemon: or(
                "PODHULL_VSOCK_DAEMON",
                cache.join(format!(
                    "bin/vhost-device-vsock-{VSOCK_DAEMON}/vhost-device-vsock"
                )),
            ),
            streams: or("PODHULL_STREAMS", cache.join("bin/streams/streams")),
            containerds: or("PODHULL_CONTAINERDS", cache.join("bin")),
        }
    }

    /// Fails with the name of the first file of the product that is missing.
    ///
    /// # Errors
    /// If one is missing.
    pub fn check(&self) -> Result<()> {
        for (file, made_by) in [
            (&self.shim, "make shim"),
            (&self.kernel, "make guest"),
            (&self.initramfs, "make guest"),
            (&self.qemu, "make packages"),
            (&self.vsock_daemon, "make tools"),
        ] {
            ensure!(file.is_file(), "{} is missing: {made_by}", file.display());
        }
        Ok(())
    }
}

/// The root of the checkout: that of the package that cargo runs, or the one that
/// this is started in. Checkouts may share what is built, so that where it was
/// built says little.
#[must_use]
pub fn workspace() -> PathBuf {
    let here = env!("CARGO_MANIFEST_DIR");
    let root = |place: PathBuf| {
        let is_ours = |folder: &&Path| folder.join("pkg/testkit/Cargo.toml").is_file();
        Some(place.ancestors().find(is_ours)?.to_path_buf())
    };
    let started = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let places = [started, env::current_dir().ok(), Some(here.into())];
    let found = places.into_iter().flatten().find_map(root);
    found.unwrap_or_else(|| here.into())
}

/// Where everything is kept that is built once.
#[must_use]
pub fn cache() -> PathBuf {
    if let Some(cache) = env::var_os("PODHULL_CACHE") {
        return cache.into();
    }
    env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
        .unwrap_or_else(|| "/var/cache".into())
        .join("podhull")
}
