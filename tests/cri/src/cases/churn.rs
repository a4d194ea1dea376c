// SPDX-License-Identifier: Apache-2.0
//! Containers of a pod come and go: what serves their files does not grow.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use podhull_testkit::cri::Pod;

use crate::case::{cases, contains};
use crate::context::Context;
use crate::procfs::{Processes, Role};

cases! {
    PODHULL_TWICE:
        churn_of_containers_leaves_files_and_mounts_flat;
}

/// Restarts before the first and before the second count.
const FEW: u32 = 3;
const MANY: u32 = 15;
/// For a guest to give back what nobody uses any more.
const GIVEN_BACK: Duration = Duration::from_secs(5);

/// What the pod's processes hold of its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    server_files: usize,
    server_mounts: usize,
    shim_files: usize,
    shim_mounts: usize,
}

impl Held {
    fn by(pod: &Pod) -> Result<Self> {
        let processes = Processes::of(pod.id())?;
        let (server, shim) = (processes.pid(Role::FileServer)?, processes.pid(Role::Shim)?);
        let files = |pid| -> Result<usize> {
            let folder = fs::read_dir(format!("/proc/{pid}/fd"));
            Ok(folder.context("list descriptors")?.count())
        };
        let mounts = |pid| -> Result<usize> {
            let text = fs::read_to_string(format!("/proc/{pid}/mountinfo"));
            Ok(text.context("read the mounts")?.lines().count())
        };
        Ok(Self {
            server_files: files(server)?,
            server_mounts: mounts(server)?,
            shim_files: files(shim)?,
            shim_mounts: mounts(shim)?,
        })
    }

    fn exceeds(self, other: Self) -> bool {
        self.server_files > other.server_files
            || self.server_mounts > other.server_mounts
            || self.shim_files > other.shim_files
            || self.shim_mounts > other.shim_mounts
    }
}

/// A container with a volume comes, looks at many files, and goes.
async fn come_and_go(t: &Context, pod: &Pod, folder: &str, attempt: u32) -> Result<()> {
    let script =
        format!("ls -lR /bin /etc /data >/dev/null; echo {attempt} >/data/last; echo seen");
    let container = t
        .container(pod, "restarts")
        .attempt(attempt)
        .shell(&script)
        .mount(folder, "/data", false)
        .start()
        .await?;
    container.exited(Duration::from_secs(30)).await?;
    contains!(container.log()?.text(), "seen");
    container.remove().await
}

async fn churn_of_containers_leaves_files_and_mounts_flat(t: &Context) -> Result<()> {
    let folder = t.new_folder("data")?;
    for number in 0..50 {
        t.new_file(&format!("data/file-{number}"), "content\n")?;
    }
    let pod = t.ready_pod().await?;
    let stays = t.container(&pod, "stays").idle().start().await?;
    for attempt in 0..FEW {
        come_and_go(t, &pod, &folder, attempt).await?;
    }
    let few = Held::by(&pod)?;
    for attempt in FEW..MANY {
        come_and_go(t, &pod, &folder, attempt).await?;
    }
    let by = Instant::now() + GIVEN_BACK;
    loop {
        let many = Held::by(&pod)?;
        if !many.exceeds(few) {
            break;
        }
        if Instant::now() > by {
            bail!("after {FEW} restarts: {few:?}, after {MANY}: {many:?}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let last = fs::read_to_string(Path::new(&folder).join("last"))?;
    contains!(last, &(MANY - 1).to_string());
    // What else the pod has of the share still works.
    stays.exec(["ls", "/bin/busybox"]).await?.success()?;
    Ok(())
}
