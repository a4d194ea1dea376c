// SPDX-License-Identifier: Apache-2.0
//! `io_type = "streaming"`: containerd opens a process's streams at the shim's
//! socket instead of making FIFOs.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use podhull_testkit::containerd::STREAMING;
use podhull_testkit::cri::{Container, Pod};
use tokio::io::AsyncWriteExt as _;

use super::restart::{meanwhile_it_ends, restart};
use super::stream_attach::following;
use crate::case::{cases, same};
use crate::client::{Options, STDIN, attach, done, exec_with};
use crate::context::Context;
use crate::stream::Session;

cases! {
    PODHULL_ONCE:
        streaming_log_is_whole_when_its_container_ends,
        streaming_exec_keeps_input_output_and_code,
        streaming_terminals_work,
        streaming_attach_reaches_the_process_again_and_again,
        streaming_input_once_ends_with_its_first_client,
        streaming_log_goes_on_across_a_killed_containerd,
        streaming_ends_of_meanwhile_are_told;
}

const WITHIN: Duration = Duration::from_secs(40);
/// Whose lines are more than 1 MiB.
const LINES: u32 = 175_000;

async fn pod(t: &Context) -> Result<Pod> {
    t.pod("pod").handler(STREAMING).run().await
}

async fn idle(t: &Context, pod: &Pod) -> Result<Container> {
    let container = t.container(pod, "main").idle().start().await?;
    container.wrote("up", WITHIN).await?;
    Ok(container)
}

async fn streaming_log_is_whole_when_its_container_ends(t: &Context) -> Result<()> {
    let pod = pod(t).await?;
    let container = t
        .container(&pod, "main")
        .shell(&format!("seq {LINES}; echo error >&2; exit 5"))
        .start()
        .await?;
    same!(container.exited(WITHIN).await?.exit_code, 5);
    let log = container.wrote(&LINES.to_string(), WITHIN).await?;
    let lines: String = (1..=LINES).map(|line| format!("{line}\n")).collect();
    ensure!(lines.len() > 1 << 20, "{} bytes", lines.len());
    ensure!(
        log.stdout == lines.as_bytes(),
        "{} bytes of {}",
        log.stdout.len(),
        lines.len()
    );
    same!(log.error_text(), "error");
    container.remove().await?;
    pod.stop().await?;
    pod.remove().await
}

async fn streaming_exec_keeps_input_output_and_code(t: &Context) -> Result<()> {
    let pod = pod(t).await?;
    let container = idle(t, &pod).await?;
    let input: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    same!(input.len(), 1 << 20);
    let command = ["sh", "-c", "cat; echo error >&2; exit 7"];
    let through = exec_with(t, &container, STDIN, &command, &input).await?;
    same!(through.code, 7);
    ensure!(
        through.stdout == input,
        "{} of {} bytes came back",
        through.stdout.len(),
        input.len()
    );
    ensure!(
        through.error_text().starts_with("error\n"),
        "{}",
        through.error_text()
    );
    // Without input, by CRI's own call, and one that cannot run.
    let sync = container.shell("echo out; echo err >&2; exit 3").await?;
    same!(
        (sync.code, sync.text(), sync.error_text()),
        (3, "out".into(), "err".into())
    );
    let refused = container.exec(["/nowhere"]).await;
    ensure!(refused.is_err(), "{refused:?}");
    same!(container.exec(["true"]).await?.code, 0);
    Ok(())
}

async fn streaming_terminals_work(t: &Context) -> Result<()> {
    let pod = pod(t).await?;
    let container = t.terminal(&pod).await?;
    let mut attached = Session::attach(&container, true).await?;
    attached.ask("echo here-$((40+1))\n", "here-41\r\n").await?;
    let mut session = Session::exec(&container, &["sh"], true).await?;
    session.resize(100, 30).await?;
    session
        .ask("stty size; echo so-$((40+2))\n", "so-42\r\n")
        .await?;
    session.ask("stty size\n", "30 100\r\n").await?;
    session.send("exit 6\n").await?;
    same!(session.exit_code().await?, 6);
    attached.send("exit 9\n").await?;
    same!(container.exited(WITHIN).await?.exit_code, 9);
    attached.drain().await
}

/// A container that answers each line.
async fn answering(t: &Context, pod: &Pod, once: bool) -> Result<Container> {
    t.container(pod, "main")
        .shell("while read line; do echo \"got $line\"; done; echo end; exit 6")
        .edit(|config| {
            config.stdin = true;
            config.stdin_once = once;
        })
        .start()
        .await
}

async fn streaming_attach_reaches_the_process_again_and_again(t: &Context) -> Result<()> {
    let pod = pod(t).await?;
    let container = answering(t, &pod, false).await?;
    for line in ["one", "two"] {
        let mut session = Session::attach(&container, false).await?;
        let answer = format!("got {line}\n");
        session.ask(&format!("{line}\n"), &answer).await?;
        session.close().await?;
    }
    // What containerd has not written when it is killed is lost with it.
    container.wrote("got two", WITHIN).await?;
    // Its input does not end with its clients, nor with containerd.
    restart(t, Signal::SIGKILL).await?;
    let mut session = Session::attach(&container, false).await?;
    session.ask("three\n", "got three\n").await?;
    let log = container.wrote("got three", WITHIN).await?.text();
    let mut lines: Vec<_> = log.lines().collect();
    // What was asked twice was answered twice.
    lines.dedup();
    same!(lines, ["got one", "got two", "got three"]);
    Ok(())
}

async fn streaming_input_once_ends_with_its_first_client(t: &Context) -> Result<()> {
    let pod = pod(t).await?;
    let container = answering(t, &pod, true).await?;
    let mut child = attach(t, &container, STDIN).await?.spawn()?;
    let mut input = child.stdin.take().context("stdin")?;
    let lines: String = (1..=1000).map(|line| format!("line {line}\n")).collect();
    input.write_all(lines.as_bytes()).await?;
    drop(input);
    same!(container.exited(WITHIN).await?.exit_code, 6);
    let ended = done(child).await?;
    ensure!(ended.text().ends_with("end\n"), "{ended:?}");
    let log = container.wrote("end", WITHIN).await?.text();
    same!(log.lines().count(), 1001, "lines");
    Ok(())
}

async fn streaming_log_goes_on_across_a_killed_containerd(t: &Context) -> Result<()> {
    let pod = pod(t).await?;
    let container = t
        .container(&pod, "main")
        .shell("trap 'exit 0' TERM; n=0; while :; do n=$((n+1)); echo line $n; sleep 0.05; done")
        .start()
        .await?;
    container.wrote("line 3", WITHIN).await?;
    for _ in 0..2 {
        restart(t, Signal::SIGKILL).await?;
        ensure!(pod.is_ready().await?, "the pod is no longer Ready");
        let seen = container.log()?.text().lines().count();
        let next = format!("line {}\n", seen + 20);
        container.wrote(&next, WITHIN).await?;
    }
    let numbers = following(&String::from_utf8_lossy(&container.log()?.stdout))?;
    same!(numbers.first(), Some(&1));
    // What is new has streams, too.
    let plain = exec_with(t, &container, Options::default(), &["echo", "new"], b"").await?;
    same!((plain.code, &*plain.text()), (0, "new\n"));
    container.stop(10).await?;
    same!(container.status().await?.exit_code, 0);
    pod.stop().await?;
    pod.remove().await
}

async fn streaming_ends_of_meanwhile_are_told(t: &Context) -> Result<()> {
    let folder = t.new_folder("data")?;
    let pod = pod(t).await?;
    let container = t
        .container(&pod, "main")
        .shell("echo waiting; until [ -e /data/go ]; do sleep 0.1; done; n=0; while [ $n -lt 1000 ]; do n=$((n+1)); echo line $n; done; echo >/data/gone; exit 6")
        .mount(&folder, "/data", false)
        .start()
        .await?;
    container.wrote("waiting", WITHIN).await?;
    meanwhile_it_ends(t, &folder).await?;
    same!(container.exited(WITHIN).await?.exit_code, 6);
    let log = container.wrote("line 1000", WITHIN).await?;
    let output = String::from_utf8_lossy(&log.stdout).replace("waiting\n", "");
    same!(following(&output)?.len(), 1000, "lines");
    container.remove().await?;
    pod.stop().await?;
    pod.remove().await
}
