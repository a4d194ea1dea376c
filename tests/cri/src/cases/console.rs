// SPDX-License-Identifier: Apache-2.0
//! The guest's console is a container's to write to: /dev/console is among the
//! devices that every container may make a node of and open.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;

use crate::case::{cases, same};
use crate::context::Context;
use crate::procfs::{Processes, Role, resident_kib, signal};

cases! {
    PODHULL_ONCE:
        console_flood_stays_within_its_ring;
}

/// What is written to the console: many times the ring, which has 64 KiB.
const FLOOD: u64 = 8 << 20;
/// By how much the shim may grow meanwhile: its execs and relays, not the flood.
const GROWTH_KIB: i64 = 4 << 10;
/// How much of the console is quoted, with what stands around it in the log.
const QUOTED: usize = 4096;
const WITHIN: Duration = Duration::from_secs(30);

/// Bytes that a process has read so far.
fn has_read(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).context("read a process's I/O")?;
    let number = text.lines().find_map(|line| line.strip_prefix("rchar: "));
    number.context("no rchar")?.parse().context(text.clone())
}

async fn console_flood_stays_within_its_ring(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let processes = Processes::of(pod.id())?;
    let shim = processes.pid(Role::Shim)?;
    container.shell("mknod /dev/flood c 5 1").await?.success()?;
    let (size, read) = (resident_kib(shim)?, has_read(shim)?);
    let begin = Instant::now();
    // No ends of lines: a terminal writes each by itself, which is slow.
    let script = format!("tr '\\0' x </dev/zero | head -c {FLOOD} >/dev/flood");
    let flood = container.shell(&script);
    let meanwhile = async {
        // It has begun; others are served, and quickly.
        while has_read(shim)? - read < FLOOD / 16 {
            ensure!(begin.elapsed() < WITHIN, "nothing of the flood arrives");
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        let asked = Instant::now();
        container.exec(["true"]).await?.success()?;
        let took = asked.elapsed();
        ensure!(took < Duration::from_secs(5), "an exec took {took:?}");
        anyhow::Ok(())
    };
    let (flood, meanwhile) = tokio::join!(flood, meanwhile);
    flood?.success()?;
    meanwhile?;
    // The VMM does not wait for a reader of its console: some may be dropped.
    let arrived = has_read(shim)? - read;
    ensure!(
        arrived > FLOOD / 4 * 3,
        "only {arrived} bytes reached the shim"
    );
    let grown = resident_kib(shim)? - size;
    ensure!(grown < GROWTH_KIB, "the shim has grown by {grown} KiB");
    container.exec(["true"]).await?.success()?;
    ensure!(pod.is_ready().await?, "the pod ended");

    // The last words are the flood's end, and few of it.
    signal(processes.pid(Role::Vmm)?, Signal::SIGKILL)?;
    same!(container.exited(WITHIN).await?.exit_code, 137);
    pod.not_ready(WITHIN).await?;
    let log = t.containerd().await.log();
    let told = log
        .lines()
        .find(|line| line.contains("the VM ended by itself") && line.contains(pod.id()));
    let told = told.context("nothing is said of the VM's end")?;
    ensure!(told.contains(&"x".repeat(100)), "{told}");
    ensure!(told.len() < QUOTED, "{} bytes are quoted", told.len());
    Ok(())
}
