// SPDX-License-Identifier: Apache-2.0
//! What processes of a container are given, and what becomes of their orphans.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use podhull_testkit::cri::Container;
use podhull_testkit::cri::api::NamespaceMode;

use crate::case::{cases, contains, same};
use crate::context::Context;
use crate::stream::Session;

cases! {
    ALL_TWICE:
        process_limits_of_init_and_exec_are_the_same,
        process_orphans_are_reaped,
        process_orphans_in_a_shared_namespace_are_reaped,
        process_has_no_descriptors_but_its_streams;
    PODHULL_TWICE:
        process_may_open_as_many_files_as_on_a_node;
}

const WITHIN: Duration = Duration::from_secs(20);

/// The limits of a process, a line each.
async fn limits(container: &Container, pid: &str) -> Result<String> {
    let file = format!("/proc/{pid}/limits");
    Ok(container.exec(["cat", &file]).await?.success()?.text())
}

async fn process_limits_of_init_and_exec_are_the_same(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    let init = limits(&container, "1").await?;
    contains!(&init, "Max open files");
    let exec = limits(&container, "self").await?;
    for (exec, init) in exec.lines().zip(init.lines()) {
        same!(exec, init);
    }
    Ok(())
}

/// runc's containers have what containerd has, which the one of the suite has
/// from whoever runs it; systemd gives a service this, or more.
async fn process_may_open_as_many_files_as_on_a_node(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    let output = container
        .shell("ulimit -Sn; ulimit -Hn; ulimit -u")
        .await?
        .success()?;
    let text = output.text();
    let values: Vec<_> = text.lines().collect();
    let [soft, hard, processes] = values[..] else {
        anyhow::bail!("three limits: {values:?}");
    };
    same!(soft, "1024", "open files, which programs may raise");
    let hard: u64 = hard.parse().context("the hard limit")?;
    ensure!(hard >= 524_288, "at most {hard} open files");
    same!(processes, "unlimited", "processes of a user");
    Ok(())
}

/// Makes orphans that end after their parents, and waits until nothing is left
/// of them, dead or alive.
async fn orphans_go(container: &Container) -> Result<()> {
    let script = "n=0; while [ $n -lt 20 ]; do n=$((n+1)); (sleep 0.2 & echo $!); done";
    let orphans = container.shell(script).await?.success()?.text();
    same!(orphans.lines().count(), 20, "orphans");
    let states = orphans.lines().map(|pid| format!("/proc/{pid}/status"));
    let states = states.collect::<Vec<_>>().join(" ");
    let by = Instant::now() + WITHIN;
    loop {
        let left = container
            .shell(&format!(
                "grep -E '^(Name|State|PPid)' {states} 2>/dev/null || true"
            ))
            .await?
            .success()?
            .text();
        if left.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < by, "left: {left}");
    }
}

async fn process_orphans_are_reaped(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    orphans_go(&container).await
}

async fn process_orphans_in_a_shared_namespace_are_reaped(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        // Reaps nothing itself.
        .command(["sleep", "1000000"])
        .security(|security| {
            let options = security.namespace_options.get_or_insert_default();
            options.set_pid(NamespaceMode::Pod);
        })
        .start()
        .await?;
    let first = container.exec(["cat", "/proc/1/cmdline"]).await?.text();
    ensure!(!first.contains("sleep\x001000000"), "not shared: {first}");
    orphans_go(&container).await
}

/// The open descriptors of a process and where they lead; not the one with
/// which `ls` reads the folder.
async fn descriptors(container: &Container, pid: &str) -> Result<String> {
    let folder = format!("/proc/{pid}/fd");
    let text = container
        .exec(["ls", "-l", &folder])
        .await?
        .success()?
        .text();
    let lines = text.lines().filter_map(|line| {
        line.find(" -> ").map(|at| {
            let (head, target) = line.split_at(at);
            (head.rsplit(' ').next().unwrap_or_default(), &target[4..])
        })
    });
    let found: Vec<_> = lines
        .filter(|(_, target)| !target.ends_with("/fd"))
        .map(|(number, target)| format!("{number} {}", target.split(':').next().unwrap_or("")))
        .collect();
    Ok(found.join(", "))
}

async fn process_has_no_descriptors_but_its_streams(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let idle = |name| t.container(&pod, name).command(["sleep", "1000000"]);
    let plain = idle("plain").start().await?;
    same!(
        descriptors(&plain, "1").await?,
        "0 /dev/null, 1 pipe, 2 pipe"
    );
    same!(
        descriptors(&plain, "self").await?,
        "0 /dev/null, 1 pipe, 2 pipe"
    );
    let terminal = idle("terminal")
        .edit(|config| {
            config.stdin = true;
            config.tty = true;
        })
        .start()
        .await?;
    let three = "0 /dev/pts/0, 1 /dev/pts/0, 2 /dev/pts/0";
    same!(descriptors(&terminal, "1").await?, three);
    let mut session = Session::exec(&plain, &["ls", "/proc/self/fd"], true).await?;
    same!(session.exit_code().await?, 0);
    let text = String::from_utf8_lossy(&session.stdout).into_owned();
    let numbers: Vec<_> = text.split_whitespace().collect();
    same!(
        numbers,
        ["0", "1", "2", "3"],
        "with a terminal and ls's own"
    );
    Ok(())
}
