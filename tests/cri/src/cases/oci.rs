// SPDX-License-Identifier: Apache-2.0
//! What OCI has and CRI has no word for, or mends before a runtime sees it: asked
//! by `ctr`, for a container in a pod that CRI made.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
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
    PODHULL_TWICE:
        oci_container_without_a_pod_is_refused;
}

/// The container that `ctr` makes.
const ID: &str = "made-by-ctr";

fn runtime(t: &Context) -> String {
    let name = if t.is_podhull() { "podhull" } else { "runc" };
    format!("io.containerd.{name}.v2")
}

/// Runs `command` in a container of `pod`, made with `flags`.
async fn run(t: &Context, pod: &Pod, flags: &[&str], command: &[&str]) -> Result<String> {
    let runtime = runtime(t);
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

/// Runs `script` in the container that `ctr` made.
async fn exec(t: &Context, flags: &[&str], script: &str) -> Result<String> {
    let fifos = t.new_folder("fifos")?;
    let own = ["tasks", "exec", "--fifo-dir", &fifos, "--exec-id", "by-ctr"];
    let args = [&own[..], flags, &[ID, "sh", "-c", script]].concat();
    t.containerd().await.ctr(&args).await
}

/// Removes the container that `ctr` made.
async fn gone(t: &Context) -> Result<()> {
    let ctr = t.containerd().await;
    ctr.ctr(&["tasks", "delete", "--force", ID]).await?;
    ctr.ctr(&["containers", "delete", ID]).await.map(drop)
}

/// The lower-case words of the refusal, after which the pod goes on.
async fn refused_in(t: &Context, pod: &Pod, flags: &[&str]) -> Result<String> {
    let with_rm = [&["--rm"], flags].concat();
    let text = refusal(run(t, pod, &with_rm, &["true"]).await, &flags.join(" "))?;
    let good = t.container(pod, "good").idle().start().await?;
    good.exec(["true"]).await?.success()?;
    Ok(text.to_lowercase())
}

/// The words are runc's: those of a container that cannot be made, and those of
/// a process that cannot be added.
async fn oci_cwd_that_is_a_file_is_refused(t: &Context) -> Result<()> {
    const CWD: [&str; 2] = ["--cwd", "/bin/busybox"];
    let pod = t.ready_pod().await?;
    let text = refused_in(t, &pod, &CWD).await?;
    contains!(
        &text,
        "oci runtime create failed: ",
        "unable to start container process: ",
        "mkdir ",
        "/bin/busybox: not a directory"
    );
    run(t, &pod, &["--detach"], &["sleep", "1000000"]).await?;
    let added = refusal(exec(t, &CWD, "true").await, "an exec in a file");
    gone(t).await?;
    contains!(
        added?.to_lowercase(),
        "oci runtime exec failed: exec failed: unable to start container process: ",
        "chdir to cwd (\"/bin/busybox\") set in config.json failed: not a directory"
    );
    Ok(())
}

/// `ctr run` without a pod: there is no VM to put the container into.
async fn oci_container_without_a_pod_is_refused(t: &Context) -> Result<()> {
    let runtime = runtime(t);
    let args = ["run", "--rm", "--null-io", "--runtime", &runtime, BUSYBOX];
    let args = [&args[..], &[ID, "true"]].concat();
    let begin = Instant::now();
    let text = refusal(t.containerd().await.ctr(&args).await, "a lone container")?;
    let took = begin.elapsed();
    contains!(&text, ID, "io.kubernetes.cri.sandbox-id", "no pod");
    ensure!(took < Duration::from_secs(5), "refused only after {took:?}");
    assert_clean(&*t.containerd().await, t.before(), Duration::from_secs(10)).await
}

async fn oci_bind_source_that_is_missing_is_named(t: &Context) -> Result<()> {
    let mount = "type=bind,src=/nonexistent/source,dst=/data,options=rbind:ro";
    let pod = t.ready_pod().await?;
    let text = refused_in(t, &pod, &["--mount", mount]).await?;
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
    let text = exec(t, &[], script).await;
    gone(t).await?;
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
