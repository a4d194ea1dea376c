// SPDX-License-Identifier: Apache-2.0
//! What the leak oracle counted before, during and after the pod.

use podhull_testkit::oracle::{Kind, Snapshot};

/// The kinds that are shown; the oracle compares more.
const SHOWN: [(Kind, &str); 6] = [
    (Kind::Process, "processes"),
    (Kind::Mount, "mounts"),
    (Kind::Link, "links and qdiscs"),
    (Kind::Rule, "netfilter rules"),
    (Kind::Cgroup, "cgroups"),
    (Kind::File, "files and folders"),
];

/// A line per kind, under a head.
pub(crate) fn table(snapshots: [&Snapshot; 3]) -> Vec<String> {
    let [before, during, after] = ["before", "with the pod", "after"];
    let mut lines = vec![format!("{:<18}{before:>8}{during:>14}{after:>8}", "")];
    for (kind, name) in SHOWN {
        let [before, during, after] = snapshots.map(|snapshot| snapshot.count(kind));
        lines.push(format!("{name:<18}{before:>8}{during:>14}{after:>8}"));
    }
    lines
}
