// SPDX-License-Identifier: Apache-2.0
//! The file `address` of a bundle: where the shim of its pod answers. containerd
//! reads it when it comes back, and whoever has to do with a pod that exists
//! finds it by this, whatever the configuration has become since it was made.

use std::fs;
use std::path::{Path, PathBuf};

use podhull_sandbox::RunDir;
use podhull_types::SandboxId;

use crate::error::ShimError;

const FILE: &str = "address";
const SCHEME: &str = "unix://";

/// The address of the shim that listens at `socket`.
pub(crate) fn of(socket: &Path) -> String {
    format!("{SCHEME}{}", socket.display())
}

/// Written whole: containerd may read it at any moment.
pub(crate) fn write(bundle: &Path, address: &str) -> Result<(), ShimError> {
    let (new, path) = (bundle.join(".address"), bundle.join(FILE));
    fs::write(&new, address)
        .and_then(|()| fs::rename(&new, &path))
        .map_err(ShimError::file("write", path))
}

/// The folder that holds the sandbox's run folder, by what `start` wrote into
/// the bundle, or into that of the sandbox, which stands beside it; `None` if
/// neither has an address of this sandbox's shim.
pub(crate) fn parent(bundle: &Path, namespace: &str, sandbox: &SandboxId) -> Option<PathBuf> {
    let sandboxes = bundle.join("..").join(sandbox.as_str());
    [bundle, &sandboxes].iter().find_map(|bundle| {
        let address = fs::read_to_string(bundle.join(FILE)).ok()?;
        parent_in(&address, namespace, sandbox)
    })
}

fn parent_in(address: &str, namespace: &str, sandbox: &SandboxId) -> Option<PathBuf> {
    let socket = Path::new(address.strip_prefix(SCHEME)?);
    let parent = socket
        .parent()?
        .parent()
        .filter(|path| path.is_absolute())?;
    (RunDir::of(parent, namespace, sandbox).socket() == socket).then(|| parent.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(parent: &str, namespace: &str, id: &str) -> String {
        let id = SandboxId::new(id).unwrap();
        of(&RunDir::of(Path::new(parent), namespace, &id).socket())
    }

    #[test]
    fn only_an_address_of_this_sandbox_is_believed() {
        let sandbox = SandboxId::new("s1").unwrap();
        let found = |address: &str| parent_in(address, "k8s.io", &sandbox);
        let address = own("/run/elsewhere", "k8s.io", "s1");
        assert_eq!(found(&address), Some("/run/elsewhere".into()));
        for wrong in [
            address.trim_start_matches(SCHEME),
            &format!("{address}\n"),
            &address.replace("shim.sock", "metrics.sock"),
            &own("relative", "k8s.io", "s1"),
            &own("/run/podhull", "k8s.io", "s2"),
            &own("/run/podhull", "moby", "s1"),
            "unix:///shim.sock",
            "",
        ] {
            assert_eq!(found(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn the_bundle_is_asked_before_that_of_its_sandbox() {
        let bundles = tempfile::tempdir().unwrap();
        let folder = |id: &str| bundles.path().join(id);
        let sandbox = SandboxId::new("s1").unwrap();
        let found = || parent(&folder("c1"), "k8s.io", &sandbox);
        fs::create_dir(folder("c1")).unwrap();
        assert_eq!(found(), None, "no sandbox");
        fs::create_dir(folder("s1")).unwrap();
        assert_eq!(found(), None, "no file");
        write(&folder("s1"), &own("/run/first", "k8s.io", "s1")).unwrap();
        assert_eq!(found(), Some("/run/first".into()));
        write(&folder("c1"), "garbled").unwrap();
        assert_eq!(found(), Some("/run/first".into()));
        write(&folder("c1"), &own("/run/second", "k8s.io", "s1")).unwrap();
        assert_eq!(found(), Some("/run/second".into()));
    }

    #[test]
    fn the_address_is_written_for_containerds_return() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "unix:///x").unwrap();
        let written = fs::read_to_string(folder.path().join(FILE)).unwrap();
        assert_eq!(written, "unix:///x");
        assert!(!folder.path().join(".address").exists());
    }
}
