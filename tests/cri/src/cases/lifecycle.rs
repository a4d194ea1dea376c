// SPDX-License-Identifier: Apache-2.0
//! Pods and containers come and go.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use podhull_testkit::cri::api::{
    ContainerState, ContainerStatsRequest, ListContainersRequest, PodSandboxState,
    ReopenContainerLogRequest,
};
use podhull_testkit::cri::{Container, Log};

use crate::case::{cases, contains, same};
use crate::compare::see;
use crate::context::{Context, refusal};

cases! {
    ALL:
        lifecycle_stop_and_remove_end_a_pod,
        lifecycle_stop_and_remove_repeated_succeed,
        lifecycle_removing_a_running_pod_ends_it,
        lifecycle_removals_in_any_order_succeed,
        lifecycle_pod_without_containers_lives_and_goes,
        lifecycle_containers_of_a_pod_share_network_and_kernel,
        lifecycle_container_restarts_with_the_next_attempt,
        lifecycle_exit_codes_and_reasons_are_reported,
        lifecycle_stop_signal_is_delivered_and_grace_ends,
        lifecycle_created_container_is_removed_unstarted,
        lifecycle_stats_of_a_container_answer,
        lifecycle_pods_and_containers_are_listed;
    ALL_TWICE:
        lifecycle_log_is_reopened;
    TWICE_BUT_RUNC_16:
        lifecycle_log_is_complete_and_ordered;
}

/// A boot of a kernel is named by this.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The kernel that runs a container.
pub(crate) async fn boot_id(container: &Container) -> Result<String> {
    Ok(container.exec(["cat", BOOT_ID]).await?.success()?.text())
}

async fn lifecycle_stop_and_remove_end_a_pod(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    ensure!(pod.is_ready().await?, "the new pod is not Ready");
    same!(
        container.status().await?.state(),
        ContainerState::ContainerRunning
    );
    container.stop(10).await?;
    same!(container.status().await?.exit_code, 0);
    pod.stop().await?;
    same!(
        pod.status().await?.state(),
        PodSandboxState::SandboxNotready
    );
    container.remove().await?;
    pod.remove().await?;
    let gone = refusal(pod.status().await, "PodSandboxStatus")?;
    contains!(&gone, "not found");
    Ok(())
}

async fn lifecycle_stop_and_remove_repeated_succeed(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    for _ in 0..2 {
        container.stop(5).await?;
    }
    for _ in 0..2 {
        container.remove().await?;
    }
    for _ in 0..2 {
        pod.stop().await?;
    }
    for _ in 0..2 {
        pod.remove().await?;
    }
    Ok(())
}

async fn lifecycle_removals_in_any_order_succeed(t: &Context) -> Result<()> {
    // The pod's end first, then that of its containers.
    let (pod, running) = t.idle().await?;
    let created = t.container(&pod, "created").idle().create().await?;
    let ended = t.container(&pod, "ended").command(["true"]).start().await?;
    ended.exited(Duration::from_secs(30)).await?;
    pod.stop().await?;
    for container in [&created, &ended, &running] {
        container.stop(5).await?;
        container.remove().await?;
    }
    pod.remove().await?;
    // Everything is gone with the pod, and asked for once more. Whether what is gone can
    // be stopped, each release has its own answer to.
    let (pod, container) = t.idle().await?;
    pod.remove().await?;
    for (what, stopped) in [
        ("container", container.stop(5).await),
        ("pod", pod.stop().await),
    ] {
        see(
            &format!("a stop of a {what} that is gone"),
            &stopped.is_ok().to_string(),
        );
    }
    container.remove().await?;
    pod.remove().await
}

async fn lifecycle_removing_a_running_pod_ends_it(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    pod.remove().await?;
    refusal(container.status().await, "ContainerStatus of a removed pod")?;
    Ok(())
}

async fn lifecycle_pod_without_containers_lives_and_goes(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    ensure!(pod.is_ready().await?, "not Ready");
    pod.stop().await?;
    ensure!(!pod.is_ready().await?, "still Ready");
    pod.remove().await
}

async fn lifecycle_containers_of_a_pod_share_network_and_kernel(t: &Context) -> Result<()> {
    let (pod, one) = t.idle().await?;
    let two = t.container(&pod, "two").idle().start().await?;
    same!(boot_id(&one).await?, boot_id(&two).await?, "the kernels");
    let host = std::fs::read_to_string(BOOT_ID)?;
    same!(
        boot_id(&one).await? == host.trim(),
        !t.is_podhull(),
        "the container runs on the host's kernel"
    );
    for kind in ["net", "ipc", "uts"] {
        let link = format!("/proc/self/ns/{kind}");
        let of_one = one.exec(["readlink", &link]).await?.text();
        let of_two = two.exec(["readlink", &link]).await?.text();
        same!(of_one, of_two, "the {kind} namespaces");
    }
    for kind in ["mnt", "pid"] {
        let link = format!("/proc/self/ns/{kind}");
        let of_one = one.exec(["readlink", &link]).await?.text();
        let of_two = two.exec(["readlink", &link]).await?.text();
        ensure!(
            of_one != of_two,
            "the containers share the {kind} namespace"
        );
    }
    // One of them alone goes, the other stays.
    one.stop(0).await?;
    one.remove().await?;
    two.exec(["true"]).await?.success()?;
    Ok(())
}

async fn lifecycle_container_restarts_with_the_next_attempt(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let first = t
        .container(&pod, "main")
        .shell("echo first; exit 1")
        .start()
        .await?;
    let status = first.exited(Duration::from_secs(30)).await?;
    same!(status.exit_code, 1);
    let second = t
        .container(&pod, "main")
        .attempt(1)
        .shell("echo second")
        .start()
        .await?;
    same!(second.exited(Duration::from_secs(30)).await?.exit_code, 0);
    same!(first.log()?.text(), "first");
    same!(second.log()?.text(), "second");
    first.remove().await?;
    second.remove().await
}

async fn lifecycle_exit_codes_and_reasons_are_reported(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    for (attempt, (script, code, reason)) in [
        ("exit 0", 0, "Completed"),
        ("exit 3", 3, "Error"),
        ("exit 255", 255, "Error"),
        // PID 1 ignores signals that it does not handle: a child is killed.
        ("sh -c 'kill -9 $$'; exit $?", 137, "Error"),
    ]
    .into_iter()
    .enumerate()
    {
        let builder = t.container(&pod, "main").attempt(u32::try_from(attempt)?);
        let (_, status) = builder.shell(script).run().await?;
        same!(status.exit_code, code, "exit code of {script:?}");
        same!(status.reason, reason, "reason of {script:?}");
        // containerd notes the start only after the shim has answered: what ends at
        // once may have an end before its start.
        ensure!(
            0 < status.created_at && status.created_at <= status.started_at.min(status.finished_at),
            "times are out of order: {status:?}"
        );
    }
    Ok(())
}

async fn lifecycle_stop_signal_is_delivered_and_grace_ends(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let handles = t
        .container(&pod, "handles")
        .shell("trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 100 & wait $!; done")
        .start()
        .await?;
    let ignores = t
        .container(&pod, "ignores")
        .shell("trap '' TERM; echo up; while :; do sleep 0.2; done")
        .start()
        .await?;
    for container in [&handles, &ignores] {
        container.wrote("up", Duration::from_secs(20)).await?;
    }
    handles.stop(20).await?;
    same!(handles.status().await?.exit_code, 7);
    same!(handles.log()?.text(), "up\nbye");
    ignores.stop(1).await?;
    same!(ignores.status().await?.exit_code, 137);
    Ok(())
}

async fn lifecycle_created_container_is_removed_unstarted(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t.container(&pod, "main").idle().create().await?;
    same!(
        container.status().await?.state(),
        ContainerState::ContainerCreated
    );
    container.remove().await?;
    refusal(
        container.start().await,
        "StartContainer after RemoveContainer",
    )?;
    Ok(())
}

async fn lifecycle_stats_of_a_container_answer(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    let request = ContainerStatsRequest {
        container_id: container.id().into(),
    };
    let response = t.client().runtime().container_stats(request).await?;
    let stats = response.into_inner().stats.context("no stats")?;
    let cpu = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds);
    ensure!(cpu.is_some_and(|cpu| cpu.value > 0), "no CPU time: {cpu:?}");
    let memory = stats.memory.and_then(|memory| memory.working_set_bytes);
    let memory = memory.context("no working set")?.value;
    ensure!(
        (16 << 10..64 << 20).contains(&memory),
        "a shell's working set is {memory} bytes"
    );
    Ok(())
}

async fn lifecycle_pods_and_containers_are_listed(t: &Context) -> Result<()> {
    let pod = t.pod("listed").label("colour", "red").run().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .edit(|config| {
            config.labels.insert("colour".into(), "blue".into());
            config.annotations.insert("note".into(), "x".into());
        })
        .start()
        .await?;
    same!(
        t.client().pod_ids(Some(("colour", "red"))).await?,
        [pod.id()]
    );
    same!(
        t.client().pod_ids(Some(("colour", "green"))).await?.len(),
        0
    );
    let response = t
        .client()
        .runtime()
        .list_containers(ListContainersRequest { filter: None })
        .await?;
    let containers = response.into_inner().containers;
    let [listed] = &containers[..] else {
        anyhow::bail!("one container runs: {containers:?}");
    };
    same!(listed.id, container.id());
    same!(listed.pod_sandbox_id, pod.id());
    same!(listed.state(), ContainerState::ContainerRunning);
    same!(
        listed.labels.get("colour").map(String::as_str),
        Some("blue")
    );
    same!(
        listed.annotations.get("note").map(String::as_str),
        Some("x")
    );
    same!(pod.status().await?.runtime_handler, t.setup().handler);
    Ok(())
}

async fn lifecycle_log_is_complete_and_ordered(t: &Context) -> Result<()> {
    const LINES: u32 = 20_000;
    let pod = t.ready_pod().await?;
    // One line is longer than what containerd puts into one record.
    let long = "head -c 100000 /dev/zero | tr '\\0' x; echo";
    let script = format!("seq 500 >&2; {long}; seq {LINES}; echo end");
    let container = t.container(&pod, "main").shell(&script).start().await?;
    container.exited(Duration::from_secs(60)).await?;
    // containerd writes the log beside telling that the container has ended.
    let by = Instant::now() + Duration::from_secs(10);
    let mut log = container.log()?;
    while !log.stdout.ends_with(b"end\n") && Instant::now() < by {
        tokio::time::sleep(Duration::from_millis(50)).await;
        log = container.log()?;
    }
    let lines =
        |count: u32| (1..=count).fold(String::new(), |text, n| text + &n.to_string() + "\n");
    ensure!(
        log.stdout == ("x".repeat(100_000) + "\n" + &lines(LINES) + "end\n").as_bytes(),
        "standard output differs: {} bytes, the last are {:?}",
        log.stdout.len(),
        String::from_utf8_lossy(&log.stdout[log.stdout.len().saturating_sub(40)..])
    );
    ensure!(
        log.stderr == lines(500).as_bytes(),
        "standard error differs"
    );
    Ok(())
}

async fn lifecycle_log_is_reopened(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .shell("n=0; while :; do n=$((n+1)); echo line $n; sleep 0.1; done")
        .start()
        .await?;
    container.wrote("line 2", Duration::from_secs(20)).await?;
    let log = pod.log_directory().join("main/0.log");
    std::fs::rename(&log, log.with_extension("1")).context("rotate the log")?;
    let request = ReopenContainerLogRequest {
        container_id: container.id().into(),
    };
    t.client().runtime().reopen_container_log(request).await?;
    container.wrote("line", Duration::from_secs(20)).await?;
    let old = Log::parse(&std::fs::read(log.with_extension("1"))?)?.text();
    let new = container.log()?.text();
    let last: u32 = number(old.lines().last())?;
    same!(
        number(new.lines().next())?,
        last + 1,
        "the line after the rotation"
    );
    Ok(())
}

fn number(line: Option<&str>) -> Result<u32> {
    let line = line.context("no line")?;
    line.rsplit(' ')
        .next()
        .unwrap_or_default()
        .parse()
        .with_context(|| line.to_owned())
}
