// SPDX-License-Identifier: Apache-2.0
//! Containers whose volumes have a server that is away.

use podhull_storage::RootfsMount;
use podhull_transport::Outcome;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::fixture::{self, Away, Stop, apart, soon};
use crate::spec::Stdio;

fn at_once() -> Stop {
    let ends = CancellationToken::new();
    ends.cancel();
    Stop::Waits(ends)
}

/// A container with a volume at `source`.
fn spec(source: &std::path::Path) -> ContainerSpec {
    let oci = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": { "cwd": "/", "user": { "uid": 0, "gid": 0 }, "args": ["true"] },
        "mounts": [{ "destination": "/volume", "type": "bind", "source": source,
                     "options": ["rbind"] }],
        "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }] },
    });
    ContainerSpec {
        id: ContainerId::new("c1").unwrap(),
        oci: serde_json::from_value(oci).unwrap(),
        rootfs: vec![RootfsMount {
            fstype: "tmpfs".into(),
            source: "tmpfs".into(),
            options: vec![],
        }],
        stdio: Stdio::default(),
    }
}

/// Until nobody else has the tree.
async fn ended(tree: &Arc<SharedTree>) {
    let by = soon();
    while Arc::strong_count(tree) > 1 {
        assert!(!by.passed(), "what blocked does not go on");
        tokio::task::yield_now().await;
    }
}

#[test]
fn a_volume_that_blocks_is_given_up_and_leaves_nothing_later() {
    apart(async |folder| {
        let absent = folder.join("away");
        let Some(server) = Away::new(&absent) else {
            return;
        };
        let (sandbox, _guest) = fixture::sandbox(folder, at_once()).await;
        let share = folder.join("share");
        let tree = Arc::new(SharedTree::create(&share).unwrap());
        let spec = Arc::new(spec(&absent.join("data")));
        let by = Deadline::after(Duration::from_millis(300));
        let translated = soon().run(sandbox.translate(&spec, &tree, by)).await;
        let error = translated.expect("it is waited for").unwrap_err();
        assert!(matches!(error, SandboxError::Blocked(_)), "{error:?}");
        remove_tree(Arc::clone(&tree), &spec.id, soon()).await;
        assert!(!share.join("c1").exists());
        // It goes on, and puts the volume's mount point there.
        drop(server);
        ended(&tree).await;
        assert!(!share.join("c1").exists());
        assert!(tree.teardown(soon()).unwrap().is_clean());
    });
}

/// Where the way to the mounts leads through what blocks.
#[test]
fn an_unmount_that_blocks_is_reported_and_not_waited_for() {
    apart(async |folder| {
        let (sandbox, _guest) = fixture::sandbox(folder, at_once()).await;
        sandbox.death.set("it is none".into()).unwrap();
        let above = folder.join("above");
        std::fs::create_dir(&above).unwrap();
        let share = above.join("share");
        let tree = Arc::new(SharedTree::create(&share).unwrap());
        let id = ContainerId::new("c1").unwrap();
        tree.mount_rootfs(&id, &spec(folder).rootfs).unwrap();
        let Some(server) = Away::new(&above) else {
            return;
        };
        sandbox.parts.lock().await.as_mut().unwrap().tree = Some(Arc::clone(&tree));

        let removed = remove_tree(Arc::clone(&tree), &id, Deadline::after(Duration::ZERO));
        assert!(soon().run(removed).await.is_ok(), "a delete waits");
        let report = soon().run(sandbox.stop(Deadline::after(Duration::ZERO)));
        let report = report.await.expect("the teardown waits");
        let (_, outcome) = report.steps().find(|(step, _)| *step == "tree").unwrap();
        assert!(
            matches!(outcome, Outcome::Failed(reason) if reason.contains("blocks")),
            "{report}"
        );
        drop(server);
        ended(&tree).await;
        assert!(podhull_storage::sweep(&share, soon()).unwrap().is_clean());
    });
}
