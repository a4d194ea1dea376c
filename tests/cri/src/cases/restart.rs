// SPDX-License-Identifier: Apache-2.0
//! containerd ends and comes back; pods go on.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use podhull_testkit::cri::api::ContainerState;

use super::lifecycle::boot_id;
use crate::case::{cases, same};
use crate::context::Context;
use crate::procfs::{Processes, Role, signal};

cases! {
    ALL:
        restart_by_sigterm_leaves_pods_running,
        restart_by_sigkill_leaves_pods_running,
        restart_keeps_the_exit_code_of_meanwhile;
    PODHULL:
        restart_notices_a_pod_that_died_meanwhile,
        restart_keeps_a_pod_without_containers;
}

const WITHIN: Duration = Duration::from_secs(30);

pub(super) async fn restart(t: &Context, with: Signal) -> Result<()> {
    let mut containerd = t.containerd_mut().await;
    containerd.stop(with).await?;
    containerd.start_again().await
}

/// A pod with a container that writes lines goes on over what `restart` does to
/// containerd.
pub(super) async fn pods_go_on(
    t: &Context,
    restart: impl AsyncFnOnce(&Context) -> Result<()>,
) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .shell("trap 'exit 0' TERM; n=0; while :; do n=$((n+1)); echo line $n; sleep 0.1; done")
        .start()
        .await?;
    container.wrote("line 3", WITHIN).await?;
    let boot = boot_id(&container).await?;
    restart(t).await?;
    ensure!(pod.is_ready().await?, "the pod is no longer Ready");
    same!(
        container.status().await?.state(),
        ContainerState::ContainerRunning
    );
    same!(boot_id(&container).await?, boot, "the kernel");
    // Its log goes on, and no line was lost.
    let seen = container.log()?.text().lines().count();
    container
        .wrote(&format!("line {}", seen + 5), WITHIN)
        .await?;
    let text = container.log()?.text();
    for (line, number) in text.lines().zip(1..) {
        same!(line, format!("line {number}"));
    }
    // What is new works, and what was there ends.
    let second = t.container(&pod, "second").idle().start().await?;
    same!(second.shell("exit 3").await?.code, 3);
    container.stop(10).await?;
    same!(container.status().await?.exit_code, 0);
    pod.stop().await?;
    pod.remove().await
}

async fn restart_by_sigterm_leaves_pods_running(t: &Context) -> Result<()> {
    pods_go_on(t, async |t| restart(t, Signal::SIGTERM).await).await
}

async fn restart_by_sigkill_leaves_pods_running(t: &Context) -> Result<()> {
    pods_go_on(t, async |t| restart(t, Signal::SIGKILL).await).await
}

/// Ends a container while containerd is away: it waits for `go` in `folder`, which
/// is called `data`, and leaves `gone` there.
pub(super) async fn meanwhile_it_ends(t: &Context, folder: &str) -> Result<()> {
    let mut containerd = t.containerd_mut().await;
    containerd.stop(Signal::SIGKILL).await?;
    t.new_file("data/go", "")?;
    let by = Instant::now() + WITHIN;
    while !Path::new(folder).join("gone").exists() {
        ensure!(Instant::now() < by, "the container does not see the file");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    // It ends at once; nobody is there to be told.
    tokio::time::sleep(Duration::from_millis(500)).await;
    containerd.start_again().await
}

async fn restart_keeps_the_exit_code_of_meanwhile(t: &Context) -> Result<()> {
    let folder = t.new_folder("data")?;
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .shell("echo waiting; until [ -e /data/go ]; do sleep 0.1; done; echo >/data/gone; exit 6")
        .mount(&folder, "/data", false)
        .start()
        .await?;
    let stays = t.container(&pod, "stays").idle().start().await?;
    container.wrote("waiting", WITHIN).await?;
    meanwhile_it_ends(t, &folder).await?;
    let status = container.exited(WITHIN).await?;
    // containerd 2.4 takes a runc task without processes for a leaked shim.
    let expected = if t.is_podhull() || t.is_16() { 6 } else { 255 };
    same!(status.exit_code, expected);
    stays.exec(["true"]).await?.success()?;
    container.remove().await?;
    pod.stop().await?;
    pod.remove().await
}

async fn restart_notices_a_pod_that_died_meanwhile(t: &Context) -> Result<()> {
    let (with_shim, one) = t.idle().await?;
    let (without, two) = t.idle().await?;
    let shims = Processes::of(without.id())?;
    let vms = Processes::of(with_shim.id())?;
    {
        let mut containerd = t.containerd_mut().await;
        containerd.stop(Signal::SIGTERM).await?;
        signal(shims.pid(Role::Shim)?, Signal::SIGKILL)?;
        signal(vms.pid(Role::Vmm)?, Signal::SIGKILL)?;
        shims.gone(WITHIN).await?;
        containerd.start_again().await?;
    }
    for (pod, container) in [(&with_shim, &one), (&without, &two)] {
        pod.not_ready(WITHIN).await?;
        let status = container.exited(WITHIN).await?;
        ensure!(status.exit_code != 0, "exit code {}", status.exit_code);
        pod.stop().await?;
        pod.remove().await?;
    }
    Ok(())
}

async fn restart_keeps_a_pod_without_containers(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    restart(t, Signal::SIGTERM).await?;
    ensure!(pod.is_ready().await?, "the pod is no longer Ready");
    let container = t.container(&pod, "main").idle().start().await?;
    container.exec(["true"]).await?.success()?;
    Ok(())
}
