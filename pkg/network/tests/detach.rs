// SPDX-License-Identifier: Apache-2.0
//! What was tied is untied, whenever and by whomever it is asked for.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test"
)]

#[path = "shared/netns.rs"]
mod netns;

use std::env;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use netns::{ETH0, Netns, soon};
use podhull_network::{NetworkError, PodNetwork, sweep};

/// A pod's, and what it looks like.
fn pod() -> Option<(Netns, String)> {
    let script = format!(
        "{ETH0}
         ip address add 10.9.0.2/24 dev eth0
         ip address add fd00:9::2/64 dev eth0 nodad
         ip route add default via 10.9.0.1"
    );
    let netns = Netns::with(&script)?;
    let state = netns.state();
    Some((netns, state))
}

#[tokio::test]
async fn detach_leaves_the_link_as_it_was() {
    let Some((netns, before)) = pod() else { return };
    // Twice: what the first leaves must not be in the second's way.
    for _ in 0..2 {
        let network = PodNetwork::attach(netns.path(), soon()).await.unwrap();
        let loopback = network.listen_on_loopback(soon()).await.unwrap();
        let tied = netns.state();
        for part in [
            "podhull0",
            "qdisc ingress ffff: dev eth0",
            "qdisc ingress ffff: dev podhull0",
            "Egress Redirect to device podhull0",
            "Egress Redirect to device eth0",
            "table inet podhull",
        ] {
            assert!(tied.contains(part), "no {part} in {tied}");
        }
        drop(loopback);
        network.detach(soon()).await.unwrap();
        assert_eq!(netns.state(), before);
    }
    sweep(netns.path(), soon()).await.unwrap();
    assert_eq!(netns.state(), before);
}

#[tokio::test]
async fn detach_takes_what_is_gone_already_for_done() {
    let Some((netns, _)) = pod() else { return };
    let network = PodNetwork::attach(netns.path(), soon()).await.unwrap();
    let _loopback = network.listen_on_loopback(soon()).await.unwrap();
    netns.run("ip link delete eth0");
    network.detach(soon()).await.unwrap();
    let left = netns.state();
    assert!(!left.contains("podhull"), "{left}");

    let Some((netns, _)) = pod() else { return };
    let network = PodNetwork::attach(netns.path(), soon()).await.unwrap();
    let path = netns.path().to_owned();
    drop(netns);
    assert!(!path.exists());
    network.detach(soon()).await.unwrap();
    // A file that stayed where a namespace was mounted.
    let file = tempfile::NamedTempFile::new().unwrap();
    sweep(file.path(), soon()).await.unwrap();
}

/// Which is no namespace that is gone.
#[tokio::test]
async fn a_namespace_that_cannot_be_entered_is_an_error() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let swept = sweep(&file.path().join("below"), soon()).await;
    let error = swept.unwrap_err();
    assert!(matches!(error, NetworkError::Namespace { .. }), "{error}");
}

/// Every state that an attach goes through, left by who died in it: its tap is
/// gone then.
#[tokio::test]
async fn a_sweep_finds_what_an_attach_left_at_any_moment() {
    const QUEUE: &str = "tc qdisc add dev eth0 ingress";
    const FILTER: &str = "
        ip tuntap add podhull0 mode tap
        tc filter add dev eth0 parent ffff: protocol all prio 1 \
          u32 match u32 0 0 action mirred egress redirect dev podhull0
        ip tuntap delete podhull0 mode tap";
    const TABLE: &str = "
        nft add table inet podhull
        nft add chain inet podhull loopback '{ type nat hook output priority -100; }'
        nft add rule inet podhull loopback meta nfproto ipv4 oif lo meta l4proto tcp dnat ip to 127.0.0.1:9";
    let Some((netns, before)) = pod() else { return };
    let states: [&[&str]; 6] = [
        &[],
        &[QUEUE],
        &[QUEUE, FILTER],
        &[QUEUE, FILTER, TABLE],
        &[TABLE],
        &["tc qdisc add dev host ingress", QUEUE],
    ];
    for state in states {
        for part in state {
            netns.run(part);
        }
        let left = netns.state();
        assert_eq!(left == before, state.is_empty(), "{left}");
        for _ in 0..2 {
            sweep(netns.path(), soon()).await.unwrap();
            assert_eq!(netns.state(), before, "after {state:?}");
        }
    }
}

/// The namespace, for the process that is to be killed.
const KILLED: &str = "PODHULL_TEST_NETNS";

/// In the killed process: attaches, says so, and stays.
#[tokio::test]
async fn a_sweep_finds_what_a_killed_process_left() {
    if let Some(netns) = env::var_os(KILLED) {
        let network = PodNetwork::attach(netns.as_ref(), soon()).await.unwrap();
        let _loopback = network.listen_on_loopback(soon()).await.unwrap();
        println!("\nattached");
        std::future::pending::<()>().await;
    }
    let Some((netns, before)) = pod() else { return };
    let mut process = Command::new(env::current_exe().unwrap())
        .args([
            "--exact",
            "a_sweep_finds_what_a_killed_process_left",
            "--nocapture",
        ])
        .env(KILLED, netns.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "attached"));
    assert!(netns.state().contains("podhull0: "));
    process.kill().unwrap();
    process.wait().unwrap();
    let left = netns.state();
    assert!(!left.contains("podhull0: "), "the tap stayed: {left}");
    assert!(left.contains("qdisc ingress ffff: dev eth0"), "{left}");
    assert!(left.contains("table inet podhull"), "{left}");
    sweep(netns.path(), soon()).await.unwrap();
    assert_eq!(netns.state(), before);
}

/// At every step that can be made to fail.
#[tokio::test]
async fn an_attach_that_fails_leaves_nothing() {
    for (in_the_way, refused) in [
        // Somebody else has the tap's name.
        ("ip link add podhull0 type bridge", "make the tap"),
        // What somebody else put there would go with ours.
        ("tc qdisc add dev eth0 ingress", "add ingress queue"),
        ("tc qdisc add dev eth0 clsact", "add ingress queue"),
    ] {
        let Some((netns, _)) = pod() else { return };
        netns.run(in_the_way);
        let before = netns.state();
        let error = PodNetwork::attach(netns.path(), soon()).await.unwrap_err();
        assert!(error.to_string().contains(refused), "{error}");
        assert_eq!(netns.state(), before, "{in_the_way}");
    }
}

/// The descriptor that the VMM has keeps the tap, which is no way out of the
/// pod's network any more.
#[tokio::test]
async fn detach_unties_a_tap_that_somebody_still_has() {
    let Some((netns, before)) = pod() else { return };
    let network = PodNetwork::attach(netns.path(), soon()).await.unwrap();
    let kept = network.tap().unwrap();
    network.detach(soon()).await.unwrap();
    let left = netns.state();
    assert!(left.contains("podhull0: "), "{left}");
    assert!(!left.contains("ingress"), "{left}");
    drop(kept);
    assert_eq!(netns.state(), before);
}
