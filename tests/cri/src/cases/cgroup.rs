// SPDX-License-Identifier: Apache-2.0
//! Limits of containers, and what happens at them.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use podhull_testkit::cri::Container;
use podhull_testkit::cri::api::{LinuxContainerResources, UpdateContainerResourcesRequest};

use crate::case::{cases, same};
use crate::context::Context;

cases! {
    TWICE_BUT_RUNC_16:
        cgroup_out_of_memory_is_reported;
    ALL_TWICE:
        cgroup_limits_are_those_of_the_container,
        cgroup_limits_are_updated_in_place;
    PODHULL_TWICE:
        cgroup_unified_limits_reach_the_guest,
        cgroup_out_of_memory_of_a_child_spares_the_container,
        cgroup_memory_limit_of_the_pod_sizes_the_guest;
}

const MIB: i64 = 1 << 20;

/// A limit as either version of cgroups has it.
async fn limit(container: &Container, v2: &str, v1: &str) -> Result<String> {
    let script = format!(
        "cat /proc/self/cgroup >&2; cd /sys/fs/cgroup; \
         if [ -e {v2} ]; then cat {v2}; else cat {v1} || (ls >&2; false); fi"
    );
    Ok(container.shell(&script).await?.success()?.text())
}

async fn memory_limit(container: &Container) -> Result<String> {
    limit(container, "memory.max", "memory/memory.limit_in_bytes").await
}

async fn cgroup_limits_are_those_of_the_container(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .resources(|resources| {
            resources.memory_limit_in_bytes = 48 * MIB;
            resources.cpu_period = 100_000;
            resources.cpu_quota = 50_000;
            resources.cpu_shares = 512;
        })
        .start()
        .await?;
    same!(memory_limit(&container).await?, (48 * MIB).to_string());
    let cpu = limit(
        &container,
        "cpu.max",
        "cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us",
    )
    .await?;
    same!(cpu.replace('\n', " "), "50000 100000");
    // 512 of 1024 shares are a weight of 59 in runc's newer curve.
    let weight = limit(&container, "cpu.weight", "cpu/cpu.shares").await?;
    ensure!(["59", "512"].contains(&&*weight), "{weight}");
    let other = t.container(&pod, "other").idle().start().await?;
    let other = memory_limit(&other).await?;
    ensure!(
        other == "max" || other.len() > 12,
        "a container without a limit has {other}"
    );
    Ok(())
}

async fn cgroup_unified_limits_reach_the_guest(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .resources(|resources| {
            resources.unified.insert("pids.max".into(), "12".into());
            resources
                .unified
                .insert("memory.high".into(), "33554432".into());
        })
        .start()
        .await?;
    let limits = container
        .shell("cd /sys/fs/cgroup; cat pids.max memory.high")
        .await?;
    same!(limits.text(), "12\n33554432");
    let bomb = container
        .shell("for i in $(seq 30); do sleep 5 & done; wait")
        .await?;
    ensure!(
        bomb.error_text().contains("fork"),
        "30 processes where 12 may be: {bomb:?}"
    );
    container.exec(["true"]).await?.success()?;
    Ok(())
}

async fn cgroup_limits_are_updated_in_place(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .resources(|resources| resources.memory_limit_in_bytes = 32 * MIB)
        .start()
        .await?;
    let request = UpdateContainerResourcesRequest {
        container_id: container.id().into(),
        linux: Some(LinuxContainerResources {
            memory_limit_in_bytes: 64 * MIB,
            cpu_period: 100_000,
            cpu_quota: 30_000,
            ..LinuxContainerResources::default()
        }),
        ..UpdateContainerResourcesRequest::default()
    };
    t.client()
        .runtime()
        .update_container_resources(request)
        .await?;
    same!(memory_limit(&container).await?, (64 * MIB).to_string());
    let cpu = limit(
        &container,
        "cpu.max",
        "cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us",
    )
    .await?;
    same!(cpu.replace('\n', " "), "30000 100000");
    Ok(())
}

async fn cgroup_out_of_memory_is_reported(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .command(["dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"])
        .resources(|resources| resources.memory_limit_in_bytes = 24 * MIB)
        .start()
        .await?;
    let status = container.exited(Duration::from_secs(60)).await?;
    same!(status.exit_code, 137);
    // Its event may come after that of the end.
    let by = Instant::now() + Duration::from_secs(10);
    while container.status().await?.reason != "OOMKilled" {
        ensure!(
            Instant::now() < by,
            "reason {:?}, expected OOMKilled",
            status.reason
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    ensure!(pod.is_ready().await?, "the pod ended with the container");
    Ok(())
}

async fn cgroup_out_of_memory_of_a_child_spares_the_container(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .resources(|resources| resources.memory_limit_in_bytes = 24 * MIB)
        .start()
        .await?;
    let output = container
        .shell("dd if=/dev/zero of=/dev/null bs=100M count=1; echo $?")
        .await?;
    // With memory.oom.group the whole exec, or the container, would end.
    same!(output.text(), "137");
    container.exec(["true"]).await?.success()?;
    Ok(())
}

async fn cgroup_memory_limit_of_the_pod_sizes_the_guest(t: &Context) -> Result<()> {
    let total = async |limit_mib: i64| -> Result<u64> {
        let pod = t
            .pod("pod")
            .linux(|linux| {
                let resources = linux.resources.get_or_insert_default();
                resources.memory_limit_in_bytes = limit_mib * MIB;
            })
            .run()
            .await?;
        let container = t.container(&pod, "main").idle().start().await?;
        let text = container
            .shell("awk '/MemTotal/ {print $2}' /proc/meminfo")
            .await?
            .text();
        pod.remove().await?;
        Ok(text.parse::<u64>().context(text)? / 1024)
    };
    let (small, large) = (total(128).await?, total(512).await?);
    ensure!(
        small >= 128 && (small + 300..small + 400).contains(&large),
        "pods with 128 and 512 MiB have guests with {small} and {large} MiB"
    );
    Ok(())
}
