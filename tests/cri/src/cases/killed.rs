// SPDX-License-Identifier: Apache-2.0
//! A shim is killed while it answers a call, early and late: nothing stays, and
//! containerd goes on.

use std::cell::Cell;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use podhull_testkit::cri::{Container, Pod};
use podhull_testkit::oracle::assert_clean;
use podhull_testkit::{pod_netns, pod_processes};

use super::fault::killed_pod_is_noticed;
use crate::case::cases;
use crate::context::Context;
use crate::procfs::{Processes, Role, signal};

cases! {
    PODHULL_TWICE:
        killed_shim_in_run_pod_leaves_nothing,
        killed_shim_in_stop_pod_leaves_nothing,
        killed_shims_redirects_are_gone_before_its_pod,
        killed_shim_in_create_and_start_leaves_nothing,
        killed_shim_in_exec_leaves_nothing,
        killed_shim_in_kill_and_delete_leaves_nothing;
}

/// When the shim is killed, in parts of the time that a call takes undisturbed.
pub(super) const MOMENTS: [f64; 4] = [0.1, 0.35, 0.6, 0.85];
/// The same of StopPodSandbox, which ends with what needs no shim.
const EARLY: [f64; 4] = [0.03, 0.08, 0.15, 0.3];
/// A call whose shim is gone is answered within this.
const ANSWERED: Duration = Duration::from_secs(20);
pub(super) const GONE: Duration = Duration::from_secs(10);

/// What is asked when a shim, or containerd, is killed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Call {
    /// CRI's StartContainer is Create and Start.
    CreateAndStart,
    Exec,
    /// CRI's StopContainer is Kill, and Delete once the process has ended.
    KillAndDelete,
    /// CRI's StopPodSandbox, with a container that runs.
    StopPod,
    /// CRI's RemovePodSandbox, which stops such a pod first.
    RemovePod,
}

impl Call {
    pub(super) async fn prepared(self, t: &Context) -> Result<(Pod, Container)> {
        match self {
            Self::CreateAndStart => {
                let pod = t.ready_pod().await?;
                let container = t.container(&pod, "main").idle().create().await?;
                Ok((pod, container))
            }
            Self::Exec | Self::KillAndDelete | Self::StopPod | Self::RemovePod => t.idle().await,
        }
    }

    pub(super) fn moments(self) -> [f64; 4] {
        match self {
            Self::StopPod | Self::RemovePod => EARLY,
            Self::CreateAndStart | Self::Exec | Self::KillAndDelete => MOMENTS,
        }
    }

    pub(super) async fn make(self, pod: &Pod, container: &Container) -> Result<()> {
        match self {
            Self::CreateAndStart => container.start().await,
            Self::Exec => container.exec(["true"]).await?.success().map(drop),
            Self::KillAndDelete => container.stop(0).await,
            Self::StopPod => pod.stop().await,
            Self::RemovePod => pod.remove().await,
        }
    }

    /// How long it takes undisturbed.
    pub(super) async fn takes(self, t: &Context) -> Result<Duration> {
        let (pod, container) = self.prepared(t).await?;
        let begin = Instant::now();
        self.make(&pod, &container).await?;
        let took = begin.elapsed();
        pod.remove().await?;
        Ok(took)
    }

    pub(super) fn ends_its_pod(self) -> bool {
        matches!(self, Self::StopPod | Self::RemovePod)
    }
}

/// True if the call was under way.
async fn killed_after(t: &Context, call: Call, moment: Duration) -> Result<bool> {
    let (pod, container) = call.prepared(t).await?;
    let processes = Processes::of(pod.id())?;
    let shim = processes.pid(Role::Shim)?;
    let answered = Cell::new(false);
    let calling = async {
        // It may have come to its end before, or without the shim.
        drop(call.make(&pod, &container).await);
        answered.set(true);
    };
    let killing = async {
        tokio::time::sleep(moment).await;
        let under_way = !answered.get();
        match signal(shim, Signal::SIGKILL) {
            // Its pod has been stopped, and containerd goes on with the network.
            Err(error) if error.downcast_ref() == Some(&Errno::ESRCH) => Ok(false),
            result => result.map(|()| under_way),
        }
    };
    let both = async { tokio::join!(calling, killing) };
    let ((), killed) = tokio::time::timeout(ANSWERED, both)
        .await
        .context("the call is not answered")?;
    let under_way = killed?;
    processes.gone(GONE).await?;
    killed_pod_is_noticed(&pod).await?;
    removed(&pod).await?;
    assert_clean(&*t.containerd().await, t.before(), GONE).await?;
    Ok(under_way)
}

/// The pod goes. Until containerd has noticed each container's end, it refuses;
/// the kubelet asks again, too.
pub(super) async fn removed(pod: &Pod) -> Result<()> {
    let by = Instant::now() + GONE;
    loop {
        let gone = async {
            pod.stop().await?;
            pod.remove().await
        };
        match gone.await {
            Err(error) if Instant::now() > by => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            Ok(()) => return Ok(()),
        }
    }
}

/// Kills at each of `moments` of a call that takes `whole` undisturbed; `kill` gives
/// whether it met the call. Then a pod runs as ever.
pub(super) async fn killed_at(
    t: &Context,
    moments: [f64; 4],
    whole: Duration,
    kill: impl AsyncFn(Duration) -> Result<bool>,
) -> Result<()> {
    let mut hit = 0;
    for part in moments {
        let moment = whole.mul_f64(part);
        let met = kill(moment).await;
        hit += u32::from(met.with_context(|| format!("killed after {moment:?}"))?);
    }
    ensure!(hit > 1, "{hit} kills met a call that takes {whole:?}");
    let (_pod, container) = t.idle().await?;
    container.exec(["true"]).await?.success().map(drop)
}

async fn killed_during(t: &Context, call: Call) -> Result<()> {
    let whole = call.takes(t).await?;
    killed_at(t, call.moments(), whole, async |moment| {
        killed_after(t, call, moment).await
    })
    .await
}

/// True if the pod did not come to be.
async fn killed_while_it_boots(t: &Context, moment: Duration) -> Result<bool> {
    let killing = async {
        tokio::time::sleep(moment).await;
        let shims = pod_processes::shims()?;
        for shim in &shims {
            // One that had started another has ended meanwhile.
            drop(signal(*shim, Signal::SIGKILL));
        }
        anyhow::Ok(!shims.is_empty())
    };
    let both = async { tokio::join!(t.ready_pod(), killing) };
    let (pod, killed) = tokio::time::timeout(ANSWERED, both)
        .await
        .context("RunPodSandbox is not answered")?;
    let (killed, failed) = (killed?, pod.is_err());
    if let Ok(pod) = pod {
        if killed {
            killed_pod_is_noticed(&pod).await?;
        }
        removed(&pod).await?;
    }
    // What containerd could not undo while `delete` was at work is still listed.
    for id in t.client().pod_ids(None).await? {
        crate::runner::remove(t, &id).await?;
    }
    assert_clean(&*t.containerd().await, t.before(), GONE).await?;
    Ok(killed && failed)
}

async fn killed_shim_in_run_pod_leaves_nothing(t: &Context) -> Result<()> {
    let begin = Instant::now();
    let pod = t.ready_pod().await?;
    let whole = begin.elapsed();
    pod.remove().await?;
    killed_at(t, MOMENTS, whole, async |moment| {
        killed_while_it_boots(t, moment).await
    })
    .await
}

async fn killed_shim_in_stop_pod_leaves_nothing(t: &Context) -> Result<()> {
    killed_during(t, Call::StopPod).await
}

/// What a pod's network has of podhull's: its tap, redirects, and rules.
fn of_podhull() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for (program, arguments, ours) in [
        ("ip", ["-oneline", "link"], "podhull"),
        ("tc", ["qdisc", "show"], "ingress"),
        ("nft", ["list", "ruleset"], "podhull"),
    ] {
        let output = Command::new(program).args(arguments).output()?;
        ensure!(output.status.success(), "{program}: {output:?}");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        found.extend(
            text.lines()
                .filter(|line| line.contains(ours))
                .map(str::to_owned),
        );
    }
    Ok(found)
}

/// containerd asks for the clean-up once it has noticed; the CNI plugins are asked
/// only when the pod is stopped, and must find the network as they left it.
async fn killed_shims_redirects_are_gone_before_its_pod(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let namespace = pod_netns::open()?;
    let before = pod_netns::inside(&namespace, of_podhull).await?;
    ensure!(before.len() > 2, "a pod's network has only {before:?}");
    let processes = Processes::of(pod.id())?;
    signal(processes.pid(Role::Shim)?, Signal::SIGKILL)?;
    let by = Instant::now() + GONE;
    loop {
        let left = pod_netns::inside(&namespace, of_podhull).await?;
        if left.is_empty() {
            break;
        }
        ensure!(Instant::now() < by, "left: {left:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    killed_pod_is_noticed(&pod).await?;
    removed(&pod).await
}

async fn killed_shim_in_create_and_start_leaves_nothing(t: &Context) -> Result<()> {
    killed_during(t, Call::CreateAndStart).await
}

async fn killed_shim_in_exec_leaves_nothing(t: &Context) -> Result<()> {
    killed_during(t, Call::Exec).await
}

async fn killed_shim_in_kill_and_delete_leaves_nothing(t: &Context) -> Result<()> {
    killed_during(t, Call::KillAndDelete).await
}
