// SPDX-License-Identifier: Apache-2.0
//! Figures of tasks and of whole pods.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use podhull_testkit::cri::Container;
use podhull_testkit::cri::api::{
    ContainerStatsFilter, ListContainerStatsRequest, ListPodSandboxStatsRequest, PodSandboxStats,
    PodSandboxStatsRequest, UInt64Value,
};
use serde_json::Value;

use crate::case::{cases, same};
use crate::context::Context;

cases! {
    ALL:
        stats_of_a_task_are_those_of_its_container,
        stats_of_containers_are_listed,
        stats_of_a_pod_answer;
}

/// A pod's cgroup, which the kubelet makes and removes. containerd reads a
/// pod's figures there, and has none without it.
const PARENT: &str = "/podhull-test-pod";

async fn stats_of_a_task_are_those_of_its_container(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    let ctr = t.containerd().await;
    let args = ["tasks", "metrics", "--format", "json", container.id()];
    let text = ctr.ctr(&args).await?;
    let json: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    // cgroup v2's figures, and v1's.
    let number = |paths: &[&str]| paths.iter().find_map(|path| json.pointer(path)?.as_u64());
    same!(number(&["/pids/current"]), Some(2), "processes in {text}");
    let memory = number(&["/memory/usage/usage", "/memory/usage"]);
    ensure!(
        memory.is_some_and(|bytes| (16 << 10..64 << 20).contains(&bytes)),
        "a shell's memory: {memory:?} in {text}"
    );
    let cpu = number(&["/cpu/usage_usec", "/cpu/usage/total"]);
    ensure!(
        cpu.is_some_and(|time| time > 0),
        "CPU time: {cpu:?} in {text}"
    );
    Ok(())
}

/// The names of the containers of which `filter` gives figures. Of one that has ended
/// some releases list the name alone.
async fn listed(t: &Context, filter: ContainerStatsFilter) -> Result<Vec<String>> {
    let request = ListContainerStatsRequest {
        filter: Some(filter),
    };
    let response = t.client().runtime().list_container_stats(request).await;
    let all = response.context("ListContainerStats")?.into_inner().stats;
    let mut names = Vec::new();
    for stats in all {
        let attributes = stats.attributes.as_ref().context("no attributes")?;
        let name = attributes.metadata.as_ref().map(|it| it.name.clone());
        let cpu = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds);
        let memory = stats.memory.and_then(|it| it.working_set_bytes);
        let some = |value: Option<UInt64Value>| value.is_some_and(|it| it.value > 0);
        same!(some(cpu), some(memory), "figures of {name:?}");
        if some(cpu) {
            names.push(name.context("no name")?);
        }
    }
    names.sort();
    Ok(names)
}

async fn stats_of_containers_are_listed(t: &Context) -> Result<()> {
    let (pod, main) = t.idle().await?;
    let second = t.container(&pod, "second").idle().edit(|config| {
        config.labels.insert("colour".into(), "blue".into());
    });
    second.start().await?.exec(["true"]).await?.success()?;
    let ended = t.container(&pod, "ended").command(["true"]).start().await?;
    ended.exited(Duration::from_secs(30)).await?;
    let (_other, _third) = t.idle().await?;
    let of_pod = ContainerStatsFilter {
        pod_sandbox_id: pod.id().into(),
        ..ContainerStatsFilter::default()
    };
    same!(listed(t, of_pod).await?, ["main", "second"]);
    let by_id = ContainerStatsFilter {
        id: main.id().into(),
        ..ContainerStatsFilter::default()
    };
    same!(listed(t, by_id).await?, ["main"]);
    let blue = ContainerStatsFilter {
        label_selector: [("colour".into(), "blue".into())].into(),
        ..ContainerStatsFilter::default()
    };
    same!(listed(t, blue).await?, ["second"]);
    let all = listed(t, ContainerStatsFilter::default()).await?;
    same!(all, ["main", "main", "second"]);
    Ok(())
}

/// One container's part in its pod's figures.
fn check(stats: &PodSandboxStats, pod: &str, container: &Container) -> Result<()> {
    same!(stats.attributes.as_ref().map(|of| &*of.id), Some(pod));
    let linux = stats.linux.as_ref().context("no figures")?;
    let processes = linux
        .process
        .as_ref()
        .and_then(|process| process.process_count);
    ensure!(processes.is_some_and(|count| count.value >= 1), "{linux:?}");
    let cpu = linux
        .cpu
        .as_ref()
        .and_then(|cpu| cpu.usage_core_nano_seconds);
    ensure!(cpu.is_some(), "no CPU time: {linux:?}");
    let network = linux.network.as_ref().context("no network")?;
    let eth0 = network.default_interface.as_ref().context("no interface")?;
    same!(eth0.name, "eth0");
    let parts = linux.containers.iter().map(|part| part.attributes.as_ref());
    let ids: Vec<_> = parts.map(|of| of.map(|of| &*of.id)).collect();
    same!(ids, [Some(container.id())]);
    Ok(())
}

/// The folders of [`PARENT`] in all hierarchies.
fn parents() -> Result<Vec<PathBuf>> {
    let name = PARENT.trim_start_matches('/');
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        return Ok(vec![root.join(name)]);
    }
    let hierarchies = fs::read_dir(root).context("read the hierarchies")?;
    hierarchies
        .map(|entry| Ok(entry?.path().join(name)))
        .collect()
}

async fn stats_of_a_pod_answer(t: &Context) -> Result<()> {
    let pod = t
        .pod("pod")
        .linux(|linux| linux.cgroup_parent = PARENT.into());
    let pod = pod.run().await?;
    let container = t.container(&pod, "main").idle().start().await?;
    let request = PodSandboxStatsRequest {
        pod_sandbox_id: pod.id().into(),
    };
    let response = t.client().runtime().pod_sandbox_stats(request).await?;
    let stats = response.into_inner().stats.context("no stats")?;
    check(&stats, pod.id(), &container)?;
    let request = ListPodSandboxStatsRequest { filter: None };
    let response = t.client().runtime().list_pod_sandbox_stats(request).await?;
    let all = response.into_inner().stats;
    let [stats] = &all[..] else {
        anyhow::bail!("one pod runs: {all:?}");
    };
    check(stats, pod.id(), &container)?;
    pod.stop().await?;
    pod.remove().await?;
    for folder in parents()? {
        match fs::remove_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result.with_context(|| format!("remove {}", folder.display()))?,
        }
    }
    Ok(())
}
