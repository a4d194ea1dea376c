// SPDX-License-Identifier: Apache-2.0
//! The session protocol, both ends on a socket pair.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use podhull_transport::{
    GuestSession, Holder, HolderKind, HostSession, LeaseSet, Peer, SessionError, SessionTarget,
    VsockTransport, open_session, receive_session,
};
use podhull_types::{ContainerId, Deadline, ExecId, ProcessRef, Token, VsockPort};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn token() -> Token {
    Token::from_bytes([5; 32])
}

fn target() -> SessionTarget {
    let container = ContainerId::new("c1").unwrap();
    SessionTarget::Process(ProcessRef::exec(container, ExecId::new("e1").unwrap()))
}

fn transports(leases: &LeaseSet) -> (VsockTransport, VsockTransport) {
    let (a, b) = UnixStream::pair().unwrap();
    let adopt = |end: UnixStream| {
        let lease = leases
            .issue(Holder::new(HolderKind::Session, "test"))
            .unwrap();
        VsockTransport::adopt(end.into(), Peer::Guest(VsockPort::SESSIONS), lease).unwrap()
    };
    (adopt(a), adopt(b))
}

async fn session(leases: &LeaseSet) -> (HostSession, GuestSession) {
    let (host, guest) = transports(leases);
    let receive = async {
        let incoming = receive_session(guest, &token(), soon()).await.unwrap();
        assert_eq!(incoming.target(), &target());
        incoming.accept(soon()).await.unwrap()
    };
    let (token, target) = (token(), target());
    let (host, guest) = tokio::join!(open_session(host, &token, &target, soon()), receive);
    (host.unwrap(), guest)
}

/// Bytes that show a loss, a swap or a repetition.
fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| u8::try_from((i * 31 + i / 251) % 256).unwrap())
        .collect()
}

#[tokio::test]
async fn every_byte_arrives_then_the_ends_then_the_exit() {
    let leases = LeaseSet::new("vm");
    let (mut host, mut guest) = session(&leases).await;
    let sent = pattern(3 << 20);
    let process = tokio::spawn({
        let sent = sent.clone();
        async move {
            let mut stdin = Vec::new();
            guest.input.read_to_end(&mut stdin).await.unwrap();
            guest.handle.send_exit(42);
            guest.error.write_all(b"warning").await.unwrap();
            guest.error.shutdown().await.unwrap();
            guest.output.write_all(&sent).await.unwrap();
            guest.output.shutdown().await.unwrap();
            guest.handle.closed().await;
            assert!(guest.handle.close(soon()).await.is_clean());
            stdin
        }
    });
    host.input.write_all(&sent[..700_000]).await.unwrap();
    host.input.shutdown().await.unwrap();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let (a, b) = tokio::join!(
        host.output.read_to_end(&mut out),
        host.error.read_to_end(&mut err)
    );
    assert_eq!((a.unwrap(), b.unwrap()), (sent.len(), 7));
    assert!(out == sent && err == b"warning");
    assert_eq!(host.handle.exit().await.unwrap(), 42);
    let report = host.handle.close(soon()).await;
    assert!(report.is_clean(), "{report}");
    assert!(process.await.unwrap() == sent[..700_000]);
    assert!(leases.held().is_empty());
}

#[tokio::test]
async fn a_stalled_stdout_blocks_neither_stderr_nor_stdin() {
    let leases = LeaseSet::new("vm");
    let (mut host, mut guest) = session(&leases).await;
    let flood = tokio::spawn(async move {
        let result = guest.output.write_all(&vec![1; 8 << 20]).await;
        (result, guest.output)
    });
    for round in 0..1000u32 {
        guest.error.write_u32(round).await.unwrap();
        assert_eq!(host.error.read_u32().await.unwrap(), round);
        host.input.write_u32(round).await.unwrap();
        assert_eq!(guest.input.read_u32().await.unwrap(), round);
    }
    assert!(
        !flood.is_finished(),
        "nobody reads stdout, so its writer waits"
    );
    let mut count = 0;
    let mut buffer = vec![0; 100_000];
    while count < 8 << 20 {
        count += host.output.read(&mut buffer).await.unwrap();
    }
    assert!(flood.await.unwrap().0.is_ok());
    let _ = host.handle.close(soon()).await;
    let _ = guest.handle.close(soon()).await;
}

#[tokio::test]
async fn a_reader_that_goes_away_breaks_the_writers_pipe() {
    let leases = LeaseSet::new("vm");
    let (host, mut guest) = session(&leases).await;
    drop(host.output);
    let error = guest.output.write_all(&vec![0; 4 << 20]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    guest.error.write_all(b"still there").await.unwrap();
    let _ = host.handle.close(soon()).await;
    let _ = guest.handle.close(soon()).await;
}

#[tokio::test]
async fn a_writer_that_goes_away_is_not_taken_for_eof() {
    let leases = LeaseSet::new("vm");
    let (mut host, mut guest) = session(&leases).await;
    guest.output.write_all(b"half").await.unwrap();
    drop(guest.output);
    let mut received = Vec::new();
    let error = host.output.read_to_end(&mut received).await.unwrap_err();
    assert_eq!(
        (error.kind(), &received[..]),
        (ErrorKind::ConnectionAborted, &b"half"[..])
    );
    let _ = host.handle.close(soon()).await;
    let _ = guest.handle.close(soon()).await;
}

#[tokio::test]
async fn a_lost_guest_ends_every_stream_after_what_had_arrived() {
    let leases = LeaseSet::new("vm");
    let (host, guest) = transports(&leases);
    let guest_side = async {
        let incoming = receive_session(guest, &token(), soon()).await.unwrap();
        let mut guest = incoming.accept(soon()).await.unwrap();
        guest.output.write_all(b"last words").await.unwrap();
        guest.output.flush().await.unwrap();
        drop(guest);
    };
    let (token, target) = (token(), target());
    let (host, ()) = tokio::join!(open_session(host, &token, &target, soon()), guest_side);
    let mut host = host.unwrap();
    assert!(matches!(
        host.handle.exit().await,
        Err(SessionError::Lost(_))
    ));
    let mut received = Vec::new();
    let error = host.output.read_to_end(&mut received).await.unwrap_err();
    assert_eq!(
        (error.kind(), &received[..]),
        (ErrorKind::ConnectionReset, &b"last words"[..])
    );
    assert_eq!(
        host.input.write(b"x").await.unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    let _ = host.handle.close(soon()).await;
    assert!(leases.held().is_empty());
}

#[tokio::test]
async fn a_wrong_token_gets_nothing() {
    let leases = LeaseSet::new("vm");
    let (host, guest) = transports(&leases);
    let wrong = Token::from_bytes([6; 32]);
    let (expected, target) = (token(), target());
    let (opened, received) = tokio::join!(
        open_session(host, &wrong, &target, soon()),
        receive_session(guest, &expected, soon())
    );
    assert!(matches!(received.map(drop), Err(SessionError::WrongToken)));
    assert!(matches!(opened.map(drop), Err(SessionError::Lost(_))));
    assert!(leases.held().is_empty());
}

#[tokio::test]
async fn a_refusal_carries_its_reason() {
    let leases = LeaseSet::new("vm");
    let (host, guest) = transports(&leases);
    let refuse = async {
        let incoming = receive_session(guest, &token(), soon()).await.unwrap();
        incoming.refuse("no process c1/e1", soon()).await;
    };
    let (token, target) = (token(), target());
    let (opened, ()) = tokio::join!(open_session(host, &token, &target, soon()), refuse);
    let error = opened.map(drop).unwrap_err();
    assert_eq!(error.to_string(), "session refused: \"no process c1/e1\"");
    assert_eq!(podhull_transport::metrics::REFUSED.get(), 1);
    assert!(leases.held().is_empty());
}

#[tokio::test]
async fn close_meets_its_deadline_with_a_deaf_peer() {
    let leases = LeaseSet::new("vm");
    let (host, guest) = transports(&leases);
    // A peer that accepts and then never reads again.
    let deaf = async {
        let incoming = receive_session(guest, &token(), soon()).await.unwrap();
        incoming.accept(soon()).await.unwrap()
    };
    let (token, target) = (token(), target());
    let (host, mut guest) = tokio::join!(open_session(host, &token, &target, soon()), deaf);
    let host = host.unwrap();
    guest.output.write_all(b"x").await.unwrap();
    let started = std::time::Instant::now();
    let _ = host
        .handle
        .close(Deadline::after(Duration::from_millis(100)))
        .await;
    assert!(started.elapsed() < Duration::from_secs(2));
    let _ = guest.handle.close(soon()).await;
    assert!(leases.held().is_empty());
}
