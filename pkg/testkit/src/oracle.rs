// SPDX-License-Identifier: Apache-2.0
//! The leak oracle: what is there before and after, and what is left over.
//!
//! It looks only at this node: its PID, mount and network namespaces, its
//! cgroups, its /run, and the records of its containerd. A fact is a line of
//! text that is the same for as long as the thing exists and differs between
//! two things; numbers that change by themselves (handles, counters) are left
//! out of it. Everything there after and not before is a leak; what was there
//! before and is gone is reported as well.
//!
//! Tolerance: facts of every kind but one must be equal. The exception are
//! containerd's descriptors, which are compared by kind of target and number:
//! its Go runtime and its gRPC server keep a few sockets more or fewer at any
//! moment, so sockets may differ by [`SOCKETS_MAY_DIFFER`]; FIFOs, pipes,
//! pidfds, namespaces and files may not. So that a slow leak of sockets cannot
//! hide in that, a suite compares with its first snapshot, not with the last.
//! The descriptors of shims are not among the facts, since no shim lives at the
//! first snapshot: cases compare them (`exec_repeated…`, `load_…`).

mod files;
mod network;
mod processes;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::containerd::Containerd;

pub use processes::descriptors;

/// By how many sockets containerd may have more than before.
pub const SOCKETS_MAY_DIFFER: usize = 3;

/// What the oracle looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Processes in the node's PID namespace, zombies too.
    Process,
    /// Open descriptors of containerd, by target.
    Descriptor,
    /// Mounts in the node's mount namespace.
    Mount,
    /// Links and their queueing disciplines in the node's network namespace.
    Link,
    /// Netfilter rules there.
    Rule,
    /// cgroups below the node's.
    Cgroup,
    /// Files, folders, FIFOs and sockets below the folders that programs use.
    File,
    /// Listening UNIX sockets without a file.
    AbstractSocket,
    /// Tasks, containers, sandboxes, snapshots and leases that containerd knows.
    Record,
}

/// A state of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    facts: BTreeMap<Kind, BTreeMap<String, usize>>,
}

impl Snapshot {
    /// Takes one.
    ///
    /// # Errors
    /// If the node cannot be looked at.
    pub async fn take(containerd: &Containerd) -> Result<Self> {
        let mut snapshot = Self::default();
        for record in records(containerd).await? {
            snapshot.add(Kind::Record, record);
        }
        network::look(&mut snapshot).await?;
        files::look(&mut snapshot)?;
        processes::look(&mut snapshot, containerd.pid())?;
        Ok(snapshot)
    }

    pub(crate) fn add(&mut self, kind: Kind, fact: String) {
        *self.facts.entry(kind).or_default().entry(fact).or_default() += 1;
    }

    /// How many things of a kind there are.
    #[must_use]
    pub fn count(&self, kind: Kind) -> usize {
        self.facts
            .get(&kind)
            .map_or(0, |facts| facts.values().sum())
    }

    /// What `self` has and `before` had not, and the other way round.
    #[must_use]
    pub fn since(&self, before: &Self) -> Difference {
        let mut difference = Difference::default();
        let kinds: BTreeSet<Kind> = self
            .facts
            .keys()
            .chain(before.facts.keys())
            .copied()
            .collect();
        let none = BTreeMap::new();
        for kind in kinds {
            let now = self.facts.get(&kind).unwrap_or(&none);
            let then = before.facts.get(&kind).unwrap_or(&none);
            let facts: BTreeSet<&String> = now.keys().chain(then.keys()).collect();
            for fact in facts {
                let now = now.get(fact).copied().unwrap_or(0);
                let then = then.get(fact).copied().unwrap_or(0);
                let tolerated = if kind == Kind::Descriptor && fact == processes::SOCKET {
                    SOCKETS_MAY_DIFFER
                } else {
                    0
                };
                // Fewer descriptors than before are no harm: caches come and go.
                if now > then + tolerated {
                    difference.left.push(entry(kind, fact, now, then));
                } else if now < then && kind != Kind::Descriptor {
                    difference.lost.push(entry(kind, fact, now, then));
                }
            }
        }
        difference
    }
}

fn entry(kind: Kind, fact: &str, now: usize, then: usize) -> (Kind, String) {
    if now.max(then) > 1 {
        (kind, format!("{fact} ({now}, before {then})"))
    } else {
        (kind, fact.to_owned())
    }
}

/// What differs between two snapshots.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Difference {
    /// There, and not before: leaks.
    pub left: Vec<(Kind, String)>,
    /// There before, and gone.
    pub lost: Vec<(Kind, String)>,
}

impl Difference {
    /// True if nothing differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.left.is_empty() && self.lost.is_empty()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (word, entries) in [("left", &self.left), ("lost", &self.lost)] {
            for (kind, fact) in entries {
                writeln!(f, "  {word} {kind:?}: {fact}")?;
            }
        }
        Ok(())
    }
}

/// Waits until two snapshots in a row are the same, and gives the last: to
/// compare with, after pods have come and gone.
///
/// # Errors
/// If the node does not come to rest within `within`; the error lists what
/// differed last.
pub async fn settled(containerd: &Containerd, within: Duration) -> Result<Snapshot> {
    let by = Instant::now() + within;
    containerd.collect_garbage().await?;
    let mut before = Snapshot::take(containerd).await?;
    loop {
        let now = Snapshot::take(containerd).await?;
        let difference = now.since(&before);
        if difference.is_empty() {
            return Ok(now);
        }
        if Instant::now() >= by {
            bail!("the node does not come to rest within {within:?}:\n{difference}");
        }
        before = now;
    }
}

/// Waits until the node is as it was at `before`.
///
/// # Errors
/// If it is not after `within`; the error lists what differs.
pub async fn assert_clean(
    containerd: &Containerd,
    before: &Snapshot,
    within: Duration,
) -> Result<()> {
    let by = Instant::now() + within;
    containerd.collect_garbage().await?;
    loop {
        let difference = Snapshot::take(containerd).await?.since(before);
        if difference.is_empty() {
            return Ok(());
        }
        if Instant::now() >= by {
            bail!("the node is not as it was, {within:?} later:\n{difference}");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What containerd has written down.
async fn records(containerd: &Containerd) -> Result<Vec<String>> {
    let lists: [(&str, &[&str]); 4] = [
        ("task", &["tasks", "list", "--quiet"]),
        ("container", &["containers", "list", "--quiet"]),
        ("lease", &["leases", "list", "--quiet"]),
        ("snapshot", &["snapshots", "list"]),
    ];
    let mut records = Vec::new();
    for (what, args) in lists {
        for line in containerd.ctr(args).await?.lines() {
            // The list of snapshots has a header, and columns after the name.
            let name = line.split_whitespace().next().unwrap_or_default();
            if !(name.is_empty() || what == "snapshot" && name == "KEY") {
                records.push(format!("{what} {name}"));
            }
        }
    }
    for id in containerd.client().pod_ids(None).await? {
        records.push(format!("sandbox {id}"));
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(facts: &[(Kind, &str)]) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (kind, fact) in facts {
            snapshot.add(*kind, (*fact).to_owned());
        }
        snapshot
    }

    #[test]
    fn what_is_new_is_left_and_what_is_gone_is_lost() {
        let before = snapshot(&[(Kind::Mount, "/a"), (Kind::Link, "cni0")]);
        let after = snapshot(&[(Kind::Mount, "/a"), (Kind::Mount, "/b")]);
        let difference = after.since(&before);
        assert_eq!(difference.left, [(Kind::Mount, "/b".to_owned())]);
        assert_eq!(difference.lost, [(Kind::Link, "cni0".to_owned())]);
        assert!(before.since(&before).is_empty());
    }

    #[test]
    fn a_second_thing_of_the_same_name_is_seen() {
        let before = snapshot(&[(Kind::Mount, "/a")]);
        let after = snapshot(&[(Kind::Mount, "/a"), (Kind::Mount, "/a")]);
        assert_eq!(after.since(&before).left.len(), 1);
    }

    #[test]
    fn only_sockets_of_containerd_are_tolerated_and_only_a_few() {
        let before = snapshot(&[]);
        let few = snapshot(&[(Kind::Descriptor, processes::SOCKET); SOCKETS_MAY_DIFFER]);
        assert!(few.since(&before).is_empty());
        let many = snapshot(&[(Kind::Descriptor, processes::SOCKET); SOCKETS_MAY_DIFFER + 1]);
        assert_eq!(many.since(&before).left.len(), 1);
        let pipe = snapshot(&[(Kind::Descriptor, "pipe:")]);
        assert_eq!(pipe.since(&before).left.len(), 1);
    }
}
