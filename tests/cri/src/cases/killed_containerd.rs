// SPDX-License-Identifier: Apache-2.0
//! containerd is killed while it answers a call, early and late, and comes back: what
//! ran goes on, the kubelet's clean-up works, and nothing stays.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use podhull_testkit::oracle::assert_clean;

use super::killed::{Call, GONE, MOMENTS, killed_at, removed};
use super::restart::restart;
use crate::case::cases;
use crate::context::Context;
use crate::runner;

cases! {
    PODHULL_TWICE:
        killed_containerd_in_run_pod_leaves_nothing,
        killed_containerd_in_create_and_start_spares_the_pod,
        killed_containerd_in_exec_spares_the_pod,
        killed_containerd_in_kill_and_delete_spares_the_pod,
        killed_containerd_in_stop_pod_leaves_nothing,
        killed_containerd_in_remove_pod_leaves_nothing;
}

/// Time for containerd to be back, and for the call to have failed.
const BACK: Duration = Duration::from_secs(60);

/// Kills containerd at `moment` of `calling`, which says when it has ended, and
/// brings it back; true if the call was under way.
async fn killed_in(
    t: &Context,
    moment: Duration,
    calling: impl Future<Output = ()>,
) -> Result<bool> {
    let answered = Cell::new(false);
    let calling = async {
        calling.await;
        answered.set(true);
    };
    let killing = async {
        tokio::time::sleep(moment).await;
        let under_way = !answered.get();
        restart(t, Signal::SIGKILL).await?;
        anyhow::Ok(under_way)
    };
    let both = async { tokio::join!(calling, killing) };
    let ((), killed) = tokio::time::timeout(BACK, both)
        .await
        .context("the call is not answered")?;
    killed
}

async fn killed_while_it_runs_a_pod(t: &Context, moment: Duration) -> Result<bool> {
    // It may have come to be; whoever asks again has to know from the list.
    let calling = async { drop(t.ready_pod().await) };
    let under_way = killed_in(t, moment, calling).await?;
    for id in t.client().pod_ids(None).await? {
        runner::remove(t, &id).await?;
    }
    assert_clean(&*t.containerd().await, t.before(), GONE).await?;
    Ok(under_way)
}

async fn killed_containerd_in_run_pod_leaves_nothing(t: &Context) -> Result<()> {
    let begin = Instant::now();
    let pod = t.ready_pod().await?;
    let whole = begin.elapsed();
    pod.remove().await?;
    killed_at(t, MOMENTS, whole, async |moment| {
        killed_while_it_runs_a_pod(t, moment).await
    })
    .await
}

/// True if the call was under way. A pod that was not asked to end is there as before.
async fn killed_after(t: &Context, call: Call, moment: Duration) -> Result<bool> {
    let (pod, container) = call.prepared(t).await?;
    let calling = async { drop(call.make(&pod, &container).await) };
    let under_way = killed_in(t, moment, calling).await?;
    if !call.ends_its_pod() {
        ensure!(pod.is_ready().await?, "the pod is no longer Ready");
        let next = t.container(&pod, "next").idle().start().await?;
        next.exec(["true"]).await?.success()?;
    }
    removed(&pod).await?;
    assert_clean(&*t.containerd().await, t.before(), GONE).await?;
    Ok(under_way)
}

async fn killed_during(t: &Context, call: Call) -> Result<()> {
    let whole = call.takes(t).await?;
    killed_at(t, call.moments(), whole, async |moment| {
        killed_after(t, call, moment).await
    })
    .await
}

async fn killed_containerd_in_create_and_start_spares_the_pod(t: &Context) -> Result<()> {
    killed_during(t, Call::CreateAndStart).await
}

async fn killed_containerd_in_exec_spares_the_pod(t: &Context) -> Result<()> {
    killed_during(t, Call::Exec).await
}

async fn killed_containerd_in_kill_and_delete_spares_the_pod(t: &Context) -> Result<()> {
    killed_during(t, Call::KillAndDelete).await
}

async fn killed_containerd_in_stop_pod_leaves_nothing(t: &Context) -> Result<()> {
    killed_during(t, Call::StopPod).await
}

async fn killed_containerd_in_remove_pod_leaves_nothing(t: &Context) -> Result<()> {
    killed_during(t, Call::RemovePod).await
}
