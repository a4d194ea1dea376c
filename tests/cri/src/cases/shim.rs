// SPDX-License-Identifier: Apache-2.0
//! The shim's program, as containerd calls it.

use std::process::{Output, Stdio};

use anyhow::{Result, ensure};
use tokio::process::Command;

use crate::case::{cases, contains};
use crate::context::Context;

cases! {
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
