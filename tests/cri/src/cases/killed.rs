// SPDX-License-Identifier: Apache-2.0
//! A shim is killed while it answers a call, early and late: nothing stays, and
//! containerd goes on.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use podhull_testkit::cri::{Container, Pod};
use podhull_testkit::oracle::assert_clean;

use super::fault::killed_pod_is_noticed;
use crate::case::cases;
use crate::context::Context;
use crate::procfs::{Processes, Role, signal};

cases! {
    PODHULL_TWICE:
        killed_shim_in_create_and_start_leaves_nothing,
        killed_shim_in_exec_leaves_nothing,
        killed_shim_in_kill_and_delete_leaves_nothing;
}

/// When the shim is killed, in parts of the time that a call takes undisturbed.
const MOMENTS: [f64; 4] = [0.1, 0.35, 0.6, 0.85];
/// A call whose shim is gone is answered within this.
const ANSWERED: Duration = Duration::from_secs(20);
const GONE: Duration = Duration::from_secs(10);

/// What is asked when the shim is killed.
#[derive(Debug, Clone, Copy)]
enum Call {
    /// CRI's StartContainer is Create and Start.
    CreateAndStart,
    Exec,
    /// CRI's StopContainer is Kill, and Delete once the process has ended.
    KillAndDelete,
}

impl Call {
    async fn prepared(self, t: &Context) -> Result<(Pod, Container)> {
        match self {
            Self::CreateAndStart => {
                let pod = t.ready_pod().await?;
                let container = t.container(&pod, "main").idle().create().await?;
                Ok((pod, container))
            }
            Self::Exec | Self::KillAndDelete => t.idle().await,
        }
    }

    async fn make(self, container: &Container) -> Result<()> {
        match self {
            Self::CreateAndStart => container.start().await,
            Self::Exec => container.exec(["true"]).await?.success().map(drop),
            Self::KillAndDelete => container.stop(0).await,
        }
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
        drop(call.make(&container).await);
        answered.set(true);
    };
    let killing = async {
        tokio::time::sleep(moment).await;
        let under_way = !answered.get();
        signal(shim, Signal::SIGKILL).map(|()| under_way)
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
async fn removed(pod: &Pod) -> Result<()> {
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

async fn killed_during(t: &Context, call: Call) -> Result<()> {
    let (pod, container) = call.prepared(t).await?;
    let begin = Instant::now();
    call.make(&container).await?;
    let whole = begin.elapsed();
    pod.remove().await?;
    let mut hit = 0;
    for part in MOMENTS {
        let moment = whole.mul_f64(part);
        let met = killed_after(t, call, moment).await;
        hit += u32::from(met.with_context(|| format!("{call:?}, killed after {moment:?}"))?);
    }
    ensure!(hit > 1, "{hit} kills met a call that takes {whole:?}");
    let (_pod, container) = t.idle().await?;
    container.exec(["true"]).await?.success().map(drop)
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
