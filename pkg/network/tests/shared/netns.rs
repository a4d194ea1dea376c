// SPDX-License-Identifier: Apache-2.0
//! A network namespace of a test's own, as a CNI leaves it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use podhull_types::Deadline;

pub(crate) fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

/// The namespace; a thread that waits in it keeps it.
pub(crate) struct Netns {
    path: PathBuf,
    /// Its end ends the thread.
    stays: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Netns {
    /// A namespace in which `script` was run; `None`, which is said, without
    /// the rights for one.
    pub(crate) fn with(script: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP: network namespaces need root");
            return None;
        }
        let (stays, ends) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let thread = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            tell.send(nix::unistd::gettid()).unwrap();
            let ended = ends.recv();
            assert!(ended.is_err(), "nothing is sent");
        });
        let task = told.recv().unwrap();
        let path = format!("/proc/{}/task/{task}/ns/net", std::process::id());
        let netns = Self {
            path: path.into(),
            stays: Some(stays),
            thread: Some(thread),
        };
        netns.run("ip link set lo up");
        netns.run(script);
        // The kernel notes a little later that both ends of a link are up.
        netns.run(
            "timeout 10 sh -c 'while ip link show up | grep -qE NO-CARRIER\\|LOWERLAYERDOWN; do :; done'",
        );
        Some(netns)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What lines of shell write that are run in it.
    pub(crate) fn run(&self, script: &str) -> String {
        let output = Command::new("nsenter")
            .arg(format!("--net={}", self.path.display()))
            .args(["sh", "-euc", script])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}: {text}{errors}");
        text
    }

    /// All that could be changed in it.
    pub(crate) fn state(&self) -> String {
        self.run(
            "ip -d address; ip route show table all; ip -6 route show table all; ip neighbour
             tc qdisc; for link in $(ip -o link | cut -d: -f2 | cut -d@ -f1); do
               tc filter show dev $link ingress; done
             nft list ruleset",
        )
    }
}

impl Drop for Netns {
    /// Ends it, unless something else holds it.
    fn drop(&mut self) {
        drop(self.stays.take());
        if let Some(thread) = self.thread.take() {
            assert!(thread.join().is_ok());
        }
    }
}

/// A CNI's link `eth0`; its other end, which is the node's in real life, is `host`.
/// No address makes itself: what is there is what the test says.
pub(crate) const ETH0: &str = "
    ip link add eth0 address 02:00:00:00:00:05 type veth peer name host
    ip link set eth0 addrgenmode none; ip link set host addrgenmode none
    ip link set eth0 up; ip link set host up
";
