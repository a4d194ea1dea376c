// SPDX-License-Identifier: Apache-2.0
//! Clients that read slowly, or not at all.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use podhull_testkit::cri::Container;
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, ChildStdout};

use crate::case::{cases, same};
use crate::context::Context;
use crate::stream::Session;

cases! {
    ALL_TWICE:
        exec_slow_reader_gets_everything,
        exec_stalled_reader_stalls_nobody_else,
        attach_stalled_reader_stalls_nobody_else;
}

const WITHIN: Duration = Duration::from_secs(20);

/// An exec whose output only the case reads.
struct Exec {
    ctr: Child,
    stdout: ChildStdout,
}

impl Exec {
    async fn start(t: &Context, container: &Container, id: &str, script: &str) -> Result<Self> {
        let fifos = t.new_folder("fifos")?;
        let args = ["tasks", "exec", "--exec-id", id, "--fifo-dir", &fifos];
        let args = [&args[..], &[container.id(), "sh", "-c", script]].concat();
        let mut ctr = t
            .containerd()
            .await
            .ctr_command(&args)
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = ctr.stdout.take().context("stdout")?;
        Ok(Self { ctr, stdout })
    }

    async fn byte(&mut self) -> Result<Option<u8>> {
        let mut byte = [0];
        let read = tokio::time::timeout(WITHIN, self.stdout.read(&mut byte)).await;
        Ok((read.context("nothing comes")?? == 1).then_some(byte[0]))
    }
}

async fn exec_slow_reader_gets_everything(t: &Context) -> Result<()> {
    // More than all pipes and windows on the way hold.
    const LINES: u32 = 100_000;
    let (_pod, container) = t.idle().await?;
    let script = format!("seq {LINES}; exit 3");
    let mut exec = Exec::start(t, &container, "slow", &script).await?;
    let mut bytes = Vec::new();
    while let Some(byte) = exec.byte().await? {
        bytes.push(byte);
    }
    let lines = (1..=LINES).fold(String::new(), |text, n| text + &n.to_string() + "\n");
    same!(bytes.len(), lines.len(), "bytes");
    ensure!(bytes == lines.as_bytes(), "the bytes differ");
    same!(exec.ctr.wait().await?.code(), Some(3));
    Ok(())
}

/// Both containers still run what they are asked to.
async fn answers(container: &Container, other: &Container) -> Result<()> {
    for of in [container, other] {
        for _ in 0..3 {
            let output = of.shell("echo out; echo err >&2; exit 4").await?;
            same!((output.code, &*output.text()), (4, "out"));
        }
    }
    Ok(())
}

/// The container is stopped and removed in no time, and the other goes on.
async fn ends_at_once(container: &Container, other: &Container) -> Result<()> {
    let begin = Instant::now();
    container.stop(0).await.context("stop")?;
    container.remove().await.context("remove")?;
    let took = begin.elapsed();
    ensure!(took < WITHIN, "stopped and removed only after {took:?}");
    other.exec(["true"]).await?.success()?;
    Ok(())
}

async fn exec_stalled_reader_stalls_nobody_else(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let other = t.container(&pod, "other").idle().start().await?;
    let mut stalled = Vec::new();
    for id in ["stalled-1", "stalled-2"] {
        // It begins, and is never read again.
        let mut exec = Exec::start(t, &container, id, "yes").await?;
        ensure!(exec.byte().await?.is_some(), "{id} wrote nothing");
        stalled.push(exec);
    }
    answers(&container, &other).await?;
    ends_at_once(&container, &other).await?;
    for mut exec in stalled {
        exec.ctr.kill().await?;
    }
    Ok(())
}

async fn attach_stalled_reader_stalls_nobody_else(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let other = t.container(&pod, "other").idle().start().await?;
    let container = t
        .container(&pod, "main")
        .shell("line=$(head -c 8000 /dev/zero | tr '\\0' x); read word; yes $line")
        .edit(|config| config.stdin = true)
        .start()
        .await?;
    let mut session = Session::attach(&container, false).await?;
    session.send("go\n").await?;
    session.wrote("xxx").await?;
    // From here on nobody reads. containerd gives each piece of output to the log
    // and to who is attached: once all buffers are full, the log stands still, too.
    let log = pod.log_directory().join("main/0.log");
    let mut size = 0;
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = fs::metadata(&log).context("the log")?.len();
        if now == size {
            break;
        }
        size = now;
    }
    answers(&container, &other).await?;
    // containerd itself waits for its client before it deletes a task, with runc
    // as well: the client leaves while the container is being stopped.
    let (stopped, ()) = tokio::join!(container.stop(0), async { drop(session) });
    stopped.context("stop")?;
    ends_at_once(&container, &other).await
}
