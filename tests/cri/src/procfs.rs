// SPDX-License-Identifier: Apache-2.0
//! The processes of a pod as the node's root sees them.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podhull_testkit::pod_processes::{self, Part, Process};

use crate::case::Skip;

/// A process of a pod that is a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Shim,
    Vmm,
    FileServer,
    VsockDaemon,
}

/// The processes of a pod.
#[derive(Debug)]
pub(crate) struct Processes(Vec<Process>);

impl Processes {
    /// Of the pod with this id.
    pub(crate) fn of(pod_id: &str) -> Result<Self> {
        Ok(Self(pod_processes::of_pod(pod_id)?))
    }

    /// The one that does the work of `role`.
    ///
    /// # Errors
    /// [`Skip`] if this machine needs no vsock daemon.
    pub(crate) fn pid(&self, role: Role) -> Result<u32> {
        if role == Role::VsockDaemon && Path::new("/dev/vhost-vsock").exists() {
            return Err(
                Skip("this machine has /dev/vhost-vsock and needs no daemon".into()).into(),
            );
        }
        // A file server's parent only waits for it: the last one serves.
        let found = self.0.iter().rev().find(|process| match role {
            Role::Shim => process.part == Part::Shim,
            Role::Vmm => process.part == Part::Vmm,
            Role::FileServer => process.arguments.iter().any(|word| word == "virtiofsd"),
            Role::VsockDaemon => process.name().starts_with("vhost-device-vsock"),
        });
        let found = found.with_context(|| format!("no {role:?} among {:#?}", self.0))?;
        Ok(found.pid)
    }

    /// Waits until none of them is left.
    pub(crate) async fn gone(&self, within: Duration) -> Result<()> {
        self.wait_for(within, |_| true).await
    }

    /// Waits until only the shim is left, at most.
    pub(crate) async fn vm_gone(&self, within: Duration) -> Result<()> {
        self.wait_for(within, |process| process.part != Part::Shim)
            .await
    }

    async fn wait_for(&self, within: Duration, which: impl Fn(&Process) -> bool) -> Result<()> {
        let by = Instant::now() + within;
        loop {
            let left = self
                .0
                .iter()
                .filter(|process| which(process) && is_alive(process.pid));
            let left: Vec<_> = left.collect();
            if left.is_empty() {
                return Ok(());
            }
            ensure!(Instant::now() < by, "left after {within:?}: {left:#?}");
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }
}

fn is_alive(pid: u32) -> bool {
    // A zombie has ended: who reaps it is another question.
    fields(&format!("/proc/{pid}/status"), "State").is_ok_and(|state| !state.starts_with('Z'))
}

/// Sends a signal.
pub(crate) fn signal(pid: u32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid.cast_signed()), signal).with_context(|| format!("{signal} to {pid}"))
}

fn fields(file: &str, name: &str) -> Result<String> {
    let text = fs::read_to_string(file).with_context(|| format!("read {file}"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{name}:")));
    Ok(line
        .with_context(|| format!("no {name} in {file}"))?
        .trim()
        .to_owned())
}

/// A field of a process's status.
pub(crate) fn status(pid: u32, name: &str) -> Result<String> {
    fields(&format!("/proc/{pid}/status"), name)
}

/// How much of a process's memory is resident, in KiB.
pub(crate) fn resident_kib(pid: u32) -> Result<i64> {
    let text = status(pid, "VmRSS")?;
    text.trim_end_matches(" kB").parse().context(text)
}

/// A capability set of a process.
pub(crate) fn capabilities(pid: u32, set: &str) -> Result<u64> {
    let hex = status(pid, set)?;
    u64::from_str_radix(&hex, 16).context(hex)
}

/// A field of the status of each thread.
pub(crate) fn of_threads(pid: u32, name: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).context("read threads")? {
        let file = thread?.path().join("status");
        found.push(fields(&file.to_string_lossy(), name)?);
    }
    Ok(found)
}

/// A namespace of a process.
pub(crate) fn namespace(pid: u32, kind: &str) -> Result<String> {
    let link = fs::read_link(format!("/proc/{pid}/ns/{kind}")).context("read a namespace")?;
    Ok(link.to_string_lossy().into_owned())
}

/// Whether a VMM emulates its guest, by its command line.
pub(crate) fn is_emulated(vmm: u32) -> Result<bool> {
    let arguments = fs::read(format!("/proc/{vmm}/cmdline")).context("read the VMM's arguments")?;
    let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
    let [tcg, kvm] = ["tcg", "kvm"].map(|name| arguments.contains(&format!("accel={name}")));
    ensure!(tcg != kvm, "which accelerator? {arguments}");
    Ok(tcg)
}
