// SPDX-License-Identifier: Apache-2.0
//! Row L9 of the lifetime contract: closing what carries a process's streams
//! ends everybody who waits on them, then closes every handle, and reports the
//! first problem with the others.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use podhull_transport::{
    CloseReport, GuestSession, Holder, HolderKind, HostSession, LeaseSet, Outcome, Peer,
    SessionTarget, VsockTransport, open_session, receive_session,
};
use podhull_types::{Deadline, Token, VsockPort};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn after(milliseconds: u64) -> Deadline {
    Deadline::after(Duration::from_millis(milliseconds))
}

async fn session(leases: &LeaseSet) -> (HostSession, GuestSession) {
    let (host, guest) = UnixStream::pair().unwrap();
    let [host, guest] = [host, guest].map(|end| {
        let holder = Holder::new(HolderKind::Session, "test");
        let lease = leases.issue(holder).unwrap();
        VsockTransport::adopt(end.into(), Peer::Guest(VsockPort::SESSIONS), lease).unwrap()
    });
    let token = Token::from_bytes([5; 32]);
    let target = SessionTarget::Forward { port: 80 };
    let receive = async {
        let incoming = receive_session(guest, &token, after(5000)).await.unwrap();
        incoming.accept(after(5000)).await.unwrap()
    };
    let open = open_session(host, &token, &target, after(5000));
    let (host, guest) = tokio::join!(open, receive);
    (host.unwrap(), guest)
}

/// Everybody who waits is answered before close returns, and nothing that was
/// waiting runs afterwards.
#[tokio::test]
async fn l9_close_ends_every_waiter_and_then_every_handle() {
    let leases = LeaseSet::new("vm");
    let (mut host, guest) = session(&leases).await;
    let mut output = host.output;
    let reader = tokio::spawn(async move { output.read(&mut [0; 16]).await });
    let mut error = host.error;
    let second = tokio::spawn(async move { error.read(&mut [0; 16]).await });
    let writer = tokio::spawn(async move { host.input.write_all(&vec![0; 1 << 20]).await });
    tokio::task::yield_now().await;
    let report = host.handle.close(after(5000)).await;
    assert!(report.is_clean(), "{report}");
    let steps: Vec<_> = report.steps().map(|(step, _)| step).collect();
    assert_eq!(steps, ["session", "transport"], "the streams first");
    for reader in [reader, second] {
        let ended = reader.await.unwrap().unwrap_err();
        assert_eq!(ended.kind(), ErrorKind::ConnectionReset);
    }
    let cut = writer.await.unwrap().unwrap_err();
    assert_eq!(cut.kind(), ErrorKind::BrokenPipe);
    assert_eq!(leases.held().len(), 1, "the guest's end is left");
    assert!(guest.handle.close(after(5000)).await.is_clean());
    assert!(leases.held().is_empty());
}

/// The streams' step fails: the transport is closed all the same, in time, and
/// the report names both steps, the first problem first.
#[tokio::test]
async fn l9_a_handle_that_fails_to_close_does_not_keep_the_others() {
    let leases = LeaseSet::new("vm");
    let (host, theirs) = UnixStream::pair().unwrap();
    let lease = leases
        .issue(Holder::new(HolderKind::Session, "test"))
        .unwrap();
    let transport =
        VsockTransport::adopt(host.into(), Peer::Guest(VsockPort::SESSIONS), lease).unwrap();
    theirs.set_nonblocking(true).unwrap();
    // It accepts, and takes nothing more.
    let mut deaf = tokio::net::UnixStream::from_std(theirs).unwrap();
    deaf.write_all(&[2, 0, 0, 0, 0, 0, 0, 0]).await.unwrap();
    let token = Token::from_bytes([5; 32]);
    let target = SessionTarget::Forward { port: 80 };
    let opened = open_session(transport, &token, &target, after(5000)).await;
    let mut host = opened.unwrap();
    // The window is more than the socket takes.
    let flood = tokio::spawn(async move { host.input.write_all(&vec![0; 1 << 20]).await });
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    assert!(!flood.is_finished());
    let report = host.handle.close(after(100)).await;
    let steps: Vec<_> = report.steps().collect();
    assert!(
        matches!(
            steps[..],
            [
                ("session", Outcome::Forced(_)),
                ("transport", Outcome::Clean)
            ]
        ),
        "{report}"
    );
    let (step, outcome) = report.first_problem().unwrap();
    assert_eq!(step, "session");
    assert!(matches!(outcome, Outcome::Forced(why) if !why.is_empty()));
    assert!(flood.await.unwrap().is_err(), "the writer is answered");
    assert!(leases.held().is_empty());
    // Its end, or a reset: what it did not take is gone.
    let end = after(5000).run(deaf.read_to_end(&mut Vec::new())).await;
    assert!(end.is_ok(), "the peer sees that it is over");
}

/// A close whose deadline has passed before it began still closes everything.
#[tokio::test]
async fn l9_no_time_at_all_is_enough_to_close() {
    let leases = LeaseSet::new("vm");
    let (host, guest) = session(&leases).await;
    for handle in [host.handle, guest.handle] {
        let report = handle.close(after(0)).await;
        let (_, last) = report.steps().last().unwrap();
        assert_eq!(*last, Outcome::Clean, "{report}");
    }
    assert!(leases.held().is_empty());
}

#[tokio::test]
async fn l9_a_cancelled_close_leaves_nothing_open() {
    let leases = LeaseSet::new("vm");
    let (mut host, guest) = session(&leases).await;
    let mut output = host.output;
    let closing = tokio::spawn(host.handle.close(after(5000)));
    closing.abort();
    drop(closing.await);
    assert!(output.read(&mut [0]).await.is_err());
    assert!(host.input.write(b"x").await.is_err());
    guest.handle.closed().await;
    // The host said nothing before it went.
    let report = guest.handle.close(after(5000)).await;
    let (step, outcome) = report.first_problem().unwrap();
    assert_eq!(step, "session");
    assert!(matches!(outcome, Outcome::Failed(_)), "{report}");
    // Aborted tasks let go at their next turn.
    assert_eq!(leases.drained(after(5000)).await, Ok(()));
}

#[test]
fn l9_a_report_says_the_first_problem_and_keeps_the_others() {
    let failed = |why: &str| Outcome::Failed(why.into());
    let mut report = CloseReport::of("stdin", Outcome::Clean);
    report.push("stdout", failed("no space"));
    report.extend(CloseReport::of("stderr", failed("gone")));
    report.push("transport", Outcome::Clean);
    assert!(!report.is_clean());
    assert_eq!(
        report.first_problem(),
        Some(("stdout", &failed("no space")))
    );
    assert_eq!(
        report.to_string(),
        "stdin: clean, stdout: failed (no space), stderr: failed (gone), transport: clean"
    );
}
