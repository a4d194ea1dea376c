// SPDX-License-Identifier: Apache-2.0
//! What CNIs leave in a pod's namespace, and what the guest is told of it.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test"
)]

#[path = "shared/netns.rs"]
mod netns;

use netns::{ETH0, Netns, soon};
use podhull_network::{GuestNetwork, NetworkError, PodNetwork, Route};

/// A second link.
const NET1: &str = "ip link add net1 type veth peer name host1
    ip link set net1 addrgenmode none; ip link set host1 addrgenmode none
    ip link set net1 up; ip link set host1 up";

/// What the guest is told of what `script` does to `eth0`.
async fn told(script: &str) -> Option<Result<GuestNetwork, NetworkError>> {
    let netns = Netns::with(&format!("{ETH0}{script}"))?;
    let before = netns.state();
    let attached = PodNetwork::attach(netns.path(), soon()).await;
    let told = match attached {
        Ok(network) => {
            let told = network.guest().clone();
            network.detach(soon()).await.unwrap();
            Ok(told)
        }
        Err(error) => Err(error),
    };
    assert_eq!(netns.state(), before);
    Some(told)
}

/// As `ip route` shows them.
fn shown(routes: &[Route]) -> Vec<String> {
    let mut lines: Vec<_> = routes.iter().map(line).collect();
    lines.sort();
    lines
}

fn line(route: &Route) -> String {
    let default = format!("default{}", route.family);
    let mut line = if route.destination.is_empty() {
        default
    } else {
        route.destination.clone()
    };
    for (name, value) in [("via", &route.gateway), ("src", &route.source)] {
        if !value.is_empty() {
            line += &format!(" {name} {value}");
        }
    }
    if route.metric != 0 {
        line += &format!(" metric {}", route.metric);
    }
    // RT_SCOPE_LINK
    if route.scope == 253 {
        line += " link";
    }
    if route.onlink {
        line += " onlink";
    }
    line
}

/// The guest's one interface with its addresses, and its routes.
fn check(told: &GuestNetwork, addresses: &[&str], routes: &[&str]) {
    let [eth0] = &told.interfaces[..] else {
        panic!("{told:?}");
    };
    assert_eq!(eth0.name, "eth0");
    assert_eq!(eth0.mac, [2, 0, 0, 0, 0, 5]);
    assert_eq!(eth0.addresses, addresses);
    assert!(told.routes.iter().all(|route| route.interface == "eth0"));
    assert_eq!(shown(&told.routes), routes);
}

macro_rules! told {
    ($script:expr) => {
        match told($script).await {
            Some(told) => told,
            None => return,
        }
    };
}

#[tokio::test]
async fn a_bridges_dual_stack() {
    let told = told!(
        "ip address add 10.9.0.2/24 dev eth0
         ip address add fd00:9::2/64 dev eth0 nodad
         ip route add default via 10.9.0.1
         ip -6 route add default via fd00:9::1"
    );
    check(
        &told.unwrap(),
        &["10.9.0.2/24", "fd00:9::2/64"],
        &[
            "10.9.0.0/24 src 10.9.0.2 link",
            "default4 via 10.9.0.1",
            "default6 via fd00:9::1 metric 1024",
            "fd00:9::/64 metric 256",
        ],
    );
}

/// The gateway answers for everybody, by a neighbour that is given.
#[tokio::test]
async fn a_point_to_point_link_with_a_gateway_that_no_prefix_holds() {
    let told = told!(
        "ip address add 10.9.0.2/32 dev eth0
         ip address add fd00:9::2/128 dev eth0 nodad
         ip route add 169.254.1.1 dev eth0 scope link
         ip route add default via 169.254.1.1
         ip route add 192.0.2.0/24 via 169.254.7.7 dev eth0 onlink
         ip -6 route add default via fe80::1 dev eth0
         ip neighbour add 169.254.1.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent
         ip neighbour add 10.9.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud stale"
    );
    let told = told.unwrap();
    check(
        &told,
        &["10.9.0.2/32", "fd00:9::2/128"],
        &[
            "169.254.1.1/32 link",
            "192.0.2.0/24 via 169.254.7.7 onlink",
            "default4 via 169.254.1.1",
            "default6 via fe80::1 metric 1024",
            "fd00:9::2/128 metric 256",
        ],
    );
    let [neighbour] = &told.neighbours[..] else {
        panic!("{told:?}");
    };
    assert_eq!(neighbour.address, "169.254.1.1");
    assert_eq!(neighbour.mac, [2, 0, 0, 0, 0, 1]);
}

/// The address of the other end is not the pod's.
#[tokio::test]
async fn an_address_with_a_peer() {
    let told = told!(
        "ip address add 10.9.0.2 peer 10.9.0.1/32 dev eth0
         ip route add default via 10.9.0.1"
    );
    check(
        &told.unwrap(),
        &["10.9.0.2/32"],
        &["10.9.0.1/32 src 10.9.0.2 link", "default4 via 10.9.0.1"],
    );
}

/// As the plugin ptp does, so that everything goes by the gateway.
#[tokio::test]
async fn a_prefix_that_is_not_on_the_link() {
    let told = told!(
        "ip address add 10.9.0.2/24 dev eth0
         ip address add fd00:9::2/64 dev eth0 nodad
         ip route delete 10.9.0.0/24 dev eth0
         ip -6 route delete fd00:9::/64 dev eth0
         ip route add 10.9.0.1 dev eth0 scope link src 10.9.0.2
         ip route add 10.9.0.0/24 via 10.9.0.1 src 10.9.0.2
         ip -6 route add fd00:9::1 dev eth0
         ip -6 route add fd00:9::/64 via fd00:9::1"
    );
    check(
        &told.unwrap(),
        &["10.9.0.2/24", "fd00:9::2/64"],
        &[
            "10.9.0.0/24 via 10.9.0.1 src 10.9.0.2",
            "10.9.0.1/32 src 10.9.0.2 link",
            "fd00:9::/64 via fd00:9::1 metric 1024",
            "fd00:9::1/128 metric 1024",
        ],
    );
}

#[tokio::test]
async fn several_addresses_stay_in_their_order() {
    let told = told!(
        "ip address add 10.9.0.2/24 dev eth0
         ip address add 10.9.0.3/24 dev eth0
         ip address add 192.0.2.5/28 dev eth0"
    );
    check(
        &told.unwrap(),
        &["10.9.0.2/24", "192.0.2.5/28", "10.9.0.3/24"],
        &[
            "10.9.0.0/24 src 10.9.0.2 link",
            "192.0.2.0/28 src 192.0.2.5 link",
        ],
    );
}

#[tokio::test]
async fn ipv6_alone() {
    let told = told!(
        "ip address add fd00:9::2/64 dev eth0 nodad
         ip -6 route add default via fd00:9::1"
    );
    check(
        &told.unwrap(),
        &["fd00:9::2/64"],
        &[
            "default6 via fd00:9::1 metric 1024",
            "fd00:9::/64 metric 256",
        ],
    );
}

#[tokio::test]
async fn no_gateway() {
    let told = told!("ip address add 10.9.0.2/24 dev eth0");
    check(
        &told.unwrap(),
        &["10.9.0.2/24"],
        &["10.9.0.0/24 src 10.9.0.2 link"],
    );
}

/// What is not a route of the pod's traffic, or not through its interface, is
/// none of the guest's.
#[tokio::test]
async fn further_routes() {
    let told = told!(
        "ip address add 10.9.0.2/24 dev eth0
         ip route add default via 10.9.0.1 metric 100
         ip route add 192.0.2.0/24 via 10.9.0.9 src 10.9.0.2
         ip route add 198.51.100.0/24 dev eth0
         ip route add 203.0.113.0/24 dev lo
         ip route add 203.0.113.64/26 via 10.9.0.9 table 7
         ip route add blackhole 203.0.113.128/26"
    );
    check(
        &told.unwrap(),
        &["10.9.0.2/24"],
        &[
            "10.9.0.0/24 src 10.9.0.2 link",
            "192.0.2.0/24 via 10.9.0.9 src 10.9.0.2",
            "198.51.100.0/24 link",
            "default4 via 10.9.0.1 metric 100",
        ],
    );
}

/// The tap has it, too: what does not fit must not come as far as the guest.
#[tokio::test]
async fn a_smaller_mtu_is_the_taps_and_the_guests() {
    let script = format!("{ETH0} ip address add 10.9.0.2/24 dev eth0; ip link set eth0 mtu 1400");
    let Some(netns) = Netns::with(&script) else {
        return;
    };
    let network = PodNetwork::attach(netns.path(), soon()).await.unwrap();
    let mtus: Vec<_> = network
        .guest()
        .interfaces
        .iter()
        .map(|one| one.mtu)
        .collect();
    assert_eq!(mtus, [1400]);
    let tap = netns.run("ip link show podhull0");
    assert!(tap.contains("mtu 1400"), "{tap}");
    network.detach(soon()).await.unwrap();
}

/// A VM has one interface. A second one that the CNI gave would be missing in
/// the guest: it is refused by its name.
#[tokio::test]
async fn several_interfaces_are_refused_by_name() {
    let second =
        format!("{NET1}; ip address add 10.9.0.2/24 dev eth0; ip address add 10.8.0.2/24 dev net1");
    let not_ethernet = "ip tuntap add tun0 mode tun; ip address add 10.8.0.2/24 dev tun0";
    for (script, names) in [(&*second, "eth0, net1"), (not_ethernet, "tun0")] {
        let error = told!(script).unwrap_err();
        assert!(
            matches!(&error, NetworkError::Interfaces { found, .. } if found == names),
            "{error}"
        );
        assert!(error.to_string().contains(names), "{error}");
    }
}

/// Without an address they are none of the pod's.
#[tokio::test]
async fn interfaces_without_an_address_are_left_alone() {
    let told = told!(&format!("{NET1}; ip address add 10.9.0.2/24 dev eth0"));
    check(
        &told.unwrap(),
        &["10.9.0.2/24"],
        &["10.9.0.0/24 src 10.9.0.2 link"],
    );
    let told = told!("ip link set eth0 mtu 1400");
    assert!(
        matches!(told, Err(NetworkError::NoInterface(_))),
        "{told:?}"
    );
}
