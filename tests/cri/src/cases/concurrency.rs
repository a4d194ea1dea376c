// SPDX-License-Identifier: Apache-2.0
//! Things happen at once, are given up half way, or again and again.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use podhull_testkit::oracle::assert_clean;

use super::lifecycle::boot_id;
use crate::case::{cases, same};
use crate::context::Context;
use crate::held::OfEach;
use crate::procfs::Processes;

cases! {
    ALL_TWICE:
        lifecycle_pods_started_together_all_run,
        lifecycle_containers_started_together_all_run,
        lifecycle_pod_removed_while_a_container_starts_leaves_nothing;
    // runc itself leaves a cgroup behind now and then.
    PODHULL_TWICE:
        lifecycle_pod_whose_start_is_given_up_leaves_nothing,
        exec_repeated_leaves_the_shim_as_it_was;
}

async fn lifecycle_pods_started_together_all_run(t: &Context) -> Result<()> {
    let pods = try_join_all((0..3).map(|number| async move {
        let pod = t.pod(&format!("pod-{number}")).run().await?;
        let container = t.container(&pod, "main").idle().start().await?;
        let boot = boot_id(&container).await?;
        let (v4, _) = pod.addresses().await?;
        anyhow::Ok((pod, boot, v4))
    }))
    .await?;
    for (index, (pod, boot, v4)) in pods.iter().enumerate() {
        ensure!(pod.is_ready().await?, "a pod is not Ready");
        for (_, other_boot, other_v4) in &pods[index + 1..] {
            ensure!(v4 != other_v4, "two pods have {v4}");
            same!(
                boot == other_boot,
                !t.is_podhull(),
                "two pods share a kernel"
            );
        }
    }
    try_join_all(pods.iter().map(|(pod, ..)| pod.remove())).await?;
    Ok(())
}

async fn lifecycle_containers_started_together_all_run(t: &Context) -> Result<()> {
    let pod = &t.ready_pod().await?;
    try_join_all((0..6).map(|number| async move {
        let container = t
            .container(pod, &format!("c{number}"))
            .idle()
            .start()
            .await?;
        let output = container.shell(&format!("exit {number}")).await?;
        same!(output.code, number);
        container.stop(10).await?;
        same!(container.status().await?.exit_code, 0);
        container.remove().await
    }))
    .await?;
    pod.remove().await
}

async fn lifecycle_pod_whose_start_is_given_up_leaves_nothing(t: &Context) -> Result<()> {
    for milliseconds in [20, 100, 400, 700] {
        // The call is dropped, as by a kubelet that ends: containerd undoes it.
        let run = t.pod("given-up").run();
        let given_up = tokio::time::timeout(Duration::from_millis(milliseconds), run).await;
        if let Ok(pod) = given_up {
            pod?.remove().await?;
        }
    }
    // What containerd had finished before it noticed is still listed; it goes with the rest.
    let by = Instant::now() + Duration::from_secs(20);
    loop {
        for id in t.client().pod_ids(None).await? {
            crate::runner::remove(t, &id).await?;
        }
        let clean = assert_clean(
            &*t.containerd().await,
            t.before(),
            Duration::from_millis(500),
        )
        .await;
        match clean {
            Ok(()) => return Ok(()),
            // The folder of its logs is ours to remove, which the runner does.
            Err(error) if !error.to_string().lines().skip(1).any(is_a_leak) => return Ok(()),
            Err(error) => ensure!(Instant::now() < by, "{error:#}"),
        }
    }
}

fn is_a_leak(line: &str) -> bool {
    !line.trim().is_empty() && !line.contains("/var/log/pods/")
}

async fn lifecycle_pod_removed_while_a_container_starts_leaves_nothing(t: &Context) -> Result<()> {
    for milliseconds in [5, 40, 120] {
        let pod = t.ready_pod().await?;
        let start = t.container(&pod, "main").idle().start();
        let remove = async {
            tokio::time::sleep(Duration::from_millis(milliseconds)).await;
            pod.stop().await?;
            pod.remove().await
        };
        // The start may succeed or fail; neither may hang, and the pod goes.
        let begin = Instant::now();
        let both = async { tokio::join!(start, remove) };
        let (_, removed) = tokio::time::timeout(Duration::from_secs(40), both)
            .await
            .context("start and remove hang")?;
        let took = begin.elapsed();
        ensure!(
            took < Duration::from_secs(7),
            "begun {milliseconds} ms after the start, the removal took {took:?}"
        );
        // containerd may refuse to remove what is being made: the kubelet asks again.
        if removed.is_err() {
            pod.stop().await?;
            pod.remove().await?;
        }
    }
    Ok(())
}

async fn exec_repeated_leaves_the_shim_as_it_was(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let processes = Processes::of(pod.id())?;
    let round = async || -> Result<()> {
        container.shell("echo x; exit 1").await?;
        // Neither may one that fails, nor one whose streams nobody reads, leave something.
        ensure!(
            container.exec(["no-such-command"]).await.is_err(),
            "there is such a command"
        );
        container.exec(["true"]).await?.success()?;
        Ok(())
    };
    round().await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = OfEach::at_rest(&processes).await?;
    for _ in 0..10 {
        round().await?;
    }
    before.again(&processes).await
}
