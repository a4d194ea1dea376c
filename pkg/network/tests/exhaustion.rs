// SPDX-License-Identifier: Apache-2.0
//! Row L7 for forwarded ports, when the process runs out of descriptors. The limit
//! is the process's: this test has one of its own.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test"
)]

#[path = "shared/netns.rs"]
mod netns;

use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use netns::{ETH0, Netns, soon};
use nix::sched::{CloneFlags, setns};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use podhull_network::PodNetwork;
use tokio::io::AsyncReadExt;

const PORT: u16 = 4242;

#[tokio::test]
async fn l7_a_failed_accept_does_not_end_the_pods_loopback() {
    let script = format!("{ETH0} ip address add 10.9.0.2/24 dev eth0");
    let Some(netns) = Netns::with(&script) else {
        return;
    };
    let before = netns.state();
    let network = PodNetwork::attach(netns.path(), soon()).await.unwrap();
    let listener = network.listen_on_loopback(soon()).await.unwrap();
    let inside = File::open(netns.path()).unwrap();
    let client = thread::spawn(move || {
        setns(inside, CloneFlags::CLONE_NEWNET).unwrap();
        let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).unwrap();
        client.write_all(b"patient").unwrap();
        client
    });
    let client = client.join().unwrap();

    // No descriptor is left: the lowest free number is at the limit.
    let free = File::open("/dev/null").unwrap();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let limit = u64::try_from(free.as_raw_fd()).unwrap();
    drop(free);
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
    let mut accepting = Box::pin(listener.accept());
    let early = tokio::time::timeout(Duration::from_millis(300), &mut accepting).await;
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    assert!(early.is_err(), "accepted without a descriptor: {early:?}");

    let (mut stream, port) = soon().run(accepting).await.unwrap().unwrap();
    assert_eq!(port, PORT);
    let mut received = [0; 7];
    stream.read_exact(&mut received).await.unwrap();
    assert_eq!(&received, b"patient");
    drop((client, stream, listener));
    network.detach(soon()).await.unwrap();
    assert_eq!(netns.state(), before);
}
