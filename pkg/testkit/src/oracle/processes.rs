// SPDX-License-Identifier: Apache-2.0
//! Processes of the node, and the descriptors of one.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};

use super::{Kind, Snapshot};

/// The target of every socket.
pub(super) const SOCKET: &str = "socket:";

pub(super) fn look(snapshot: &mut Snapshot, containerd: Option<u32>) -> Result<()> {
    for entry in fs::read_dir("/proc").context("read /proc")?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        // A restarted containerd is another process and no leak.
        let name = if Some(pid) == containerd {
            Some("containerd itself".to_owned())
        } else {
            describe(pid)
        };
        if let Some(name) = name {
            snapshot.add(Kind::Process, name);
        }
    }
    if let Some(pid) = containerd {
        for (target, count) in descriptors(pid)? {
            for _ in 0..count {
                snapshot.add(Kind::Descriptor, target.clone());
            }
        }
    }
    Ok(())
}

/// Its pid, start time, name and arguments; none if it has just ended.
fn describe(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in brackets and may itself hold brackets and blanks.
    let (head, tail) = stat.rsplit_once(')')?;
    let name = head.split_once('(')?.1;
    let fields: Vec<&str> = tail.split_whitespace().collect();
    let (state, started) = (fields.first()?, fields.get(19)?);
    let zombie = if *state == "Z" { " (zombie)" } else { "" };
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
    let arguments: String = arguments.chars().take(120).collect();
    Some(format!(
        "{pid} started {started} {name}{zombie}: {}",
        arguments.trim()
    ))
}

/// The open descriptors of a process, counted by what they lead to: a path
/// without the parts that differ between pods, or the kind of object.
///
/// # Errors
/// If the process is gone.
pub fn descriptors(pid: u32) -> Result<BTreeMap<String, usize>> {
    let folder = format!("/proc/{pid}/fd");
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("read {folder}"))? {
        let link = match fs::read_link(entry?.path()) {
            Ok(link) => link,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).context("read a descriptor"),
        };
        *found.entry(target(&link)).or_default() += 1;
    }
    Ok(found)
}

fn target(link: &Path) -> String {
    let text = link.to_string_lossy();
    match text.split_once(":[") {
        // socket:[123], pipe:[123], net:[123]; anon_inode:[eventpoll] keeps its name.
        Some((kind, _)) if kind != "anon_inode" => format!("{kind}:"),
        _ => {
            let parts = text.split('/');
            let parts = parts.map(|part| if is_id(part) { "ID" } else { part });
            parts.collect::<Vec<_>>().join("/")
        }
    }
}

/// Ids of pods and containers, and the names of run folders.
fn is_id(part: &str) -> bool {
    part.len() >= 16 && part.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process;

    #[test]
    fn targets_lose_their_numbers_and_keep_their_kind() {
        assert_eq!(target(Path::new("socket:[4711]")), SOCKET);
        assert_eq!(target(Path::new("pipe:[1]")), "pipe:");
        assert_eq!(
            target(Path::new("anon_inode:[eventpoll]")),
            "anon_inode:[eventpoll]"
        );
        assert_eq!(target(Path::new("/run/x/y")), "/run/x/y");
        assert_eq!(
            target(Path::new("/run/podhull/41870665f4849b86/shim.log")),
            "/run/podhull/ID/shim.log"
        );
    }

    #[test]
    fn a_process_is_described_and_its_descriptors_counted() {
        let pid = process::id();
        assert!(
            describe(pid)
                .unwrap()
                .starts_with(&format!("{pid} started "))
        );
        let pipes = |found: &BTreeMap<String, usize>| found.get("pipe:").copied().unwrap_or(0);
        let before = pipes(&descriptors(pid).unwrap());
        let pipe = io::pipe().unwrap();
        assert!(pipes(&descriptors(pid).unwrap()) >= before + 2);
        drop(pipe);
    }
}
