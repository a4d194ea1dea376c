// SPDX-License-Identifier: Apache-2.0
//! PID 1 of the node: joins the cgroups, makes the other namespaces, mounts,
//! starts the program, and reaps whatever loses its parent.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode, ExitStatus, Stdio};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, getpid, sethostname};

use super::{CGROUP, FOLDER, PROGRAM, cgroup, env_os, exit_code, mounts, stage};

pub(super) fn run() -> Result<ExitCode> {
    prctl::set_pdeathsig(Signal::SIGKILL).context("set the parent-death signal")?;
    ensure!(getpid() == Pid::from_raw(1), "not PID 1 of a new namespace");
    let folder = PathBuf::from(env_os(FOLDER)?);
    let cgroup = env_os(CGROUP)?.to_string_lossy().into_owned();

    let hierarchies = cgroup::hierarchies()?;
    for hierarchy in &hierarchies {
        hierarchy.join(&cgroup)?;
    }
    // After joining: a cgroup namespace's root is where its maker was.
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWCGROUP,
    )
    .context("unshare mount, network, IPC, UTS and cgroup namespaces")?;
    sethostname("node1").context("sethostname")?;
    mounts::build(&folder, &hierarchies)?;
    network()?;

    let program = stage(PROGRAM)
        .stdin(Stdio::null())
        .spawn()
        .context("start the program")?;
    reap_until(Pid::from_raw(program.id().cast_signed()))
}

/// A node's network: loopback, and packets forwarded between pods.
fn network() -> Result<()> {
    let status = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()
        .context("run ip (package iproute2)")?;
    ensure!(status.success(), "ip link set lo up: {status}");
    for (key, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv6/conf/default/accept_dad", "0"),
    ] {
        fs::write(format!("/proc/sys/{key}"), value).with_context(|| format!("write {key}"))?;
    }
    Ok(())
}

fn reap_until(program: Pid) -> Result<ExitCode> {
    loop {
        let (pid, raw) = match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, code << 8),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, signal as i32),
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(error) => return Err(error).context("wait for children"),
        };
        if pid == program {
            use std::os::unix::process::ExitStatusExt;
            return Ok(exit_code(ExitStatus::from_raw(raw)));
        }
    }
}
