// SPDX-License-Identifier: Apache-2.0
//! Execs whose streams do not all end together, and one that never begins.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::io::AsyncWriteExt as _;

use crate::case::{cases, same};
use crate::client::{Options, exec_with};
use crate::context::Context;
use crate::peer::{numbers, sum};

cases! {
    ALL:
        exec_terminal_of_a_missing_command_fails_at_once;
    ALL_TWICE:
        exec_input_outlives_outputs_that_ended;
}

const WITHIN: Duration = Duration::from_secs(20);
/// Within this, what cannot run has failed.
const FAILS_WITHIN: Duration = Duration::from_secs(5);

async fn exec_input_outlives_outputs_that_ended(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    let script = "exec >/dev/null 2>&1; echo closed >/tmp/closed; cat >/tmp/input; exit 7";
    // containerd's streaming server ends an exec's input with its outputs: the FIFOs
    // are written directly.
    let fifos = t.new_folder("fifos")?;
    let args = ["tasks", "exec", "--exec-id", "input", "--fifo-dir", &fifos];
    let args = [&args[..], &[container.id(), "sh", "-c", script]].concat();
    let containerd = t.containerd().await;
    let mut child = containerd
        .ctr_command(&args)
        .stdin(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut stdin = child.stdin.take().context("stdin")?;
    let by = Instant::now() + WITHIN;
    while container.shell("cat /tmp/closed").await?.text() != "closed" {
        ensure!(Instant::now() < by, "the exec does not start");
    }
    // More than any buffer on the way takes from a process that does not read.
    let bytes = numbers(1 << 20);
    stdin.write_all(&bytes).await?;
    drop(stdin);
    let ended = tokio::time::timeout(WITHIN, child.wait()).await;
    let status = ended.context("the exec goes on")??;
    same!(status.code(), Some(7), "exit code");
    let hash = container.shell("sha256sum </tmp/input").await?.text();
    let size = container.shell("wc -c </tmp/input").await?.text();
    let hash = hash.split(' ').next().unwrap_or_default();
    same!(format!("{size} {hash}"), sum(&bytes), "what was read");
    Ok(())
}

async fn exec_terminal_of_a_missing_command_fails_at_once(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    for websocket in [false, true] {
        let options = Options {
            websocket,
            stdin: true,
            tty: Some((80, 24)),
            ..Options::default()
        };
        for (command, says) in [
            ("no-such-command", "executable file not found in $path"),
            ("/no/such/file", "no such file or directory"),
        ] {
            let begin = Instant::now();
            let done = exec_with(t, &container, options, &[command], b"").await?;
            let took = begin.elapsed();
            ensure!(done.code != 0, "{done:?}");
            let said = done.error_text().to_lowercase();
            ensure!(said.contains(says), "{command}: {said}");
            ensure!(took < FAILS_WITHIN, "{command} failed only after {took:?}");
        }
    }
    // Nothing of them is in the way of the next.
    same!(container.shell("echo next").await?.text(), "next");
    Ok(())
}
