// SPDX-License-Identifier: Apache-2.0
//! Processes that are started in a running container.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use podhull_testkit::cri::api::ExecSyncRequest;
use podhull_testkit::cri::reply;

use crate::case::{cases, contains, same};
use crate::client::{FAILED, STDIN, exec_with};
use crate::context::{Context, refusal};
use crate::probe::{PROBE, with_probe};

cases! {
    ALL:
        exec_exit_codes_and_streams_are_kept_apart,
        exec_commands_that_cannot_run_fail_at_once,
        exec_of_what_cannot_run_is_told_as_by_runc,
        exec_timeout_kills_the_process,
        exec_after_the_end_fails;
    ALL_TWICE:
        exec_environment_and_folder_are_the_containers,
        exec_many_at_once_all_answer,
        exec_large_output_arrives_whole,
        exec_one_large_write_arrives_whole,
        exec_process_that_leaves_a_child_ends;
}

/// Within this, what cannot run has failed.
const FAILS_WITHIN: Duration = Duration::from_secs(5);
const NOT_FOUND: &[&str] = &["executable file not found in $path"];
const NO_SUCH_FILE: &[&str] = &["no such file or directory"];
const DENIED: &[&str] = &["permission denied"];

async fn exec_exit_codes_and_streams_are_kept_apart(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    for code in [0, 1, 42, 126, 255] {
        let output = container
            .shell(&format!("echo out; echo err >&2; exit {code}"))
            .await?;
        same!(output.code, code);
        same!(output.text(), "out");
        same!(output.error_text(), "err");
    }
    same!(
        container.shell("kill -9 $$").await?.code,
        137,
        "a killed process"
    );
    same!(
        container.shell("kill -TERM $$").await?.code,
        143,
        "a terminated process"
    );
    Ok(())
}

async fn exec_commands_that_cannot_run_fail_at_once(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    for (command, says) in [
        ("no-such-command", NOT_FOUND),
        ("/no/such/file", NO_SUCH_FILE),
        ("/etc/not-executable", DENIED),
        // runc before and since 1.2.
        ("/etc", &["permission denied", "is a directory"]),
        ("/etc/no-interpreter", NO_SUCH_FILE),
    ] {
        let begin = Instant::now();
        let text = match container.exec([command]).await {
            Err(error) => format!("{error:#}"),
            Ok(output) => format!("{} {}", output.code, output.error_text()),
        };
        at_once(begin, command)?;
        says_one_of(&text, says)?;
    }
    container.exec(["true"]).await?.success()?;
    Ok(())
}

fn at_once(begin: Instant, command: &str) -> Result<()> {
    let took = begin.elapsed();
    ensure!(took < FAILS_WITHIN, "{command} failed only after {took:?}");
    Ok(())
}

fn says_one_of(text: &str, says: &[&str]) -> Result<()> {
    let text = text.to_lowercase();
    let said = says.iter().any(|words| text.contains(words));
    ensure!(said, "none of {says:?} in: {text}");
    Ok(())
}

/// By ExecSync and by a stream: what is no program is an error of the runtime's
/// in runc's words, without an exit code; a shell gives the code that it has for it.
async fn exec_of_what_cannot_run_is_told_as_by_runc(t: &Context) -> Result<()> {
    const RUNTIME: &str =
        "OCI runtime exec failed: exec failed: unable to start container process: exec: ";
    let (_pod, container) = t.idle().await?;
    for (command, says, code) in [
        ("no-such-command", NOT_FOUND, 127),
        ("/no/such/file", NO_SUCH_FILE, 127),
        ("/etc/not-executable", DENIED, 126),
    ] {
        let quoted = format!("{RUNTIME}{command:?}: ");
        let begin = Instant::now();
        let error = container.exec([command]).await;
        let error = error.err().with_context(|| format!("{command} ran"))?;
        at_once(begin, command)?;
        let reply = reply(&error).context("no reply")?;
        same!(
            format!("{:?}", reply.code()),
            "Unknown",
            "{}",
            reply.message()
        );
        contains!(reply.message(), &quoted);
        says_one_of(reply.message(), says)?;

        let begin = Instant::now();
        let streamed = exec_with(t, &container, STDIN, &[command], b"").await?;
        at_once(begin, command)?;
        same!(streamed.code, FAILED, "{}", streamed.error_text());
        contains!(streamed.error_text(), &quoted);
        says_one_of(&streamed.error_text(), says)?;

        // The shell is a program that runs: what it says is the exec's.
        let begin = Instant::now();
        same!(
            container.shell(command).await?.code,
            code,
            "sh -c {command}"
        );
        let streamed = exec_with(t, &container, STDIN, &["sh", "-c", command], b"").await?;
        same!(streamed.code, code, "sh -c {command}, streamed");
        at_once(begin, command)?;
    }
    Ok(())
}

async fn exec_environment_and_folder_are_the_containers(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .env("COLOUR", "dark blue")
        .edit(|config| config.working_dir = "/home/alice".into())
        .security(|security| {
            security.run_as_user = Some(podhull_testkit::cri::api::Int64Value { value: 1000 });
            security.run_as_group = Some(podhull_testkit::cri::api::Int64Value { value: 2000 });
            security.supplemental_groups = vec![3000];
        })
        .start()
        .await?;
    let script =
        "echo $COLOUR; pwd; id -u; id -g; id -G; echo $HOSTNAME; umask; readlink /proc/self/ns/mnt";
    let exec = container.shell(script).await?.success()?.text();
    let lines: Vec<_> = exec.lines().collect();
    same!(lines[..4], ["dark blue", "/home/alice", "1000", "2000"]);
    same!(lines[4], "2000 3000");
    same!(lines[5], "pod");
    let init = container
        .shell("readlink /proc/1/ns/mnt")
        .await?
        .success()?
        .text();
    same!(lines[7], init, "the mount namespace");
    Ok(())
}

async fn exec_timeout_kills_the_process(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    let begin = Instant::now();
    let request = ExecSyncRequest {
        container_id: container.id().into(),
        cmd: ["sh", "-c", "echo begun; sleep 4321"]
            .map(str::to_owned)
            .into(),
        timeout: 2,
    };
    let error = match t.client().runtime().exec_sync(request).await {
        Ok(_) => anyhow::bail!("the process did not end"),
        Err(status) => status,
    };
    contains!(error.message(), "timeout 2s exceeded");
    ensure!(
        begin.elapsed() < Duration::from_secs(10),
        "after {:?}",
        begin.elapsed()
    );
    let left = container
        .shell("ps | grep '[s]leep 4321' || true")
        .await?
        .success()?;
    same!(left.text(), "", "what is left of it");
    Ok(())
}

async fn exec_after_the_end_fails(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t.container(&pod, "main").command(["true"]).start().await?;
    container.exited(Duration::from_secs(20)).await?;
    let text = refusal(
        container.exec(["true"]).await,
        "an exec in a container that has ended",
    )?;
    contains!(&text, "CONTAINER_EXITED");
    container.remove().await?;
    let error = container
        .exec(["true"])
        .await
        .err()
        .context("exec in a removed container")?;
    contains!(reply(&error).context("no reply")?.message(), "not found");
    Ok(())
}

async fn exec_many_at_once_all_answer(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    let container = &container;
    let runs = (0..20).map(|number| async move {
        let script = format!("echo {number}; echo e{number} >&2; exit {number}");
        let output = container.shell(&script).await?;
        same!(output.code, number);
        same!(output.text(), number.to_string());
        same!(output.error_text(), format!("e{number}"));
        anyhow::Ok(())
    });
    try_join_all(runs).await?;
    Ok(())
}

async fn exec_large_output_arrives_whole(t: &Context) -> Result<()> {
    // No two blocks of it are the same.
    let bytes: Vec<u8> = (0..2_u32 << 20).flat_map(u32::to_be_bytes).collect();
    let folder = t.new_folder("data")?;
    std::fs::write(format!("{folder}/large"), &bytes)?;
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .mount(&folder, "/data", true)
        .start()
        .await?;
    let output = container.exec(["cat", "/data/large"]).await?.success()?;
    same!(output.stdout.len(), bytes.len());
    ensure!(output.stdout == bytes, "the bytes differ");
    Ok(())
}

async fn exec_one_large_write_arrives_whole(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = with_probe(t, t.container(&pod, "main").idle())
        .await?
        .start()
        .await?;
    let output = container
        .exec([PROBE, "write", "1048576"])
        .await?
        .success()?;
    same!(output.error_text(), "1048576", "what write() gave");
    let expected: Vec<u8> = (b'a'..=b'w').cycle().take(1 << 20).collect();
    ensure!(
        output.stdout == expected,
        "the bytes differ, {} of them",
        output.stdout.len()
    );
    Ok(())
}

async fn exec_process_that_leaves_a_child_ends(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    // The child keeps neither stream: the exec ends with its own process.
    let script = "sleep 1234 </dev/null >/dev/null 2>&1 & echo done";
    let output = container.shell(script).await?.success()?;
    same!(output.text(), "done");
    let left = container
        .shell("ps | grep -c '[s]leep 1234'")
        .await?
        .success()?;
    same!(left.text(), "1", "the child lives on");
    Ok(())
}
