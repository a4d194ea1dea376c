// SPDX-License-Identifier: Apache-2.0
//! Exec and attach with standard input and terminals.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::io::AsyncWriteExt as _;

use crate::case::{cases, same};
use crate::context::Context;
use crate::stream::Session;

cases! {
    ALL:
        exec_standard_input_arrives_whole_and_ends,
        exec_terminal_has_the_clients_size,
        attach_reaches_a_running_container;
    ALL_TWICE:
        exec_streams_and_exit_code_reach_the_client,
        exec_client_that_leaves_ends_the_input,
        attach_to_a_container_that_reads_once_ends_it,
        attach_to_a_terminal_works;
}

async fn exec_standard_input_arrives_whole_and_ends(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    let bytes: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_be_bytes).collect();
    let containerd = t.containerd().await;
    let fifos = t.new_folder("fifos")?;
    let args = [
        "tasks",
        "exec",
        "--exec-id",
        "input",
        "--fifo-dir",
        &fifos,
        container.id(),
        "cat",
    ];
    let mut ctr = containerd
        .ctr_command(&args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = ctr.stdin.take().context("stdin")?;
    let sent = bytes.clone();
    let writer = tokio::spawn(async move {
        stdin.write_all(&sent).await?;
        stdin.shutdown().await
    });
    let output = ctr.wait_with_output().await?;
    writer.await?.context("write to ctr")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {stderr}", output.status);
    same!(output.stdout.len(), bytes.len(), "bytes that came back");
    ensure!(output.stdout == bytes, "the bytes differ");
    Ok(())
}

async fn exec_terminal_has_the_clients_size(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    let mut session = Session::exec(&container, &["sh"], true).await?;
    session.resize(132, 43).await?;
    let script = "test -t 0 && test -t 1 && echo is-a-$((1+1))-terminal; \
        until [ \"$(stty size)\" = '43 132' ]; do sleep 0.1; done; echo first-$((1+1))\n";
    session.send(script).await?;
    session.wrote("is-a-2-terminal").await?;
    session.wrote("first-2").await?;
    session.resize(80, 24).await?;
    session
        .send("until [ \"$(stty size)\" = '24 80' ]; do sleep 0.1; done; exit 7\n")
        .await?;
    same!(session.exit_code().await?, 7);
    Ok(())
}

async fn exec_streams_and_exit_code_reach_the_client(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    let script = "read line; echo \"got $line\"; echo oops >&2; exit 3";
    let mut session = Session::exec(&container, &["sh", "-c", script], false).await?;
    session.send("a line\n").await?;
    same!(session.exit_code().await?, 3);
    same!(String::from_utf8_lossy(&session.stdout), "got a line\n");
    same!(String::from_utf8_lossy(&session.stderr), "oops\n");
    let mut session = Session::exec(&container, &["true"], false).await?;
    same!(session.exit_code().await?, 0);
    Ok(())
}

async fn exec_client_that_leaves_ends_the_input(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    let script = "cat >/tmp/input; echo ended >/tmp/ended";
    let mut session = Session::exec(&container, &["sh", "-c", script], false).await?;
    session.send("some\n").await?;
    let by = Instant::now() + Duration::from_secs(20);
    while container.shell("cat /tmp/input").await?.text() != "some" {
        ensure!(Instant::now() < by, "the input did not arrive");
    }
    session.close().await?;
    while container.shell("cat /tmp/ended").await?.text() != "ended" {
        ensure!(Instant::now() < by, "the process still waits for input");
    }
    Ok(())
}

async fn attach_reaches_a_running_container(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .shell("while read line; do echo \"got $line\"; echo \"err $line\" >&2; done")
        .edit(|config| config.stdin = true)
        .start()
        .await?;
    for word in ["one", "two"] {
        let mut session = Session::attach(&container, false).await?;
        session.send(&format!("{word}\n")).await?;
        session.wrote(&format!("got {word}\n")).await?;
        // Leaving does not end a container that goes on reading.
    }
    let log = container.wrote("got two", Duration::from_secs(20)).await?;
    same!(log.text(), "got one\ngot two");
    ensure!(pod.is_ready().await?, "the pod ended");
    container.exec(["true"]).await?.success()?;
    Ok(())
}

async fn attach_to_a_container_that_reads_once_ends_it(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .shell("cat; echo end of input; exit 5")
        .edit(|config| {
            config.stdin = true;
            config.stdin_once = true;
        })
        .start()
        .await?;
    let mut session = Session::attach(&container, false).await?;
    session.send("hello\n").await?;
    session.wrote("hello\n").await?;
    session.close().await?;
    same!(
        container.exited(Duration::from_secs(20)).await?.exit_code,
        5
    );
    let log = container
        .wrote("end of input", Duration::from_secs(20))
        .await?;
    same!(log.text(), "hello\nend of input");
    Ok(())
}

async fn attach_to_a_terminal_works(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t.terminal(&pod).await?;
    let mut session = Session::attach(&container, true).await?;
    session.resize(100, 30).await?;
    session
        .send("until [ \"$(stty size)\" = '30 100' ]; do sleep 0.1; done; echo so-$((40+2))\n")
        .await?;
    session.wrote("so-42\r\n").await?;
    session.send("exit 9\n").await?;
    same!(
        container.exited(Duration::from_secs(20)).await?.exit_code,
        9
    );
    Ok(())
}
