// SPDX-License-Identifier: Apache-2.0
//! What containerd is told without asking.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use podhull_testkit::cri::api::{ContainerEventType, GetEventsRequest, NamespaceMode};
use podhull_testkit::image::BUSYBOX;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout};

use crate::case::{cases, same};
use crate::context::Context;

cases! {
    ALL:
        event_order_of_a_task_is_kept;
    ALL_24:
        event_stream_of_the_kubelet_tells_of_pods_and_containers;
    ALL_TWICE:
        event_exit_comes_while_a_child_keeps_the_output;
}

const WITHIN: Duration = Duration::from_secs(30);

/// `ctr events`, running.
struct Events {
    ctr: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Events {
    /// Returns once events arrive.
    async fn subscribe(t: &Context) -> Result<Self> {
        let containerd = t.containerd().await;
        let mut ctr = containerd
            .ctr_command(&["events"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let stdout = ctr.stdout.take().context("stdout")?;
        let mut events = Self {
            ctr,
            lines: BufReader::new(stdout).lines(),
        };
        // A subscription says nothing: make events until one comes.
        for number in 0..100 {
            let label = format!("podhull.test/event={number}");
            containerd
                .ctr(&["images", "label", BUSYBOX, &label])
                .await?;
            let line = tokio::time::timeout(Duration::from_millis(200), events.next()).await;
            if line.is_ok() {
                return Ok(events);
            }
        }
        anyhow::bail!("no event came")
    }

    /// The topic and the content of the next one.
    async fn next(&mut self) -> Result<(String, Value)> {
        let line = self.lines.next_line().await?.context("ctr ended")?;
        // 2026-01-02 03:04:05.6 +0000 UTC k8s.io /tasks/exit {...}
        let (head, json) = line.split_at(line.find('{').unwrap_or(line.len()));
        let topic = head
            .split_whitespace()
            .last()
            .unwrap_or_default()
            .to_owned();
        Ok((topic, serde_json::from_str(json).unwrap_or(Value::Null)))
    }

    /// Waits for the exit of an added process and gives its code.
    async fn exec_exit(&mut self, container: &str) -> Result<u64> {
        let wait = async {
            loop {
                let (topic, event) = self.next().await?;
                let of = (event["container_id"].as_str(), event["id"].as_str());
                if topic == "/tasks/exit" && of.0 == Some(container) && of.1 != of.0 {
                    return Ok(event["exit_status"].as_u64().unwrap_or(0));
                }
            }
        };
        let result = tokio::time::timeout(WITHIN, wait).await;
        result.context("no exit of an added process came")?
    }

    /// Ends `ctr`, and what its subscription left.
    async fn end(mut self, t: &Context) -> Result<()> {
        let containerd = t.containerd().await;
        let none = ["images", "label", BUSYBOX, "podhull.test/event="];
        containerd.ctr(&none).await?;
        self.ctr.kill().await?;
        Ok(())
    }

    /// The topics about one process of a container, up to `last`.
    async fn of(&mut self, container: &str, last: &str) -> Result<Vec<String>> {
        let mut topics = Vec::new();
        let collect = async {
            loop {
                let (topic, event) = self.next().await?;
                if event["container_id"] != container {
                    continue;
                }
                let exec = event["exec_id"].as_str().or(event["id"].as_str());
                let exec = exec.filter(|id| *id != container && !id.is_empty());
                let code = event["exit_status"].as_u64().unwrap_or(0);
                let kind = if exec.is_some() { "exec " } else { "" };
                let topic = topic.trim_start_matches("/tasks/").to_owned();
                topics.push(match &*topic {
                    "exit" => format!("{kind}exit {code}"),
                    _ => format!("{kind}{topic}"),
                });
                if topic == last && exec.is_none() {
                    return anyhow::Ok(());
                }
            }
        };
        let result = tokio::time::timeout(WITHIN, collect).await;
        match result {
            Ok(result) => result?,
            Err(_) => anyhow::bail!("no {last} event came, only {topics:?}"),
        }
        Ok(topics)
    }
}

async fn event_order_of_a_task_is_kept(t: &Context) -> Result<()> {
    let mut events = Events::subscribe(t).await?;
    let (pod, container) = t.idle().await?;
    container.shell("exit 4").await?;
    container.stop(10).await?;
    let mut topics = events.of(container.id(), "delete").await?;
    // An exec's own events may come between the container's, but in order.
    let execs: Vec<_> = topics
        .extract_if(.., |topic| topic.starts_with("exec "))
        .collect();
    same!(topics, ["create", "start", "exit 0", "delete"]);
    same!(
        execs,
        ["exec exec-added", "exec exec-started", "exec exit 4"]
    );
    // A container that ends by itself, and one that is killed.
    let quick = t.container(&pod, "quick").command(["true"]).start().await?;
    same!(
        events.of(quick.id(), "delete").await?,
        ["create", "start", "exit 0", "delete"]
    );
    let killed = t
        .container(&pod, "killed")
        .command(["sleep", "1000"])
        .start()
        .await?;
    killed.stop(0).await?;
    same!(
        events.of(killed.id(), "delete").await?,
        ["create", "start", "exit 137", "delete"]
    );
    ensure!(pod.is_ready().await?, "the pod ended");
    events.end(t).await
}

async fn event_exit_comes_while_a_child_keeps_the_output(t: &Context) -> Result<()> {
    let mut events = Events::subscribe(t).await?;
    let (pod, container) = t.idle().await?;
    let child = "(until [ -e /dev/shm/go ]; do sleep 0.1; done; echo late) & echo done";
    let script = format!("{child}; exit 3");
    let exec = container.shell(&script);
    let watch = async {
        let code = events.exec_exit(container.id()).await?;
        // Its output goes on, and with it the client's call.
        container.exec(["touch", "/dev/shm/go"]).await?.success()?;
        anyhow::Ok(code)
    };
    let (output, code) = tokio::try_join!(exec, watch)?;
    same!(code, 3);
    same!((output.code, &*output.text()), (3, "done\nlate"));
    // The end of a container's init process is that of all its processes, also
    // where their PID namespace goes on.
    let shared = t
        .container(&pod, "shared")
        .shell("sleep 4321 & echo done; exit 4")
        .security(|security| {
            let options = security.namespace_options.get_or_insert_default();
            options.set_pid(NamespaceMode::Pod);
        });
    let shared = shared.start().await?;
    same!(shared.exited(WITHIN).await?.exit_code, 4);
    shared.wrote("done", WITHIN).await?;
    shared.remove().await?;
    events.end(t).await
}

/// What a kubelet with `EventedPLEG` listens to.
async fn event_stream_of_the_kubelet_tells_of_pods_and_containers(t: &Context) -> Result<()> {
    let mut runtime = t.client().runtime();
    let subscribed = runtime.get_container_events(GetEventsRequest {}).await;
    let mut stream = subscribed.context("GetContainerEvents")?.into_inner();
    let (pod, container) = t.idle().await?;
    container.stop(10).await?;
    container.remove().await?;
    pod.stop().await?;
    let mut of_container = Vec::new();
    let mut of_pod = Vec::new();
    let collect = async {
        while of_pod.last() != Some(&"stopped") {
            let event = stream.message().await?.context("the stream ended")?;
            let kind = match event.container_event_type() {
                ContainerEventType::ContainerCreatedEvent => "created",
                ContainerEventType::ContainerStartedEvent => "started",
                ContainerEventType::ContainerStoppedEvent => "stopped",
                ContainerEventType::ContainerDeletedEvent => "deleted",
            };
            // Those of the pods before may be on their way.
            if event.container_id == container.id() {
                of_container.push(kind);
            } else if event.container_id == pod.id() {
                of_pod.push(kind);
            } else {
                continue;
            }
            let status = event.pod_sandbox_status.as_ref();
            same!(status.map(|pod| &*pod.id), Some(pod.id()), "{kind}");
        }
        anyhow::Ok(())
    };
    let collected = tokio::time::timeout(WITHIN, collect).await;
    collected.with_context(|| format!("only {of_container:?} and {of_pod:?} came"))??;
    same!(of_container, ["created", "started", "stopped", "deleted"]);
    same!(of_pod, ["created", "started", "stopped"]);
    Ok(())
}
