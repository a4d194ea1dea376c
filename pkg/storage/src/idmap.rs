// SPDX-License-Identifier: Apache-2.0
//! Mounts that show other owners (idmapped mounts, mount_setattr(2)): of a pod
//! with a user namespace, what belongs to root on the host's file system belongs
//! to the pod's root.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use podhull_types::UserNamespace;
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use crate::error::StorageError;
use crate::mounts::shared_folder;
use crate::sys;

/// A user namespace that nobody is in, for each mapping that was asked for.
#[derive(Debug, Default)]
pub(crate) struct UserNamespaces(Mutex<HashMap<UserNamespace, Arc<OwnedFd>>>);

impl UserNamespaces {
    fn of(&self, users: &UserNamespace) -> io::Result<Arc<OwnedFd>> {
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(namespace) = made.get(users) {
            return Ok(Arc::clone(namespace));
        }
        let process = sys::process_in_user_namespace()?;
        let namespace = map(process, users);
        kill_process(process, Signal::KILL)?;
        waitpid(Some(process), WaitOptions::empty())?;
        let namespace = Arc::new(namespace?);
        made.insert(*users, Arc::clone(&namespace));
        Ok(namespace)
    }

    /// A copy of the mount at `source` that shows the owners of `users`. It is
    /// nowhere yet.
    pub(crate) fn show(&self, what: &Shown<'_>) -> Result<OwnedFd, StorageError> {
        let namespace = self.of(&what.users);
        let namespace =
            namespace.map_err(StorageError::path("make a user namespace for", what.source))?;
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        if what.recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let copy = open_tree(CWD, what.source, flags).map_err(|errno| StorageError::Source {
            path: what.source.into(),
            source: errno.into(),
        })?;
        let mapped = sys::map_ids(copy.as_fd(), namespace.as_fd(), what.read_only, what.all);
        mapped.map_err(|source| StorageError::Owners {
            path: what.source.into(),
            source,
        })?;
        Ok(copy)
    }
}

/// What is to be shown with other owners.
#[derive(Debug)]
pub(crate) struct Shown<'a> {
    pub(crate) source: &'a Path,
    pub(crate) users: UserNamespace,
    /// With what is mounted below it.
    pub(crate) recursive: bool,
    /// Which shows other owners, too.
    pub(crate) all: bool,
    pub(crate) read_only: bool,
}

fn map(process: Pid, users: &UserNamespace) -> io::Result<OwnedFd> {
    let folder = PathBuf::from(format!("/proc/{}", process.as_raw_nonzero()));
    fs::write(folder.join("uid_map"), users.uids.to_string())?;
    fs::write(folder.join("gid_map"), users.gids.to_string())?;
    Ok(File::open(folder.join("ns/user"))?.into())
}

/// Puts a mount that is nowhere yet at `target`.
pub(crate) fn put(mount: &OwnedFd, target: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(mount, "", CWD, target, flags)?)
}

/// What a snapshotter's options say of owners, and the other options. Both kinds of
/// IDs are mapped, or none (containerd's `core/mount`).
pub(crate) fn take_mapping(
    options: &[String],
) -> Result<(Option<UserNamespace>, Vec<String>), StorageError> {
    let (mut uids, mut gids, mut others) = (None, None, Vec::new());
    for option in options {
        match option.split_once('=') {
            Some(("uidmap", text)) => uids = Some(text),
            Some(("gidmap", text)) => gids = Some(text),
            _ => others.push(option.clone()),
        }
    }
    let parse = |name: &str, text: &str| {
        let parsed = text.parse();
        parsed.map_err(|error| StorageError::RootfsOwners(format!("{name}={text}: {error}")))
    };
    let users = match (uids, gids) {
        (None, None) => None,
        (Some(uids), Some(gids)) => Some(UserNamespace {
            uids: parse("uidmap", uids)?,
            gids: parse("gidmap", gids)?,
        }),
        _ => {
            let reason = "one of uidmap and gidmap without the other";
            return Err(StorageError::RootfsOwners(reason.into()));
        }
    };
    Ok((users, others))
}

/// The folder that all lower layers of an overlay are in, and its options with
/// their names relative to that folder.
pub(crate) fn layers(options: &[String]) -> Result<(PathBuf, Vec<String>), StorageError> {
    let failed = |reason: &str| StorageError::RootfsOwners(reason.into());
    let lower = options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))
        .ok_or_else(|| failed("an overlay without lowerdir"))?;
    let folder = shared_folder(lower.split(':'))
        .filter(|folder: &PathBuf| folder.is_absolute() && folder.parent().is_some())
        .ok_or_else(|| failed("the layers are in no folder together"))?;
    let relative: Option<Vec<&str>> = lower
        .split(':')
        .map(|layer| Path::new(layer).strip_prefix(&folder).ok()?.to_str())
        .collect();
    let relative = relative.ok_or_else(|| failed("a layer's name cannot be used"))?;
    let lower = format!("lowerdir={}", relative.join(":"));
    let others = options
        .iter()
        .filter(|option| !option.starts_with("lowerdir="));
    Ok((folder, others.cloned().chain([lower]).collect()))
}

#[cfg(test)]
mod tests {
    use podhull_types::IdMapping;

    use super::*;

    fn texts<const N: usize>(texts: [&str; N]) -> Vec<String> {
        texts.map(str::to_owned).into()
    }

    #[test]
    fn a_snapshots_mapping_is_read_and_half_of_one_is_refused() {
        let both = texts(["ro", "uidmap=0:5:9", "index=off", "gidmap=0:7:9"]);
        let (users, others) = take_mapping(&both).unwrap();
        let users = users.unwrap();
        assert_eq!(users.uids, IdMapping::new(0, 5, 9).unwrap());
        assert_eq!(users.gids, IdMapping::new(0, 7, 9).unwrap());
        assert_eq!(others, ["ro", "index=off"]);
        assert_eq!(take_mapping(&others).unwrap(), (None, others));
        let half = take_mapping(&texts(["uidmap=0:5:9"])).unwrap_err();
        assert!(half.to_string().contains("gidmap"), "{half}");
        let bad = take_mapping(&texts(["uidmap=0:5:9", "gidmap=1:5:9"])).unwrap_err();
        assert!(bad.to_string().contains("gidmap=1:5:9"), "{bad}");
    }

    #[test]
    fn layers_are_named_from_the_folder_they_share() {
        let options = texts([
            "lowerdir=/s/9/fs:/s/10/fs",
            "upperdir=/s/11/fs",
            "index=off",
        ]);
        let (folder, options) = layers(&options).unwrap();
        assert_eq!(folder, Path::new("/s"));
        assert_eq!(
            options,
            ["upperdir=/s/11/fs", "index=off", "lowerdir=9/fs:10/fs"]
        );
        let (folder, options) = layers(&texts(["lowerdir=/s/9/fs"])).unwrap();
        assert_eq!(
            (folder.to_str(), options[0].as_str()),
            (Some("/s/9"), "lowerdir=fs")
        );
        for none in ["lowerdir=/a:/b", "lowerdir=a/x:a/y", "upperdir=/s/1"] {
            assert!(layers(&texts([none])).is_err(), "{none}");
        }
    }
}
