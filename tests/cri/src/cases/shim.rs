// SPDX-License-Identifier: Apache-2.0
//! The shim's program, as containerd calls it.

use std::fs;
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::process::Command;

use crate::case::{cases, contains};
use crate::context::Context;

cases! {
    PODHULL_TWICE:
        shim_metrics_of_a_running_pod_are_read;
    PODHULL_ONCE:
        shim_version_and_info_are_printed,
        shim_delete_of_an_unknown_sandbox_succeeds,
        shim_wrong_arguments_are_named;
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

async fn shim_metrics_of_a_running_pod_are_read(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    container.shell("echo 0123456789").await?.success()?;
    let folders = fs::read_dir("/run/podhull").context("podhull's run folder")?;
    let sockets = folders.flatten().map(|pod| pod.path().join("metrics.sock"));
    let sockets: Vec<_> = sockets.filter(|socket| socket.exists()).collect();
    let [socket] = &sockets[..] else {
        anyhow::bail!("one pod runs: {sockets:?}");
    };
    // One who asks nothing takes nobody's place for long.
    let silent = UnixStream::connect(socket).await?;
    let mut reader = UnixStream::connect(socket).await?;
    let request = b"GET /metrics HTTP/1.1\r\nHost: shim\r\nConnection: close\r\n\r\n";
    reader.write_all(request).await?;
    container.exec(["true"]).await?.success()?;
    let mut text = String::new();
    let read = tokio::time::timeout(Duration::from_secs(10), reader.read_to_string(&mut text));
    read.await.context("not answered")??;
    contains!(
        &text,
        "HTTP/1.1 200 OK",
        "podhull_sandbox_start_duration_seconds_count 1\n",
        "podhull_boot_phase_duration_seconds_count{phase=\"agent_ready\"} 1\n",
        "podhull_agent_rpc_duration_seconds_count{method=\"",
        "podhull_session_bytes_total{direction=\"stdout\",kind=\"stdio\"} "
    );
    drop(silent);
    Ok(())
}
