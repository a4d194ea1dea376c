// SPDX-License-Identifier: Apache-2.0
//! The context ids of pods: each holds one of its own, by the vhost device that
//! its shim opens, until its VMM is gone.

use std::fs;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use podhull_testkit::context_id;

use super::fault::killed_pod_is_noticed;
use crate::case::cases;
use crate::context::Context;
use crate::procfs::{Processes, Role, signal};
use crate::vsock_guest::needs_the_kernels_vsock;

cases! {
    PODHULL_ONCE:
        vsock_id_is_each_pods_own_until_it_ends,
        vsock_id_is_free_after_a_killed_shim,
        vsock_id_is_free_after_a_killed_vmm;
}

const WITHIN: Duration = Duration::from_secs(10);

/// The id of a pod's guest, by its VMM's arguments.
pub(super) fn id_of(processes: &Processes) -> Result<u32> {
    let vmm = processes.pid(Role::Vmm)?;
    let arguments = fs::read(format!("/proc/{vmm}/cmdline")).context("read the arguments")?;
    let arguments = String::from_utf8_lossy(&arguments);
    let (_, id) = arguments
        .split_once("guest-cid=")
        .with_context(|| format!("no context id: {arguments}"))?;
    // Who starts a VMM has opened the device, which holds the id, and passes it on.
    let (id, _) = id
        .split_once(",vhostfd=")
        .with_context(|| format!("no device is passed on: {arguments}"))?;
    id.parse().with_context(|| format!("a context id: {id}"))
}

fn is_taken(id: u32) -> Result<()> {
    let error = context_id::reserve(id).err();
    let kind = error.as_ref().map(std::io::Error::kind);
    ensure!(
        kind == Some(ErrorKind::AddrInUse),
        "a pod's id {id} is for everyone to take: {error:?}"
    );
    Ok(())
}

/// Its threads may outlive what /proc shows of a VMM by a moment, and hold it.
async fn is_free(id: u32) -> Result<()> {
    let by = Instant::now() + Duration::from_secs(2);
    loop {
        match context_id::reserve(id) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < by => {}
            reserved => {
                drop(reserved.with_context(|| format!("id {id} is held by what has ended"))?);
                return Ok(());
            }
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn vsock_id_is_each_pods_own_until_it_ends(t: &Context) -> Result<()> {
    needs_the_kernels_vsock()?;
    let (one, other) = tokio::try_join!(t.pod("one").run(), t.pod("other").run())?;
    let mut ids = Vec::new();
    for pod in [&one, &other] {
        let id = id_of(&Processes::of(pod.id())?)?;
        is_taken(id)?;
        ids.push(id);
    }
    ensure!(ids[0] != ids[1], "two pods have the id {}", ids[0]);
    for (pod, id) in [&one, &other].into_iter().zip(ids) {
        pod.stop().await?;
        is_free(id).await?;
        pod.remove().await?;
    }
    Ok(())
}

/// Kills `role`: with the VMM's end its id is free.
async fn is_free_after_killing(t: &Context, role: Role) -> Result<()> {
    needs_the_kernels_vsock()?;
    let pod = t.ready_pod().await?;
    let processes = Processes::of(pod.id())?;
    let id = id_of(&processes)?;
    is_taken(id)?;
    signal(processes.pid(role)?, Signal::SIGKILL)?;
    processes.vm_gone(WITHIN).await?;
    is_free(id).await?;
    killed_pod_is_noticed(&pod).await?;
    pod.stop().await?;
    pod.remove().await?;
    processes.gone(WITHIN).await
}

async fn vsock_id_is_free_after_a_killed_shim(t: &Context) -> Result<()> {
    is_free_after_killing(t, Role::Shim).await
}

async fn vsock_id_is_free_after_a_killed_vmm(t: &Context) -> Result<()> {
    is_free_after_killing(t, Role::Vmm).await
}
