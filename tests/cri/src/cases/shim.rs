// SPDX-License-Identifier: Apache-2.0
//! The shim's program, as containerd calls it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use podhull_testkit::oracle::assert_clean;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::process::Command;

use crate::case::{cases, contains, same};
use crate::context::Context;
use crate::procfs::{Processes, Role, is_emulated};

cases! {
    PODHULL_TWICE:
        shim_metrics_of_a_running_pod_are_read,
        shim_boot_is_told_and_emulation_is_said;
    PODHULL_ONCE:
        shim_version_and_info_are_printed,
        shim_delete_of_an_unknown_sandbox_succeeds,
        shim_wrong_arguments_are_named,
        shim_garbled_bundles_are_named_with_their_line;
}

async fn shim(t: &Context, args: &[&str]) -> Result<Output> {
    let bundle = t.new_folder("bundle")?;
    let output = Command::new(&t.node().programs().shim)
        .args(args)
        .current_dir(bundle)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .output()
        .await?;
    Ok(output)
}

async fn shim_version_and_info_are_printed(t: &Context) -> Result<()> {
    for flag in ["-v", "-info"] {
        let output = shim(t, &[flag]).await?;
        ensure!(output.status.success(), "{flag}: {output:?}");
        let text = String::from_utf8_lossy(&output.stdout);
        contains!(&text, env!("CARGO_PKG_VERSION"));
    }
    Ok(())
}

async fn shim_delete_of_an_unknown_sandbox_succeeds(t: &Context) -> Result<()> {
    let bundle = t.new_folder("bundle")?;
    for _ in 0..2 {
        let args = [
            "-namespace",
            "k8s.io",
            "-id",
            "nobody-knows-this-one",
            "-bundle",
            &bundle,
            "-address",
            "/run/containerd/containerd.sock",
            "delete",
        ];
        let output = shim(t, &args).await?;
        ensure!(output.status.success(), "{output:?}");
        // A DeleteResponse: at least its exit status or its time.
        ensure!(!output.stdout.is_empty(), "no response: {output:?}");
    }
    Ok(())
}

async fn shim_wrong_arguments_are_named(t: &Context) -> Result<()> {
    for (args, named) in [
        (
            &["-namespace", "k8s.io", "-colour", "red", "start"][..],
            "colour",
        ),
        (&["-namespace", "k8s.io", "-id", "x", "restart"], "restart"),
        (&["-namespace", "k8s.io", "start"], "id"),
    ] {
        let output = shim(t, args).await?;
        ensure!(!output.status.success(), "{args:?} succeeded");
        contains!(String::from_utf8_lossy(&output.stderr), named);
    }
    Ok(())
}

async fn shim_garbled_bundles_are_named_with_their_line(t: &Context) -> Result<()> {
    let bundle = t.new_folder("bundle")?;
    let file = t.path("bundle/config.json");
    let args = [
        "-namespace",
        "k8s.io",
        "-id",
        "garbled",
        "-address",
        "/run/containerd/containerd.sock",
        "start",
    ];
    for (text, words) in [
        (
            "{\"ociVersion\": \"1.0.2\",\n \"process\":",
            &["line 2 column "][..],
        ),
        (
            "{\n \"process\": {\n  \"args\": \"true\"\n }\n}",
            &["process.args: ", "line 3 column 16"],
        ),
        (
            "{\"ociVersion\": \"1.0.2\",\n \"mounts\": [{}, 7]\n}",
            &["mounts[", "line 2 column "],
        ),
        ("no JSON", &["line 1 column "]),
        ("", &["line 1 column 0"]),
    ] {
        fs::write(&file, text)?;
        let output = shim(t, &args).await?;
        ensure!(!output.status.success(), "{text:?} was taken");
        same!(output.stdout, b"", "an answer to {text:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        contains!(&said, &file);
        for word in words {
            contains!(&said, *word);
        }
        assert_clean(&*t.containerd().await, t.before(), Duration::from_secs(10)).await?;
        same!(fs::read_dir(&bundle)?.count(), 1, "files in the bundle");
    }
    Ok(())
}

/// The run folder of the only pod.
fn run_folder() -> Result<PathBuf> {
    let folders = fs::read_dir("/run/podhull").context("podhull's run folder")?;
    let folders = folders.flatten().map(|pod| pod.path());
    let folders: Vec<_> = folders
        .filter(|folder| folder.join("metrics.sock").exists())
        .collect();
    match <[_; 1]>::try_from(folders) {
        Ok([folder]) => Ok(folder),
        Err(folders) => bail!("one pod runs: {folders:?}"),
    }
}

/// Asks for the shim's metrics.
async fn ask(socket: &Path) -> Result<UnixStream> {
    let mut reader = UnixStream::connect(socket).await?;
    let request = b"GET /metrics HTTP/1.1\r\nHost: shim\r\nConnection: close\r\n\r\n";
    reader.write_all(request).await?;
    Ok(reader)
}

async fn answer(reader: &mut UnixStream) -> Result<String> {
    let mut text = String::new();
    let read = tokio::time::timeout(Duration::from_secs(10), reader.read_to_string(&mut text));
    read.await.context("not answered")??;
    Ok(text)
}

async fn shim_metrics_of_a_running_pod_are_read(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    container.shell("echo 0123456789").await?.success()?;
    let socket = run_folder()?.join("metrics.sock");
    // One who asks nothing takes nobody's place for long.
    let silent = UnixStream::connect(&socket).await?;
    let mut reader = ask(&socket).await?;
    container.exec(["true"]).await?.success()?;
    contains!(
        answer(&mut reader).await?,
        "HTTP/1.1 200 OK",
        "podhull_sandbox_start_duration_seconds_count 1\n",
        "podhull_boot_phase_duration_seconds_count{phase=\"agent_ready\"} 1\n",
        "podhull_agent_rpc_duration_seconds_count{method=\"",
        "podhull_session_bytes_total{direction=\"stdout\",kind=\"stdio\"} "
    );
    drop(silent);
    Ok(())
}

async fn shim_boot_is_told_and_emulation_is_said(t: &Context) -> Result<()> {
    const PHASES: [&str; 8] = [
        "start_called",
        "host_ready",
        "vmm_spawned",
        "kernel_entered",
        "agent_started",
        "agent_ready",
        "configured",
        "container_started",
    ];
    let (pod, _container) = t.idle().await?;
    let folder = run_folder()?;
    let boot: Value = serde_json::from_slice(&fs::read(folder.join("boot.json"))?)?;
    let phases = boot["phases"].as_array().context("no phases")?;
    let names: Vec<_> = phases
        .iter()
        .filter_map(|phase| phase["name"].as_str())
        .collect();
    same!(names, PHASES, "phases");
    let times: Vec<_> = phases
        .iter()
        .filter_map(|phase| phase["ms"].as_f64())
        .collect();
    let ascend = times.len() == PHASES.len() && times.is_sorted();
    ensure!(ascend, "the phases' times: {boot}");

    let log = fs::read_to_string(folder.join("shim.log"))?;
    let mut booted = log.lines().filter(|line| line.contains("booted"));
    let booted = booted
        .next_back()
        .context("the log says nothing of the boot")?;
    for phase in PHASES {
        contains!(booted, &format!("{phase}="));
    }
    let emulated = is_emulated(Processes::of(pod.id())?.pid(Role::Vmm)?)?;
    let warnings = log
        .lines()
        .filter(|line| line.contains("WARN") && line.contains("guests are emulated"));
    same!(warnings.count(), usize::from(emulated), "warnings");
    let mut reader = ask(&folder.join("metrics.sock")).await?;
    let gauge = format!(
        "podhull_emulation_in_use{{vmm=\"qemu\"}} {}\n",
        u8::from(emulated)
    );
    contains!(answer(&mut reader).await?, &gauge);
    if t.setup().shim_is_sandboxer() {
        let info = pod.full_status().await?.info;
        same!(info.get("emulated"), Some(&emulated.to_string()));
    }
    Ok(())
}
