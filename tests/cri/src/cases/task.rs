// SPDX-License-Identifier: Apache-2.0
//! What containerd's own client can ask of a task, and CRI cannot.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use podhull_testkit::cri::Container;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};

use crate::case::{cases, contains, same};
use crate::context::{Context, refusal};

cases! {
    ALL:
        task_pause_freezes_until_resume,
        task_paused_is_stopped_all_the_same,
        task_processes_are_listed,
        task_kill_of_an_exec_ends_just_that;
}

/// How long a frozen container must be silent to be believed.
const SILENCE: Duration = Duration::from_secs(1);
const WITHIN: Duration = Duration::from_secs(20);

/// A container's PID and state as `ctr tasks list` shows them.
async fn listed(t: &Context, container: &Container) -> Result<(u32, String)> {
    let list = t.containerd().await.ctr(&["tasks", "list"]).await?;
    let line = list.lines().find(|line| line.starts_with(container.id()));
    let line = line.with_context(|| format!("no {} in {list}", container.id()))?;
    let mut fields = line.split_whitespace().skip(1);
    let pid = fields.next().context("no PID")?.parse()?;
    Ok((pid, fields.next().context("no state")?.to_owned()))
}

async fn task_pause_freezes_until_resume(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .shell("n=0; while :; do n=$((n+1)); echo line $n; sleep 0.05; done")
        .start()
        .await?;
    let other = t.container(&pod, "other").idle().start().await?;
    container.wrote("line 2", WITHIN).await?;
    let ctr = t.containerd().await;
    ctr.ctr(&["tasks", "pause", container.id()]).await?;
    same!(listed(t, &container).await?.1, "PAUSED");
    let text = refusal(
        container.exec(["true"]).await,
        "an exec in a paused container",
    )?;
    contains!(text.to_lowercase(), "paused");
    // What was written before is on its way; then nothing comes.
    tokio::time::sleep(SILENCE).await;
    let before = container.log()?.text();
    tokio::time::sleep(SILENCE).await;
    same!(container.log()?.text(), before, "written while paused");
    other.exec(["true"]).await?.success()?;
    ctr.ctr(&["tasks", "resume", container.id()]).await?;
    same!(listed(t, &container).await?.1, "RUNNING");
    let next = before.lines().count() + 5;
    container.wrote(&format!("line {next}"), WITHIN).await?;
    container.exec(["true"]).await?.success()?;
    refusal(
        ctr.ctr(&["tasks", "resume", container.id()]).await,
        "a second resume",
    )?;
    Ok(())
}

async fn task_paused_is_stopped_all_the_same(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    let ctr = t.containerd().await;
    ctr.ctr(&["tasks", "pause", container.id()]).await?;
    container.stop(1).await?;
    same!(container.exited(WITHIN).await?.exit_code, 137);
    container.remove().await
}

async fn task_processes_are_listed(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let ctr = t.containerd().await;
    let (pid, state) = listed(t, &container).await?;
    same!(state, "RUNNING");
    let list = ctr.ctr(&["tasks", "ps", container.id()]).await?;
    let pids = list.lines().skip(1).map(|line| {
        let pid = line.split_whitespace().next().unwrap_or_default();
        pid.parse::<u32>().with_context(|| list.clone())
    });
    let pids = pids.collect::<Result<Vec<_>>>()?;
    ensure!(pids.contains(&pid), "the task's {pid} is not in: {list}");
    if t.is_podhull() {
        // Nobody may mistake one for a process of the node's.
        let largest: u32 = std::fs::read_to_string("/proc/sys/kernel/pid_max")?
            .trim()
            .parse()?;
        ensure!(pids.iter().all(|pid| *pid > largest), "{list}");
    } else {
        same!(pids.len(), 2, "the shell and its sleep: {list}");
    }
    same!(pod.is_ready().await?, true);
    Ok(())
}

async fn task_kill_of_an_exec_ends_just_that(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let containerd = t.containerd().await;
    let fifos = t.new_folder("fifos")?;
    // What catches a signal tells of it: it is the one that was sent.
    let script = "trap 'echo caught; exit 9' TERM; echo up; while :; do sleep 0.1; done";
    let mut execs = Vec::new();
    for name in ["killed", "other"] {
        let args = ["tasks", "exec", "--exec-id", name, "--fifo-dir", &fifos];
        let args = [&args[..], &[container.id(), "sh", "-c", script]].concat();
        let mut ctr = containerd
            .ctr_command(&args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut stdout = BufReader::new(ctr.stdout.take().context("stdout")?);
        let mut line = String::new();
        let read = tokio::time::timeout(WITHIN, stdout.read_line(&mut line));
        read.await.with_context(|| format!("{name} is silent"))??;
        same!(line, "up\n");
        execs.push((ctr, stdout));
    }
    for (name, signal, said, code) in [
        ("killed", "SIGTERM", "caught\n", 9),
        ("other", "SIGKILL", "", 137),
    ] {
        let (mut ctr, mut stdout) = execs.remove(0);
        let kill = ["tasks", "kill", "--exec-id", name, "--signal", signal];
        containerd
            .ctr(&[&kill[..], &[container.id()]].concat())
            .await?;
        let mut rest = String::new();
        let ended = async {
            stdout.read_to_string(&mut rest).await?;
            ctr.wait().await
        };
        let ended = tokio::time::timeout(WITHIN, ended).await;
        let status = ended.with_context(|| format!("{name} goes on"))??;
        same!((&*rest, status.code()), (said, Some(code)), "{name}");
        // Neither the container nor the other exec, as long as it is there.
        for (ctr, _) in &mut execs {
            same!(ctr.try_wait()?, None, "the other exec");
        }
        same!(listed(t, &container).await?.1, "RUNNING");
    }
    let unknown = ["tasks", "kill", "--exec-id", "nobody", container.id()];
    refusal(containerd.ctr(&unknown).await, "a kill of an unknown exec")?;
    container.exec(["true"]).await?.success()?;
    ensure!(pod.is_ready().await?, "the pod ended");
    Ok(())
}
