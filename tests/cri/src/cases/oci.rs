// SPDX-License-Identifier: Apache-2.0
//! What OCI has and CRI has no word for, or mends before a runtime sees it: asked
//! by `ctr`, for a container in a pod that CRI made.

use std::time::Duration;

use anyhow::Result;
use podhull_testkit::cri::Pod;
use podhull_testkit::image::BUSYBOX;
use podhull_testkit::oracle::assert_clean;

use crate::case::{cases, contains, same};
use crate::context::{Context, refusal};

cases! {
    ALL_TWICE:
        oci_cwd_that_is_a_file_is_refused,
        oci_bind_source_that_is_missing_is_named,
        oci_limits_are_those_of_init_and_exec;
}

/// The container that `ctr` makes.
const ID: &str = "made-by-ctr";

/// Runs `command` in a container of `pod`, made with `flags`.
async fn run(t: &Context, pod: &Pod, flags: &[&str], command: &[&str]) -> Result<String> {
    let runtime = if t.is_podhull() { "podhull" } else { "runc" };
    let runtime = format!("io.containerd.{runtime}.v2");
    // A shim finds the pod by it, as it does for CRI's containers.
    let sandbox = format!("io.kubernetes.cri.sandbox-id={}", pod.id());
    // A cgroup of its own: runc would leave the one of the namespace. No FIFOs:
    // ctr would leave their folder.
    let own = [
        "run",
        "--null-io",
        "--runtime",
        &runtime,
        "--annotation",
        &sandbox,
        "--cgroup",
        "/by-ctr",
    ];
    let what = [BUSYBOX, ID];
    let args = [&own[..], flags, &what, command].concat();
    t.containerd().await.ctr(&args).await
}

/// The lower-case words of the refusal, after which the pod and the node are as
/// they were.
async fn refused(t: &Context, flags: &[&str]) -> Result<String> {
    let (pod, container) = t.idle().await?;
    let flags = [&["--rm"], flags].concat();
    let text = refusal(run(t, &pod, &flags, &["true"]).await, &flags.join(" "))?;
    container.exec(["true"]).await?.success()?;
    pod.stop().await?;
    pod.remove().await?;
    assert_clean(&*t.containerd().await, t.before(), Duration::from_secs(10)).await?;
    Ok(text.to_lowercase())
}

async fn oci_cwd_that_is_a_file_is_refused(t: &Context) -> Result<()> {
    let text = refused(t, &["--cwd", "/bin/busybox"]).await?;
    contains!(&text, "/bin/busybox", "not a directory");
    Ok(())
}

async fn oci_bind_source_that_is_missing_is_named(t: &Context) -> Result<()> {
    let mount = "type=bind,src=/nonexistent/source,dst=/data,options=rbind:ro";
    let text = refused(t, &["--mount", mount]).await?;
    contains!(
        &text,
        "/nonexistent/source",
        "/data",
        "no such file or directory"
    );
    Ok(())
}

async fn oci_limits_are_those_of_init_and_exec(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    // The ctr of 1.6 has no flag for it, and a limit of its own in each spec.
    let (flags, [soft, hard]) = if t.is_16() {
        (&["--detach"][..], ["1024", "1024"])
    } else {
        let flags = &["--detach", "--rlimit-nofile", "1234:2345"];
        (&flags[..], ["1234", "2345"])
    };
    run(t, &pod, flags, &["sleep", "1000000"]).await?;
    let script =
        "grep -h 'Max open files' /proc/1/limits /proc/self/limits; ulimit -Sn; ulimit -Hn";
    let fifos = t.new_folder("fifos")?;
    let ctr = t.containerd().await;
    let text = ctr
        .ctr(&[
            "tasks",
            "exec",
            "--fifo-dir",
            &fifos,
            "--exec-id",
            "limits",
            ID,
            "sh",
            "-c",
            script,
        ])
        .await;
    ctr.ctr(&["tasks", "delete", "--force", ID]).await?;
    ctr.ctr(&["containers", "delete", ID]).await?;
    let text = text?;
    let words: Vec<_> = text
        .split_whitespace()
        .filter(|word| word.parse::<u64>().is_ok())
        .collect();
    same!(
        words,
        [soft, hard, soft, hard, soft, hard],
        "soft and hard: {text}"
    );
    Ok(())
}
