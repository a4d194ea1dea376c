// SPDX-License-Identifier: Apache-2.0
//! What the processes around a VM may do, by the node's /proc.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use anyhow::{Result, bail, ensure};
use podhull_testkit::pod_processes::Part;

use crate::case::{cases, contains, same};
use crate::context::Context;
use crate::procfs::{Processes, Role, capabilities, is_emulated, namespace, of_threads, status};

cases! {
    PODHULL_TWICE:
        confinement_vmm_has_no_rights,
        confinement_vmm_holds_only_known_descriptors,
        confinement_file_server_holds_only_known_descriptors,
        confinement_vsock_daemon_holds_only_known_descriptors,
        confinement_vsock_daemon_has_no_rights,
        confinement_file_server_keeps_only_its_capabilities,
        confinement_everything_is_in_the_pods_cgroup,
        confinement_run_folder_is_closed_and_has_no_abstract_sockets,
        confinement_kernel_command_line_has_no_secret;
}

const SETS: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];
/// chown, dac_override, fowner, fsetid, setgid, setuid, mknod, setfcap.
const FILE_SERVER: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 27 | 1 << 31;

/// No user, capability or way to get one.
fn has_no_rights(pid: u32) -> Result<()> {
    for field in ["Uid", "Gid"] {
        let ids = status(pid, field)?;
        ensure!(
            ids.split_whitespace().all(|id| id != "0"),
            "{field} of {pid}: {ids}"
        );
    }
    same!(status(pid, "Groups")?, "", "groups");
    for set in SETS {
        same!(capabilities(pid, set)?, 0, "{set} of {pid}");
    }
    same!(status(pid, "NoNewPrivs")?, "1");
    for kind in ["mnt", "net", "ipc", "uts", "pid"] {
        ensure!(
            namespace(pid, kind)? != namespace(std::process::id(), kind)?,
            "{pid} is in the node's {kind} namespace"
        );
    }
    is_alone(pid)?;
    // Its root is not the node's.
    for folder in [
        "/", "/root", "/home", "/var", "/run", "/sys", "/proc", "/etc", "/dev",
    ] {
        let there = fs::metadata(format!("/proc/{pid}/root{folder}"));
        if let (Ok(there), Ok(nodes)) = (there, fs::metadata(folder)) {
            let same = (there.dev(), there.ino()) == (nodes.dev(), nodes.ino());
            ensure!(!same, "{pid} sees the node's {folder}");
        }
    }
    Ok(())
}

/// It is the first and only process of its PID namespace, and a child of the shim.
fn is_alone(pid: u32) -> Result<()> {
    let pids = status(pid, "NSpid")?;
    same!(pids.split_whitespace().last(), Some("1"), "PIDs of {pid}");
    let own = namespace(pid, "pid")?;
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let other = name.to_str().and_then(|name| name.parse().ok());
        // One that has just ended is in no namespace.
        if let Some(other) = other
            && other != pid
            && namespace(other, "pid").is_ok_and(|its| its == own)
        {
            bail!("{other} is in the PID namespace of {pid}");
        }
    }
    Ok(())
}

async fn confinement_vmm_has_no_rights(t: &Context) -> Result<()> {
    let (pod, _container) = t.idle().await?;
    let pid = Processes::of(pod.id())?.pid(Role::Vmm)?;
    has_no_rights(pid)?;
    let shim = Processes::of(pod.id())?.pid(Role::Shim)?;
    same!(
        status(pid, "PPid")?,
        shim.to_string(),
        "who waits for the VMM"
    );
    for mode in of_threads(pid, "Seccomp")? {
        same!(mode, "2", "a thread's seccomp mode");
    }
    let environment = fs::read(format!("/proc/{pid}/environ"))?;
    let environment = String::from_utf8_lossy(&environment).into_owned();
    let names: Vec<_> = environment
        .split_terminator('\0')
        .filter_map(|pair| pair.split('=').next())
        .collect();
    ensure!(
        names.iter().all(|name| *name == "PATH"),
        "its environment: {environment:?}"
    );
    Ok(())
}

async fn confinement_vsock_daemon_has_no_rights(t: &Context) -> Result<()> {
    let (pod, _container) = t.idle().await?;
    has_no_rights(Processes::of(pod.id())?.pid(Role::VsockDaemon)?)
}

/// The descriptors of `pid` lead to what is `known`, which begins like that or,
/// for a root, is one that is not the node's. They are fewer than `most`.
fn holds_only(pid: u32, known: &[&str], most: usize) -> Result<()> {
    let found = podhull_testkit::oracle::descriptors(pid)?;
    let is_known = |target: &str| {
        let begins = |known: &&str| *known != "/" && target.starts_with(known);
        known.contains(&target) || known.iter().any(begins)
    };
    let strange: Vec<_> = found.keys().filter(|target| !is_known(target)).collect();
    ensure!(
        strange.is_empty(),
        "unknown descriptors of {pid}: {strange:#?}"
    );
    let root = fs::metadata("/")?;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // One that was closed meanwhile leads nowhere.
        if let Ok(target) = fs::metadata(entry?.path()) {
            let same = (target.dev(), target.ino()) == (root.dev(), root.ino());
            ensure!(!same, "{pid} holds the node's root");
        }
    }
    ensure!(
        found.values().sum::<usize>() < most,
        "too many descriptors of {pid}: {found:#?}"
    );
    Ok(())
}

async fn confinement_vmm_holds_only_known_descriptors(t: &Context) -> Result<()> {
    const KNOWN: [&str; 12] = [
        "pipe:",
        "socket:",
        "/dev/null",
        "/dev/urandom",
        "/dev/kvm",
        "/dev/net/tun",
        "/dev/vhost-vsock",
        "/memfd:",
        "anon_inode:[eventfd]",
        "anon_inode:[eventpoll]",
        "anon_inode:[signalfd]",
        // With KVM, its VM and CPUs.
        "anon_inode:kvm",
    ];
    let (pod, _container) = t.idle().await?;
    holds_only(Processes::of(pod.id())?.pid(Role::Vmm)?, &KNOWN, 100)
}

async fn confinement_file_server_holds_only_known_descriptors(t: &Context) -> Result<()> {
    const KNOWN: [&str; 6] = [
        "pipe:",
        "socket:",
        "/dev/null",
        "/memfd:",
        "anon_inode:[eventfd]",
        "anon_inode:[eventpoll]",
    ];
    let (pod, _container) = t.idle().await?;
    let pid = Processes::of(pod.id())?.pid(Role::FileServer)?;
    let waits: u32 = status(pid, "PPid")?.parse()?;
    // What the guest has looked at: the tree, with a folder per container. The
    // library finds it by its mounts.
    let mounts = format!("/{pid}/mountinfo");
    let known = [&KNOWN[..], &["/", "/ID", &mounts]].concat();
    holds_only(pid, &known, 200)?;
    holds_only(waits, &KNOWN[..3], 10)
}

async fn confinement_vsock_daemon_holds_only_known_descriptors(t: &Context) -> Result<()> {
    const KNOWN: [&str; 6] = [
        "pipe:",
        "socket:",
        "/dev/null",
        "/memfd:memory-backend-memfd",
        "anon_inode:[eventfd]",
        "anon_inode:[eventpoll]",
    ];
    let (pod, _container) = t.idle().await?;
    let pid = Processes::of(pod.id())?.pid(Role::VsockDaemon)?;
    holds_only(pid, &KNOWN, 50)
}

async fn confinement_file_server_keeps_only_its_capabilities(t: &Context) -> Result<()> {
    let (pod, _container) = t.idle().await?;
    let pid = Processes::of(pod.id())?.pid(Role::FileServer)?;
    for set in SETS {
        let more = capabilities(pid, set)? & !FILE_SERVER;
        same!(more, 0, "{set} has more than the file server needs");
    }
    for name in ["Seccomp", "NoNewPrivs"] {
        let expected = if name == "Seccomp" { "2" } else { "1" };
        for value in of_threads(pid, name)? {
            same!(value, expected, "{name} of a thread");
        }
    }
    for kind in ["mnt", "net", "pid"] {
        ensure!(
            namespace(pid, kind)? != namespace(std::process::id(), kind)?,
            "the file server is in the node's {kind} namespace"
        );
    }
    // The process that waits for it has nothing to do it with.
    let waits: u32 = status(pid, "PPid")?.parse()?;
    let shim = Processes::of(pod.id())?.pid(Role::Shim)?;
    same!(
        status(waits, "PPid")?,
        shim.to_string(),
        "whose child {waits} is"
    );
    for set in SETS {
        same!(capabilities(waits, set)?, 0, "{set} of the waiting process");
    }
    same!(status(waits, "NoNewPrivs")?, "1", "of the waiting process");
    Ok(())
}

/// Of the memberships in /proc/PID/cgroup those that account for something: each
/// hierarchy of version 1 but the named ones, or the only one of version 2.
fn accounting(cgroups: &str) -> Vec<&str> {
    let of = |line: &&str| {
        let controllers = line.split(':').nth(1).unwrap_or_default();
        !controllers.is_empty() && !controllers.starts_with("name=")
    };
    let first: Vec<_> = cgroups.lines().filter(of).collect();
    if first.is_empty() {
        return cgroups.lines().collect();
    }
    first
}

async fn confinement_everything_is_in_the_pods_cgroup(t: &Context) -> Result<()> {
    let (pod, _container) = t.idle().await?;
    let processes = podhull_testkit::pod_processes::of_pod(pod.id())?;
    let around: Vec<_> = processes
        .iter()
        .filter(|process| process.part != Part::Shim)
        .collect();
    // The VMM, the file server and who waits for it, and the vsock daemon.
    let expected = if Path::new("/dev/vhost-vsock").exists() {
        3
    } else {
        4
    };
    same!(
        around.len(),
        expected,
        "processes around the VM: {around:#?}"
    );
    for process in around {
        let cgroups = fs::read_to_string(format!("/proc/{}/cgroup", process.pid))?;
        let accounting = accounting(&cgroups);
        ensure!(!accounting.is_empty(), "no cgroups: {cgroups}");
        for cgroup in accounting {
            let id = pod.id();
            ensure!(cgroup.contains(id), "{process:?} is in {cgroup}");
        }
    }
    Ok(())
}

async fn confinement_run_folder_is_closed_and_has_no_abstract_sockets(t: &Context) -> Result<()> {
    let names = || -> Result<BTreeSet<OsString>> {
        let entries = fs::read_dir("/run/podhull")?;
        entries.map(|entry| Ok(entry?.file_name())).collect()
    };
    let before = names()?;
    let (pod, _container) = t.idle().await?;
    let new: Vec<_> = names()?.difference(&before).cloned().collect();
    same!(new.len(), 1, "run folders for one pod");
    for entry in fs::read_dir("/run/podhull")? {
        let entry = entry?;
        let mode = entry.metadata()?.permissions().mode() & 0o7777;
        same!(mode, 0o700, "mode of {}", entry.path().display());
    }
    let processes = Processes::of(pod.id())?;
    for pid in [
        std::process::id(),
        processes.pid(Role::Shim)?,
        processes.pid(Role::Vmm)?,
    ] {
        let sockets = fs::read_to_string(format!("/proc/{pid}/net/unix"))?;
        let abstract_ones: Vec<_> = sockets
            .lines()
            .filter_map(|line| line.split_whitespace().nth(7))
            .filter(|name| name.starts_with('@') && !name.contains("containerd"))
            .collect();
        ensure!(
            abstract_ones.is_empty(),
            "abstract sockets near {pid}: {abstract_ones:?}"
        );
    }
    Ok(())
}

async fn confinement_kernel_command_line_has_no_secret(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let line = container
        .exec(["cat", "/proc/cmdline"])
        .await?
        .success()?
        .text();
    for word in line.split_whitespace() {
        let longest = word
            .split(|c: char| !c.is_ascii_alphanumeric())
            .map(str::len)
            .max();
        ensure!(longest < Some(32), "{word} may be a secret: {line}");
    }
    let vmm = Processes::of(pod.id())?.pid(Role::Vmm)?;
    let emulated = is_emulated(vmm)?;
    for word in ["mitigations=off", "no_timer_check"] {
        same!(line.contains(word), emulated, "{word} in {line}");
    }
    contains!(&line, "panic=-1");
    Ok(())
}
