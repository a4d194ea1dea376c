// SPDX-License-Identifier: Apache-2.0
//! podhull or containerd gets another version while pods run.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use podhull_testkit::{Release, pod_processes};

use super::fault::has_ended;
use super::restart::{pods_go_on, restart};
use crate::case::{Skip, cases, same};
use crate::context::Context;
use crate::procfs::{Processes, Role, signal};
use crate::runner::remove_everything;

cases! {
    PODHULL:
        upgrade_of_podhull_leaves_pods_to_the_shims_they_have,
        upgrade_of_podhull_while_pods_start_holds_none_up,
        upgrade_of_podhull_cleans_up_after_a_shim_of_before;
    RUNC_AND_PAUSE_1:
        upgrade_of_containerd_to_2_leaves_pods_running;
}

/// A shim is started within this.
const STARTS: Duration = Duration::from_secs(20);

/// True if the file that `pid` runs is no longer there.
fn is_of_before(pid: u32) -> Result<bool> {
    let program = fs::read_link(format!("/proc/{pid}/exe")).context("look at a shim's program")?;
    Ok(program.to_string_lossy().ends_with(" (deleted)"))
}

async fn upgrade_of_podhull_leaves_pods_to_the_shims_they_have(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let shim = Processes::of(pod.id())?.pid(Role::Shim)?;
    t.containerd().await.replace_shim()?;
    ensure!(is_of_before(shim)?, "the shim's file is still there");
    same!(container.shell("exit 3").await?.code, 3);
    // containerd finds it again, and containers that come later go there, too.
    restart(t, Signal::SIGTERM).await?;
    let second = t.container(&pod, "second").idle().start().await?;
    same!(second.shell("exit 4").await?.code, 4);
    same!(Processes::of(pod.id())?.pid(Role::Shim)?, shim, "the shim");
    let new = t.pod("new").run().await?;
    let others = Processes::of(new.id())?.pid(Role::Shim)?;
    ensure!(
        !is_of_before(others)?,
        "a new pod has the program of before"
    );
    for pod in [new, pod] {
        pod.stop().await?;
        pod.remove().await?;
    }
    Ok(())
}

/// A shim's helpers are the shim's own program, also when its file is gone.
async fn upgrade_of_podhull_while_pods_start_holds_none_up(t: &Context) -> Result<()> {
    for _ in 0..3 {
        let upgrade = async {
            let next = t.containerd().await.next_shim()?;
            let by = Instant::now() + STARTS;
            while pod_processes::shims()?.is_empty() {
                ensure!(Instant::now() < by, "no shim is started");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            next()
        };
        let (pod, upgraded) = tokio::join!(t.ready_pod(), upgrade);
        upgraded?;
        let pod = pod?;
        let processes = Processes::of(pod.id())?;
        let shim = processes.pid(Role::Shim)?;
        ensure!(is_of_before(shim)?, "the upgrade came before the shim");
        let name = fs::read_to_string(format!("/proc/{shim}/comm"))?;
        same!(name.trim_end(), "containerd-shim");
        let program = |pid| fs::metadata(format!("/proc/{pid}/exe")).map(|file| file.ino());
        let helper = processes.pid(Role::FileServer)?;
        same!(
            program(helper)?,
            program(shim)?,
            "the file server's program"
        );
        let container = t.container(&pod, "main").idle().start().await?;
        same!(container.shell("exit 3").await?.code, 3);
        pod.stop().await?;
        pod.remove().await?;
    }
    Ok(())
}

async fn upgrade_of_podhull_cleans_up_after_a_shim_of_before(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let processes = Processes::of(pod.id())?;
    t.containerd().await.replace_shim()?;
    signal(processes.pid(Role::Shim)?, Signal::SIGKILL)?;
    has_ended(&pod, &container, &processes).await.map(drop)
}

async fn upgrade_of_containerd_to_2_leaves_pods_running(t: &Context) -> Result<()> {
    const TO: Release = Release::V2_4;
    if TO.check(t.node().programs()).is_err() {
        return Err(Skip(format!("containerd {} is not built", TO.name())).into());
    }
    let from = t.containerd().await.release();
    let went_on = pods_go_on(t, async |t| {
        let mut containerd = t.containerd_mut().await;
        containerd.stop(Signal::SIGTERM).await?;
        containerd.start_again_as(TO).await
    })
    .await;
    if went_on.is_err() {
        // What it left would be lost to the next containerd.
        remove_everything(t).await?;
    }
    {
        // There is no way back but from the start.
        let mut containerd = t.containerd_mut().await;
        containerd.stop(Signal::SIGTERM).await?;
        containerd.start_anew_as(from).await?;
    }
    went_on?;
    let (pod, container) = t.idle().await?;
    container.exec(["true"]).await?.success()?;
    pod.stop().await?;
    container.remove().await?;
    pod.remove().await
}
