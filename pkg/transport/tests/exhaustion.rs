// SPDX-License-Identifier: Apache-2.0
//! Row L7 when the process runs out of descriptors. The limit is the process's:
//! this test has one of its own.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use podhull_transport::{LeaseSet, VsockListener, metrics};
use podhull_types::{Deadline, VsockPort};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

#[tokio::test]
async fn l7_a_failed_accept_does_not_end_the_loop() {
    let folder = tempfile::tempdir().unwrap();
    let vm = folder.path().join("vm");
    let leases = LeaseSet::new("vm");
    let listener = VsockListener::bind_hybrid(&vm, VsockPort::READY, leases.clone()).unwrap();
    let mut client = UnixStream::connect(folder.path().join(format!("vm_{}", VsockPort::READY)))
        .await
        .unwrap();
    client.write_all(b"patient").await.unwrap();

    // No descriptor is left: the lowest free number is at the limit.
    let free = File::open("/dev/null").unwrap();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let limit = u64::try_from(free.as_raw_fd()).unwrap();
    drop(free);
    let failed = metrics::ACCEPT_FAILED.get();
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
    let accepting = tokio::spawn(async move { (listener.accept().await, listener) });
    // Twice: it tries again by itself.
    while metrics::ACCEPT_FAILED.get() < failed + 2 && !accepting.is_finished() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(!accepting.is_finished());
    assert!(leases.held().is_empty(), "no lease without a connection");
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();

    let (accepted, listener) = accepting.await.unwrap();
    let transport = accepted.unwrap();
    let mut received = [0; 7];
    let mut io = transport.io().unwrap();
    io.read_exact(&mut received).await.unwrap();
    assert_eq!(&received, b"patient");
    drop(io);
    let by = Deadline::after(Duration::from_secs(5));
    assert!(transport.close(by).await.is_clean());
    assert!(listener.close().is_clean());
    assert!(leases.held().is_empty());
}
