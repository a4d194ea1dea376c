// SPDX-License-Identifier: Apache-2.0
//! Trees in a mount namespace of the test's own.

use std::time::Instant;

use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::volume::MappedIds;

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
        ids: None,
    }
}

fn tmpfs() -> RootfsMount {
    RootfsMount {
        fstype: "tmpfs".into(),
        source: "tmpfs".into(),
        options: vec!["size=64k".into()],
    }
}

/// A tree with a container in whose root filesystem a file is open.
fn busy_tree(folder: &Path) -> (SharedTree, ContainerId, fs::File) {
    let root = folder.join("share");
    let tree = SharedTree::create(&root).unwrap();
    let id = ContainerId::new("c1").unwrap();
    let path = root.join(tree.mount_rootfs(&id, &[tmpfs()]).unwrap().as_path());
    let held = fs::File::create(path.join("held")).unwrap();
    (tree, id, held)
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
        let path = tree.mount_rootfs(&id, &[tmpfs()]).unwrap();
        assert_eq!(path.as_path(), Path::new("c1/rootfs"));
        let bound = tree.bind(&id, &volume(&precious, false)).unwrap();
        assert!(root.join(bound.as_path()).join("data").exists());
        let file = tree
            .bind(&id, &volume(&precious.join("data"), true))
            .unwrap();
        assert!(fs::write(root.join(file.as_path()), "x").is_err());
        let hosts = tree.write_file(&id, "hosts", b"127.0.0.1 x", None).unwrap();
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

/// The pod's IDs are 100,000 above those of files.
fn users() -> UserNamespace {
    let ids = podhull_types::IdMapping::new(0, 100_000, 65_536).unwrap();
    UserNamespace {
        uids: ids,
        gids: ids,
    }
}

/// A folder that is a tmpfs, on which every kernel with idmapped mounts of it can
/// show other owners.
fn tmpfs_folder(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    fs::create_dir(&path).unwrap();
    let (kind, flags) = (Some("tmpfs"), nix::mount::MsFlags::empty());
    nix::mount::mount(kind, &path, kind, flags, None::<&str>).unwrap();
    path
}

fn owner(path: &Path) -> (u32, u32) {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::metadata(path).unwrap();
    (meta.uid(), meta.gid())
}

#[test]
fn a_volume_shows_the_owners_of_a_user_namespace() {
    in_own_mounts(|folder| {
        let source = tmpfs_folder(folder, "volume");
        let below = tmpfs_folder(&source, "below");
        for file in [source.join("file"), below.join("file")] {
            fs::write(&file, "x").unwrap();
            chown(&file, Some(0), Some(5)).unwrap();
        }
        let root = folder.join("share");
        let tree = SharedTree::create(&root).unwrap();
        let id = ContainerId::new("c1").unwrap();
        let bound = |recursive| {
            let mapped = MappedIds {
                users: users(),
                recursive,
            };
            let volume = Volume {
                ids: Some(mapped),
                ..volume(&source, false)
            };
            root.join(tree.bind(&id, &volume).unwrap().as_path())
        };
        let (top, all) = (bound(false), bound(true));
        for view in [&top, &all] {
            assert_eq!(owner(&view.join("file")), (100_000, 100_005));
        }
        assert_eq!(owner(&top.join("below/file")), (0, 5));
        assert_eq!(owner(&all.join("below/file")), (100_000, 100_005));
        chown(top.join("file"), Some(100_007), Some(100_000)).unwrap();
        assert_eq!(owner(&source.join("file")), (7, 0));
        // Who is in no mapping has no files there.
        assert!(fs::write(top.join("new"), "x").is_err());
        let hosts = tree.write_file(&id, "hosts", b"x", Some(users())).unwrap();
        assert_eq!(owner(&root.join(hosts.as_path())), (100_000, 100_000));
        assert!(tree.teardown(soon()).unwrap().is_clean());
    });
}

#[test]
fn what_cannot_show_other_owners_is_named() {
    in_own_mounts(|folder| {
        let tree = SharedTree::create(&folder.join("share")).unwrap();
        let id = ContainerId::new("c1").unwrap();
        let proc = Volume {
            ids: Some(MappedIds {
                users: users(),
                recursive: false,
            }),
            ..volume(Path::new("/proc"), false)
        };
        let error = tree.bind(&id, &proc).unwrap_err();
        assert!(matches!(&error, StorageError::Owners { path, .. } if path == Path::new("/proc")));
        assert!(error.is_of_the_request());
        assert!(tree.teardown(soon()).unwrap().is_clean());
    });
}

#[test]
fn layers_of_an_image_show_the_owners_of_a_user_namespace() {
    in_own_mounts(|folder| {
        let snapshots = tmpfs_folder(folder, "snapshots");
        for name in ["1/fs", "2/fs", "3/fs", "3/work"] {
            fs::create_dir_all(snapshots.join(name)).unwrap();
        }
        fs::write(snapshots.join("1/fs/old"), "x").unwrap();
        chown(snapshots.join("1/fs/old"), Some(0), Some(5)).unwrap();
        let snapshots = snapshots.display();
        let rootfs = |fstype: &str, options: Vec<String>| RootfsMount {
            fstype: fstype.into(),
            source: format!("{snapshots}/1/fs"),
            options: [
                vec!["uidmap=0:100000:9".into(), "gidmap=0:100000:9".into()],
                options,
            ]
            .concat(),
        };
        let overlay = rootfs(
            "overlay",
            vec![
                format!("workdir={snapshots}/3/work"),
                format!("upperdir={snapshots}/3/fs"),
                format!("lowerdir={snapshots}/2/fs:{snapshots}/1/fs"),
            ],
        );
        let bind = rootfs("bind", vec!["ro".into(), "rbind".into()]);
        let root = folder.join("share");
        let tree = SharedTree::create(&root).unwrap();
        for (name, entry) in [("c1", overlay), ("c2", bind)] {
            let id = ContainerId::new(name).unwrap();
            let path = root.join(tree.mount_rootfs(&id, &[entry]).unwrap().as_path());
            assert_eq!(owner(&path.join("old")), (100_000, 100_005), "{name}");
            assert_eq!(fs::write(path.join("new"), "x").is_ok(), name == "c1");
        }
        let other = rootfs("tmpfs", vec![]);
        let error = tree.mount_rootfs(&ContainerId::new("c3").unwrap(), &[other]);
        assert!(matches!(error, Err(StorageError::RootfsOwners(_))));
        let report = tree.teardown(soon()).unwrap();
        assert_eq!(report, RemoveReport::default());
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
        let (tree, id, held) = busy_tree(folder);
        let began = Instant::now();
        let report = tree.remove_container(&id, soon()).unwrap();
        assert!(began.elapsed() >= GIVEN_BACK, "it was not waited for");
        assert_eq!(report.detached.len(), 1);
        assert!(report.is_clean(), "{report:?}");
        drop(held);
        assert!(tree.teardown(soon()).unwrap().is_clean());
    });
}

#[test]
fn a_deadline_that_passed_is_not_waited_beyond() {
    in_own_mounts(|folder| {
        let (tree, id, _held) = busy_tree(folder);
        let began = Instant::now();
        let report = tree
            .remove_container(&id, Deadline::after(Duration::ZERO))
            .unwrap();
        assert!(began.elapsed() < GIVEN_BACK);
        assert_eq!(report.detached.len(), 1);
        assert!(tree.teardown(soon()).unwrap().is_clean());
    });
}

#[test]
fn a_mount_that_is_given_back_in_time_is_not_detached() {
    in_own_mounts(|folder| {
        let (tree, id, held) = busy_tree(folder);
        let user = std::thread::spawn(move || {
            std::thread::sleep(GIVEN_BACK / 5);
            drop(held);
        });
        let report = tree.remove_container(&id, soon()).unwrap();
        user.join().unwrap();
        assert_eq!(report, RemoveReport::default());
        assert!(tree.teardown(soon()).unwrap().is_clean());
    });
}

/// A volume whose server is away, as a FUSE file system that is never answered
/// for: whoever looks at it waits until this is dropped.
struct Away {
    at: PathBuf,
    server: Option<File>,
}

impl Away {
    fn new(at: PathBuf) -> Option<Self> {
        let Ok(server) = File::options().read(true).write(true).open("/dev/fuse") else {
            println!("SKIP: no /dev/fuse");
            return None;
        };
        fs::create_dir(&at).unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            server.as_raw_fd()
        );
        let (kind, flags) = (Some("fuse"), nix::mount::MsFlags::empty());
        nix::mount::mount(Some("away"), &at, kind, flags, Some(options.as_str())).unwrap();
        let server = Some(server);
        Some(Self { at, server })
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        drop(self.server.take());
        nix::mount::umount2(&self.at, nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn a_volume_that_blocks_holds_no_other_container_up() {
    in_own_mounts(|folder| {
        let absent = folder.join("away");
        let Some(server) = Away::new(absent.clone()) else {
            return;
        };
        let tree = SharedTree::create(&folder.join("share")).unwrap();
        let [stuck, other] = ["c1", "c2"].map(|id| ContainerId::new(id).unwrap());
        let noted = || {
            let containers = tree.containers.try_lock();
            containers.is_ok_and(|containers| containers.contains_key(&stuck))
        };
        std::thread::scope(|scope| {
            let binding = scope.spawn(|| tree.bind(&stuck, &volume(&absent, false)));
            let by = soon();
            while !noted() && !by.passed() {
                std::thread::yield_now();
            }
            let goes_on = noted().then(|| {
                tree.mount_rootfs(&other, &[tmpfs()]).unwrap();
                tree.write_file(&other, "hosts", b"x", None).unwrap();
                let removed = [&other, &stuck].map(|id| tree.remove_container(id, soon()));
                (binding.is_finished(), removed.map(Result::unwrap))
            });
            drop(server);
            let bound = binding.join().unwrap();
            let clean = [RemoveReport::default(), RemoveReport::default()];
            assert_eq!(goes_on, Some((false, clean)), "the others wait");
            assert!(bound.is_err(), "{bound:?}");
        });
        assert!(tree.teardown(soon()).unwrap().is_clean());
        assert!(!folder.join("share").exists());
    });
}

#[test]
fn a_mount_behind_the_removal_of_its_container_goes() {
    in_own_mounts(|folder| {
        let root = folder.join("share");
        let tree = SharedTree::create(&root).unwrap();
        let id = ContainerId::new("c1").unwrap();
        let source = folder.join("source");
        fs::create_dir(&source).unwrap();
        let bound = tree.bind(&id, &volume(&source, false)).unwrap();
        // The removal took what was noted and saw no mount yet.
        tree.containers().remove(&id);
        let point = root.join(bound.as_path());
        let late = tree.made(&id, point, Ok(()));
        assert!(matches!(late, Err(StorageError::Removed(_))), "{late:?}");
        assert!(!root.join("c1").exists());
        assert!(tree.teardown(soon()).unwrap().is_clean());
    });
}
