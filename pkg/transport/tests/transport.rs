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

use storm::{STRANGER, Storm};

#[path = "shared/storm.rs"]
mod storm;

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

/// The seed of this crate was a duplicate that closed what it was made of.
#[tokio::test]
async fn l2_duplicating_never_closes_the_original() {
    let leases = LeaseSet::new("vm");
    let (transport, mut peer) = adopted(&leases);
    let mut io = transport.io().unwrap();
    for _ in 0..3 {
        let duplicate = transport.try_dup().unwrap();
        io.write_all(b"beside").await.unwrap();
        assert!(duplicate.close(soon()).await.is_clean());
        io.write_all(b" after").await.unwrap();
        let mut received = [0; 12];
        peer.read_exact(&mut received).await.unwrap();
        assert_eq!(&received, b"beside after");
    }
    drop(io);
    assert!(transport.close(soon()).await.is_clean());
    assert_eq!(peer.read(&mut [0]).await.unwrap(), 0);
}

/// A child kept a guest's connection open (kata#1950).
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
    assert!(matches!(transport.io(), Err(TransportError::InUse)));
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

/// The counter is the process's: no other test here drops a transport unclosed.
#[tokio::test]
async fn l3_drop_without_close_closes_and_is_counted_and_close_is_not() {
    let leases = LeaseSet::new("vm");
    let before = metrics::DROPPED_UNCLOSED.get();
    let (transport, mut peer) = adopted(&leases);
    drop(transport);
    assert_eq!(metrics::DROPPED_UNCLOSED.get(), before + 1);
    assert!(leases.held().is_empty());
    assert_eq!(peer.read(&mut [0]).await.unwrap(), 0);

    let (transport, _peer) = adopted(&leases);
    let (io, duplicate) = (transport.io().unwrap(), transport.try_dup().unwrap());
    let closing = transport.close(Deadline::after(Duration::ZERO));
    assert!(!closing.await.is_clean());
    drop(io);
    assert!(duplicate.close(soon()).await.is_clean());
    assert_eq!(metrics::DROPPED_UNCLOSED.get(), before + 1);
}

/// A cancelled close goes on as a drop: nothing stays.
#[tokio::test]
async fn l3_a_cancelled_close_still_closes() {
    let leases = LeaseSet::new("vm");
    let (transport, mut peer) = adopted(&leases);
    let io = transport.io().unwrap();
    let closing = tokio::spawn(transport.close(soon()));
    tokio::task::yield_now().await;
    closing.abort();
    assert!(closing.await.unwrap_err().is_cancelled());
    drop(io);
    assert!(leases.held().is_empty());
    assert_eq!(peer.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn l3_the_peers_end_is_read_and_closing_after_it_is_clean() {
    let leases = LeaseSet::new("vm");
    let (transport, mut peer) = adopted(&leases);
    peer.write_all(b"last").await.unwrap();
    drop(peer);
    let mut received = Vec::new();
    let mut io = transport.io().unwrap();
    io.read_to_end(&mut received).await.unwrap();
    assert_eq!(received, b"last");
    drop(io);
    assert!(transport.close(soon()).await.is_clean());
    assert!(leases.held().is_empty());
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

/// A second close hits whoever has the number by then (kata#4752).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l2_descriptor_numbers_are_never_taken_over() {
    let storm = Storm::new();
    let leases = LeaseSet::new("vm");
    let before = open_sockets();
    for round in 0..300u16 {
        let round = u8::try_from(round % u16::from(STRANGER)).unwrap();
        let (transport, mut peer) = adopted(&leases);
        let duplicate = transport.try_dup().unwrap();
        // Closed while it is read: the reader must not find a stranger's file.
        let mut io = transport.io().unwrap();
        let reader = tokio::spawn(async move { io.read(&mut [0; 16]).await });
        tokio::task::yield_now().await;
        assert!(transport.close(soon()).await.is_clean());
        assert!(reader.await.unwrap().is_err());
        let mut io = duplicate.io().unwrap();
        peer.write_all(&[round; 16]).await.unwrap();
        let mut received = [0; 16];
        io.read_exact(&mut received).await.unwrap();
        assert_eq!(received, [round; 16]);
        drop(io);
        assert!(duplicate.close(soon()).await.is_clean());
        assert_eq!(peer.read(&mut [0]).await.unwrap(), 0);
    }
    storm.end();
    assert!(leases.held().is_empty());
    // The other tests of this binary hold a few sockets at a time.
    assert!(open_sockets() < before + 100);
}
