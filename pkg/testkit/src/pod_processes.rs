// SPDX-License-Identifier: Apache-2.0
//! The node's processes that belong to one pod, and the memory they take.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// What a process is to its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// containerd's counterpart.
    Shim,
    /// The VMM.
    Vmm,
    /// Another child of a VM's shim: a device's backend.
    Helper,
    /// A process of a container, which a shim without a VM has on the node.
    Container,
}

/// A process of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// What it is to the pod.
    pub part: Part,
    /// Its arguments, the program's name first.
    pub arguments: Vec<String>,
    /// Its proportional share of memory (PSS), in KiB.
    pub pss_kib: u64,
}

impl Process {
    /// The file name of its program.
    #[must_use]
    pub fn name(&self) -> &str {
        name(&self.arguments)
    }
}

/// The shim of a pod and everything that descends from it, shim first.
///
/// # Errors
/// If there is no shim, or /proc cannot be read.
pub fn of_pod(pod_id: &str) -> Result<Vec<Process>> {
    let mut found = members(&all()?, pod_id).context("the pod has no shim")?;
    for process in &mut found {
        process.pss_kib = pss_kib(process.pid).unwrap_or_default();
    }
    Ok(found)
}

/// The shims of all pods, with those that are asked to start or to clean up.
///
/// # Errors
/// If /proc cannot be read.
pub fn shims() -> Result<Vec<u32>> {
    let all = all()?.into_iter();
    let shims = all.filter(|(_, (_, arguments))| is_shim(arguments));
    Ok(shims.map(|(pid, _)| pid).collect())
}

type Table = BTreeMap<u32, (u32, Vec<String>)>;

/// Every process: its parent, and its arguments.
fn all() -> Result<Table> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc").context("read /proc")?.flatten() {
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        // A process that has just ended belongs to nobody.
        if let Some(pid) = pid
            && let Some(parent) = parent_of(pid)
        {
            all.insert(pid, (parent, arguments_of(pid)));
        }
    }
    Ok(all)
}

/// True for a shim, which names its pod, and not for a child of one.
fn is_shim(arguments: &[String]) -> bool {
    name(arguments).starts_with("containerd-shim-") && arguments.iter().any(|word| word == "-id")
}

fn members(all: &Table, pod_id: &str) -> Option<Vec<Process>> {
    let is_its_shim = |arguments: &[String]| {
        is_shim(arguments) && arguments.windows(2).any(|pair| pair == ["-id", pod_id])
    };
    let (shim, (_, arguments)) = all
        .iter()
        .find(|(_, (_, arguments))| is_its_shim(arguments))?;
    let has_vm = !name(arguments).contains("runc");
    let mut found = vec![Process {
        pid: *shim,
        part: Part::Shim,
        arguments: arguments.clone(),
        pss_kib: 0,
    }];
    let mut next = 0;
    while let Some(parent) = found.get(next).map(|process| process.pid) {
        next += 1;
        for (pid, (_, arguments)) in all.iter().filter(|(_, (of, _))| *of == parent) {
            let part = match has_vm {
                true if name(arguments).starts_with("qemu-") => Part::Vmm,
                true => Part::Helper,
                false => Part::Container,
            };
            found.push(Process {
                pid: *pid,
                part,
                arguments: arguments.clone(),
                pss_kib: 0,
            });
        }
    }
    Some(found)
}

fn name(arguments: &[String]) -> &str {
    let program = arguments.first().map_or("", String::as_str);
    Path::new(program)
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or(program)
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in brackets and may itself hold brackets and blanks.
    let (_, tail) = stat.rsplit_once(')')?;
    tail.split_whitespace().nth(1)?.parse().ok()
}

fn arguments_of(pid: u32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes)
        .split_terminator('\0')
        .map(str::to_owned)
        .collect()
}

fn pss_kib(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(parent: u32, line: &str) -> (u32, Vec<String>) {
        (parent, line.split(' ').map(str::to_owned).collect())
    }

    #[test]
    fn the_tree_below_the_pods_shim_is_found() {
        let all = BTreeMap::from([
            (
                10,
                process(1, "/x/containerd-shim-podhull-v2 -namespace k8s.io -id a"),
            ),
            (
                11,
                process(1, "/x/containerd-shim-podhull-v2 -namespace k8s.io -id b"),
            ),
            (12, process(10, "/x/containerd-shim-podhull-v2 jail")),
            (13, process(12, "/usr/bin/qemu-system-x86_64 -M microvm")),
            (14, process(11, "/usr/bin/qemu-system-x86_64 -M microvm")),
        ]);
        let found: Vec<_> = members(&all, "a")
            .unwrap()
            .into_iter()
            .map(|process| (process.pid, process.part))
            .collect();
        assert_eq!(
            found,
            [(10, Part::Shim), (12, Part::Helper), (13, Part::Vmm)]
        );
        assert_eq!(members(&all, "c"), None);
    }

    #[test]
    fn a_process_has_memory_and_a_parent() {
        let pid = std::process::id();
        assert!(pss_kib(pid).unwrap() > 0);
        assert!(parent_of(pid).is_some());
        assert!(!arguments_of(pid).is_empty());
    }
}
