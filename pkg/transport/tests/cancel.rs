// SPDX-License-Identifier: Apache-2.0
//! A session whose opening is given up half-way, as when containerd's client goes
//! away or a pod stops: nothing of it stays. Alone in its process, where what is
//! open can be counted.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::os::unix::net;
use std::time::Duration;

use podhull_transport::metrics::{DROPPED_UNCLOSED, OPEN};
use podhull_transport::{
    GuestAddress, HeldLease, Holder, HolderKind, Lease, LeaseSet, Peer, SessionTarget,
    VsockTransport, open_session,
};
use podhull_types::{Deadline, Token, VsockPort};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn lease(leases: &LeaseSet) -> Lease {
    let holder = Holder::new(HolderKind::Session, "dial");
    leases.issue(holder).unwrap()
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// As `open_session` and its dial are used: in a task that ends with its caller.
fn open(leases: &LeaseSet, address: &GuestAddress) -> JoinHandle<()> {
    let (lease, address) = (lease(leases), address.clone());
    tokio::spawn(async move {
        let transport = address.dial(VsockPort::SESSIONS, lease, soon()).await;
        let token = Token::from_bytes([5; Token::LEN]);
        let target = SessionTarget::Forward { port: 80 };
        let opened = open_session(transport.unwrap(), &token, &target, soon()).await;
        unreachable!("nobody accepts it: {opened:?}");
    })
}

/// How far a guest lets the opening come.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    Dial,
    Hello,
    HalfOfAccept,
}

async fn reach(stage: Stage, daemon: &UnixListener) -> UnixStream {
    let (mut guest, _) = daemon.accept().await.unwrap();
    guest.read_exact(&mut [0; 13]).await.unwrap();
    if stage != Stage::Dial {
        guest.write_all(b"OK 1\n").await.unwrap();
        guest.read_exact(&mut [0; 45]).await.unwrap();
    }
    if stage == Stage::HalfOfAccept {
        guest.write_all(&[2, 0, 0, 0]).await.unwrap();
    }
    guest
}

fn names(held: &[HeldLease]) -> Vec<String> {
    held.iter().map(|held| held.holder.to_string()).collect()
}

#[tokio::test]
async fn l3_an_opening_that_is_given_up_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("vm");
    let daemon = UnixListener::bind(&socket).unwrap();
    let address = GuestAddress::Hybrid { socket };
    let leases = LeaseSet::new("vm");
    let before = (descriptors(), OPEN.get());
    for stage in [Stage::Dial, Stage::Hello, Stage::HalfOfAccept] {
        let opening = open(&leases, &address);
        let mut guest = soon().run(reach(stage, &daemon)).await.unwrap();
        let holder = if stage == Stage::Dial {
            "dial"
        } else {
            "port 80"
        };
        assert_eq!(names(&leases.held()), [format!("session {holder}")]);
        opening.abort();
        assert!(opening.await.unwrap_err().is_cancelled());
        assert_eq!(leases.held(), [], "{stage:?}");
        // A reset, if it was given what it had not read yet.
        let end = soon().run(guest.read(&mut [0])).await;
        assert!(
            matches!(end, Ok(Ok(0) | Err(_))),
            "{stage:?}: it is still connected"
        );
        drop(guest);
        assert_eq!((descriptors(), OPEN.get()), before, "{stage:?}");
    }
    // Nobody had it yet, so nobody forgot to close it.
    assert_eq!(DROPPED_UNCLOSED.get(), 0);
    // Of one that somebody had, that is said.
    let (ours, _theirs) = net::UnixStream::pair().unwrap();
    let peer = Peer::Guest(VsockPort::SESSIONS);
    drop(VsockTransport::adopt(ours.into(), peer, lease(&leases)).unwrap());
    assert_eq!(DROPPED_UNCLOSED.get(), 1);
    assert_eq!(leases.held(), []);
}
