// SPDX-License-Identifier: Apache-2.0
//! Rows L1–L3 of the lifetime contract, on socket pairs.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use podhull_transport::{
    Holder, HolderKind, LeaseSet, Outcome, Peer, TransportError, VsockTransport, metrics,
};
use podhull_types::{Deadline, VsockPort};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn adopted(leases: &LeaseSet) -> (VsockTransport, tokio::net::UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let lease = leases
        .issue(Holder::new(HolderKind::Session, "test"))
        .unwrap();
    let transport =
        VsockTransport::adopt(ours.into(), Peer::Guest(VsockPort::SESSIONS), lease).unwrap();
    theirs.set_nonblocking(true).unwrap();
    (transport, tokio::net::UnixStream::from_std(theirs).unwrap())
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(5))
}

fn open_sockets() -> usize {
    fs::read_dir("/proc/self/fd")
        .unwrap()
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .filter(|target| target.to_string_lossy().starts_with("socket:"))
        .count()
}

#[tokio::test]
async fn l1_descriptor_and_lease_go_together() {
    let leases = LeaseSet::new("vm");
    let (transport, mut peer) = adopted(&leases);
    assert_eq!(leases.held().len(), 1);
    assert!(transport.close(soon()).await.is_clean());
    assert!(leases.held().is_empty());
    assert_eq!(
        peer.read(&mut [0]).await.unwrap(),
        0,
        "the peer sees the end"
    );
}

#[tokio::test]
async fn l1_a_view_keeps_descriptor_and_vm_after_close() {
    let leases = LeaseSet::new("vm");
    let (transport, mut peer) = adopted(&leases);
    let mut io = transport.io().unwrap();
    let report = transport
        .close(Deadline::after(Duration::from_millis(20)))
        .await;
    assert!(
        matches!(report.first_problem(), Some((_, Outcome::Forced(_)))),
        "{report}"
    );
    assert_eq!(leases.held().len(), 1, "the VM is still held");
    let error = io.write_all(b"x").await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted);
    drop(io);
    assert!(leases.held().is_empty());
    assert_eq!(
        peer.read(&mut [0]).await.unwrap(),
        0,
        "closed with the view"
    );
}

#[tokio::test]
async fn l2_a_duplicate_works_after_its_original_closed() {
    let leases = LeaseSet::new("vm");
    let (transport, mut peer) = adopted(&leases);
    let duplicate = transport.try_dup().unwrap();
    assert_eq!(leases.held().len(), 2);
    assert!(transport.close(soon()).await.is_clean());
    let mut io = duplicate.io().unwrap();
    io.write_all(b"ping").await.unwrap();
    let mut received = [0; 4];
    peer.read_exact(&mut received).await.unwrap();
    assert_eq!(&received, b"ping");
    peer.write_all(b"pong").await.unwrap();
    io.read_exact(&mut received).await.unwrap();
    assert_eq!(&received, b"pong");
    drop(io);
    assert!(duplicate.close(soon()).await.is_clean());
    assert!(leases.held().is_empty());
}

#[tokio::test]
async fn l2_descriptors_are_not_inherited_by_children() {
    let leases = LeaseSet::new("vm");
    let (transport, _peer) = adopted(&leases);
    let duplicate = transport.try_dup().unwrap();
    let listing = std::process::Command::new("ls")
        .args(["-l", "/proc/self/fd"])
        .output()
        .unwrap();
    let listing = String::from_utf8(listing.stdout).unwrap();
    let sockets = listing
        .lines()
        .filter(|line| line.contains("socket:"))
        .count();
    assert_eq!(sockets, 0, "{listing}");
    assert!(duplicate.close(soon()).await.is_clean());
    assert!(transport.close(soon()).await.is_clean());
}

#[tokio::test]
async fn l3_only_one_view_at_a_time() {
    let leases = LeaseSet::new("vm");
    let (transport, _peer) = adopted(&leases);
    let view = transport.io().unwrap();
    assert!(matches!(
        transport.io(),
        Err(TransportError::NotUsable { state: "in use" })
    ));
    drop(view);
    drop(transport.io().unwrap());
    assert!(transport.close(soon()).await.is_clean());
}

#[tokio::test]
async fn l3_close_wakes_a_blocked_reader() {
    let leases = LeaseSet::new("vm");
    let (transport, _peer) = adopted(&leases);
    let mut io = transport.io().unwrap();
    let reader = tokio::spawn(async move { io.read(&mut [0]).await });
    tokio::task::yield_now().await;
    let report = transport.close(soon()).await;
    assert!(report.is_clean(), "{report}");
    let error = reader.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted);
    assert!(leases.held().is_empty());
}

#[tokio::test]
async fn l3_close_wakes_a_blocked_writer() {
    let leases = LeaseSet::new("vm");
    let (transport, _peer) = adopted(&leases);
    let mut io = transport.io().unwrap();
    let writer = tokio::spawn(async move { io.write_all(&vec![0; 16 << 20]).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(transport.close(soon()).await.is_clean());
    assert!(writer.await.unwrap().is_err());
}

#[tokio::test]
async fn l3_drop_without_close_is_counted_and_closes() {
    let leases = LeaseSet::new("vm");
    let (transport, mut peer) = adopted(&leases);
    let before = metrics::DROPPED_UNCLOSED.get();
    drop(transport);
    // Other tests of this process may add to it, never take away.
    assert!(metrics::DROPPED_UNCLOSED.get() > before);
    assert!(leases.held().is_empty());
    assert_eq!(peer.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_write_is_at_most_16_kib() {
    let leases = LeaseSet::new("vm");
    let (transport, _peer) = adopted(&leases);
    let mut io = transport.io().unwrap();
    assert_eq!(io.write(&vec![0; 1 << 20]).await.unwrap(), 16 * 1024);
    drop(io);
    assert!(transport.close(soon()).await.is_clean());
}

/// Opens and closes descriptors beside a transport in use: if one of ours were
/// closed twice, a stranger's file would take its number and its bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l2_descriptor_numbers_are_never_taken_over() {
    let storm = tokio::task::spawn_blocking(|| {
        for _ in 0..20_000 {
            drop(fs::File::open("/dev/zero").unwrap());
        }
    });
    let leases = LeaseSet::new("vm");
    let before = open_sockets();
    for round in 0..200u32 {
        let (transport, mut peer) = adopted(&leases);
        let duplicate = transport.try_dup().unwrap();
        let _ = transport.close(soon()).await;
        let mut io = duplicate.io().unwrap();
        peer.write_u32(round).await.unwrap();
        assert_eq!(io.read_u32().await.unwrap(), round);
        drop(io);
        assert!(duplicate.close(soon()).await.is_clean());
        assert_eq!(peer.read(&mut [0]).await.unwrap(), 0);
    }
    storm.await.unwrap();
    assert!(leases.held().is_empty());
    // The other tests of this binary hold a few sockets at a time.
    assert!(open_sockets() < before + 100);
}
