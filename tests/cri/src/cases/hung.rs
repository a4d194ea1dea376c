// SPDX-License-Identifier: Apache-2.0
//! A shim that does not answer: `delete` ends it, and nothing stays.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use tokio::process::Command;

use crate::case::cases;
use crate::context::Context;
use crate::procfs::{Processes, Role, signal};

cases! {
    PODHULL_TWICE:
        hung_shim_is_killed_by_delete,
        hung_shim_is_killed_when_containerd_comes_back,
        hung_shim_survives_the_delete_of_a_container;
}

/// containerd gives `delete` 5 s.
const DELETE: Duration = Duration::from_secs(5);
const WITHIN: Duration = Duration::from_secs(30);

/// Runs the shim's `delete` of `id` as containerd does.
async fn delete(t: &Context, id: &str) -> Result<()> {
    let bundle = format!("/run/containerd/io.containerd.runtime.v2.task/k8s.io/{id}");
    let mut command = Command::new(&t.node().programs().shim);
    command
        .args(["-namespace", "k8s.io", "-address", "", "-id", id])
        .args(["-bundle", &bundle, "delete"])
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(DELETE, command.output())
        .await
        .context("delete takes longer than containerd waits")??;
    ensure!(output.status.success(), "delete failed: {output:?}");
    ensure!(!output.stdout.is_empty(), "no response: {output:?}");
    Ok(())
}

async fn hung_shim_is_killed_by_delete(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let processes = Processes::of(pod.id())?;
    let shim = processes.pid(Role::Shim)?;
    signal(shim, Signal::SIGSTOP)?;
    delete(t, pod.id()).await?;
    // It is gone when `delete` says so; its children die with it.
    processes.gone(Duration::from_secs(1)).await?;
    delete(t, pod.id()).await?;
    container.exited(WITHIN).await?;
    pod.stop().await?;
    pod.remove().await
}

async fn hung_shim_is_killed_when_containerd_comes_back(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let processes = Processes::of(pod.id())?;
    {
        let mut containerd = t.containerd_mut().await;
        containerd.stop(Signal::SIGTERM).await?;
        signal(processes.pid(Role::Shim)?, Signal::SIGSTOP)?;
        containerd.start_again().await?;
    }
    processes.gone(WITHIN).await?;
    pod.not_ready(WITHIN).await?;
    container.exited(WITHIN).await?;
    pod.stop().await?;
    pod.remove().await
}

/// Only the sandbox's own delete ends a shim: others may still be in its VM.
async fn hung_shim_survives_the_delete_of_a_container(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let processes = Processes::of(pod.id())?;
    let shim = processes.pid(Role::Shim)?;
    signal(shim, Signal::SIGSTOP)?;
    let deleted = delete(t, container.id()).await;
    signal(shim, Signal::SIGCONT)?;
    deleted?;
    container.exec(["true"]).await?.success()?;
    Ok(())
}
