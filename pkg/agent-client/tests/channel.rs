// SPDX-License-Identifier: Apache-2.0
//! Rows L4–L6 of the lifetime contract, against a gRPC server on a socket pair.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::future::pending;
use std::os::unix::net;
use std::time::{Duration, Instant};

use podhull_agent_client::{AgentChannel, AgentError, wait_for_agent};
use podhull_api::agent::PingRequest;
use podhull_transport::metrics::{DROPPED_UNCLOSED, FOREIGN_READY};
use podhull_transport::{
    CloseReport, GuestTimes, Holder, HolderKind, LeaseSet, Outcome, Peer, VsockListener,
    VsockTransport, announce,
};
use podhull_types::{Deadline, Token, VsockPort};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tonic::service::Routes;

use calls::{first_call_after, is_answer, ping};

#[path = "shared/calls.rs"]
mod calls;

fn after(milliseconds: u64) -> Deadline {
    Deadline::after(Duration::from_millis(milliseconds))
}

fn pair(leases: &LeaseSet) -> (VsockTransport, UnixStream) {
    let (ours, theirs) = net::UnixStream::pair().unwrap();
    let lease = leases
        .issue(Holder::new(HolderKind::Control, "test"))
        .unwrap();
    let transport =
        VsockTransport::adopt(ours.into(), Peer::Guest(VsockPort::READY), lease).unwrap();
    theirs.set_nonblocking(true).unwrap();
    (transport, UnixStream::from_std(theirs).unwrap())
}

/// A channel, and the other end of its connection.
async fn established(leases: &LeaseSet) -> (AgentChannel, UnixStream) {
    let (transport, peer) = pair(leases);
    let channel = AgentChannel::establish(transport, after(5000)).await;
    (channel.unwrap(), peer)
}

/// A gRPC server that knows no method: its answers still show a living channel.
fn serve(stream: UnixStream) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let once = futures::stream::iter([Ok::<_, std::io::Error>(stream)]);
        let server = tonic::transport::Server::builder().add_routes(Routes::default());
        server.serve_with_incoming(once).await.unwrap();
    })
}

fn step(report: &CloseReport, name: &str) -> Outcome {
    report
        .steps()
        .find(|(step, _)| *step == name)
        .unwrap()
        .1
        .clone()
}

/// A channel as a boot makes it: the agent dials, announces itself, and serves
/// gRPC on that same connection.
async fn ready(leases: &LeaseSet) -> (AgentChannel, tokio::task::JoinHandle<()>) {
    let folder = tempfile::tempdir().unwrap();
    let vm = folder.path().join("vm");
    let listener = VsockListener::bind_hybrid(&vm, VsockPort::READY, leases.clone()).unwrap();
    let socket = folder.path().join(format!("vm_{}", VsockPort::READY));
    let agent = async {
        let stream = UnixStream::connect(&socket).await.unwrap();
        let copy = stream.into_std().unwrap();
        let served = copy.try_clone().unwrap();
        let lease = LeaseSet::new("guest")
            .issue(Holder::new(HolderKind::Control, "agent"))
            .unwrap();
        let peer = Peer::Host(VsockPort::READY);
        let transport = VsockTransport::adopt(copy.into(), peer, lease).unwrap();
        let times = GuestTimes {
            kernel_to_agent: Duration::from_millis(400),
            agent_to_ready: Duration::from_millis(9),
        };
        announce(&transport, times, after(5000)).await.unwrap();
        assert!(transport.close(after(1000)).await.is_clean());
        UnixStream::from_std(served).unwrap()
    };
    let token = Token::from_bytes([3; Token::LEN]);
    let (connected, served) = tokio::join!(
        wait_for_agent(&listener, &token, after(5000), pending()),
        agent
    );
    assert!(listener.close().is_clean());
    (connected.unwrap().channel, serve(served))
}

/// Ten in a row, with 100 ms between the connection and its first call.
#[tokio::test]
async fn l5_the_first_call_may_come_late() {
    let leases = LeaseSet::new("vm");
    for _ in 0..10 {
        let (channel, server) = ready(&leases).await;
        first_call_after(Duration::from_millis(100), channel).await;
        server.await.unwrap();
    }
    assert!(leases.held().is_empty());
}

/// 30 s pass between the connection and its first call, on the clock that gRPC
/// sees.
#[tokio::test]
async fn l5_the_first_call_may_come_after_30_s() {
    let leases = LeaseSet::new("vm");
    let (channel, server) = ready(&leases).await;
    tokio::time::pause();
    tokio::time::sleep(Duration::from_secs(30)).await;
    tokio::time::resume();
    assert!(is_answer(&ping(&channel, after(5000)).await));
    assert!(channel.close(after(5000)).await.is_clean());
    server.await.unwrap();
    assert!(leases.held().is_empty());
}

#[tokio::test]
async fn l5_a_vm_that_is_gone_is_an_error_at_once() {
    let leases = LeaseSet::new("vm");
    let (channel, peer) = established(&leases).await;
    drop(peer);
    for _ in 0..3 {
        let began = Instant::now();
        let error = ping(&channel, after(5000)).await.unwrap_err();
        assert!(
            matches!(error, AgentError::VmGone { method: "Ping" }),
            "{error:?}"
        );
        assert!(began.elapsed() < Duration::from_secs(1));
    }
    let _ = channel.close(after(5000)).await;
    assert!(leases.held().is_empty());
}

#[tokio::test]
async fn l4_a_hanging_grpc_shutdown_still_closes_the_transport() {
    let leases = LeaseSet::new("vm");
    // The peer accepts bytes and never answers.
    let (channel, mut deaf) = established(&leases).await;
    let mut client = channel.client().unwrap();
    let pending = tokio::spawn(async move { client.ping(PingRequest::default()).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let report = channel.close(after(100)).await;
    assert!(
        matches!(step(&report, "grpc"), Outcome::Forced(_)),
        "{report}"
    );
    assert_eq!(step(&report, "transport"), Outcome::Clean, "{report}");
    assert!(leases.held().is_empty());
    assert!(pending.await.unwrap().is_err(), "the waiter is answered");
    let mut rest = Vec::new();
    deaf.read_to_end(&mut rest).await.unwrap();
}

/// The peer speaks no HTTP/2: gRPC's connection fails.
#[tokio::test]
async fn l4_grpc_shutdown_error_still_closes_transport() {
    let leases = LeaseSet::new("vm");
    let (channel, mut stranger) = established(&leases).await;
    stranger.write_all(&[0xff; 256]).await.unwrap();
    let error = ping(&channel, after(5000)).await.unwrap_err();
    assert!(
        matches!(error, AgentError::VmGone { method: "Ping" }),
        "{error:?}"
    );
    let report = channel.close(after(5000)).await;
    assert_eq!(step(&report, "transport"), Outcome::Clean, "{report}");
    assert!(leases.held().is_empty());
    let ended = stranger.read_to_end(&mut Vec::new()).await;
    assert!(ended.is_ok());
}

/// Dropped without close: nothing stays, and that is counted.
#[tokio::test]
async fn l4_a_channel_dropped_unclosed_ends_its_calls_and_is_counted() {
    let leases = LeaseSet::new("vm");
    let (channel, mut deaf) = established(&leases).await;
    let mut client = channel.client().unwrap();
    let pending = tokio::spawn(async move { client.ping(PingRequest::default()).await });
    tokio::task::yield_now().await;
    let before = DROPPED_UNCLOSED.get();
    drop(channel);
    assert!(DROPPED_UNCLOSED.get() > before);
    assert!(pending.await.unwrap().is_err(), "the waiter is answered");
    assert_eq!(leases.drained(after(5000)).await, Ok(()));
    deaf.read_to_end(&mut Vec::new()).await.unwrap();
}

#[tokio::test]
async fn l4_a_lost_peer_still_closes_the_transport() {
    let leases = LeaseSet::new("vm");
    let (channel, peer) = established(&leases).await;
    drop(peer);
    let report = channel.close(after(1000)).await;
    assert_eq!(step(&report, "transport"), Outcome::Clean, "{report}");
    assert!(leases.held().is_empty());
}

/// What the peer of a channel has seen of it.
struct Seen {
    /// HTTP/2, up to the end once that has come.
    bytes: watch::Receiver<Vec<u8>>,
    /// Lets what the server said so far, and says later, through to the channel.
    answer: oneshot::Sender<()>,
    relaying: tokio::task::JoinHandle<()>,
}

/// A server that is heard only when the test says so.
fn overhear(peer: UnixStream) -> Seen {
    let (near, served) = UnixStream::pair().unwrap();
    let server = serve(served);
    let (seen, bytes) = watch::channel(Vec::new());
    let (answer, answered) = oneshot::channel();
    let relaying = tokio::spawn(async move {
        let (mut from_host, mut to_host) = peer.into_split();
        let (mut from_server, mut to_server) = near.into_split();
        let asking = async {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = from_host.read(&mut chunk).await {
                to_server.write_all(&chunk[..count]).await.unwrap();
                seen.send_modify(|seen| seen.extend_from_slice(&chunk[..count]));
            }
            drop(to_server);
        };
        let answering = async {
            answered.await.unwrap();
            tokio::io::copy(&mut from_server, &mut to_host).await
        };
        let ((), _) = tokio::join!(asking, answering);
        server.await.unwrap();
    });
    Seen {
        bytes,
        answer,
        relaying,
    }
}

/// The whole frames behind HTTP/2's preface (RFC 9113, 3.4 and 4.1): type and
/// payload.
fn frames(bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut rest = bytes.get(24..).unwrap_or_default();
    let mut frames = Vec::new();
    while let Some((header, after)) = rest.split_at_checked(9) {
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
        let Some((payload, after)) = after.split_at_checked(length.try_into().unwrap()) else {
            break;
        };
        frames.push((header[3], payload.to_vec()));
        rest = after;
    }
    frames
}

/// As the peer sees it: a call that is under way is answered, gRPC says that it
/// goes, and only then the connection ends.
#[tokio::test]
async fn l4_grpc_ends_before_the_transport() {
    const HEADERS: u8 = 1;
    const GOAWAY: u8 = 7;
    let leases = LeaseSet::new("vm");
    let (channel, peer) = established(&leases).await;
    let mut seen = overhear(peer);
    let (mut client, mut late) = (channel.client().unwrap(), channel.client().unwrap());
    let call = tokio::spawn(async move { client.ping(PingRequest::default()).await });
    let asked = seen.bytes.wait_for(|bytes| {
        let frames = frames(bytes);
        frames.iter().any(|(kind, _)| *kind == HEADERS)
    });
    drop(after(5000).run(asked).await.unwrap().unwrap());

    let closing = tokio::spawn(channel.close(after(20_000)));
    // It has begun when it takes no more calls.
    let status = loop {
        let call = late.ping(PingRequest::default());
        let answer = after(50).run(call).await;
        if let Ok(Err(status)) = answer {
            break status;
        }
    };
    let error = AgentError::from_status("Ping", &status);
    assert!(matches!(error, AgentError::Closing), "{error:?}");
    assert!(!closing.is_finished(), "a call is under way");
    assert_eq!(leases.held().len(), 1);
    let gone = |bytes: &[u8]| frames(bytes).iter().any(|(kind, _)| *kind == GOAWAY);
    assert!(
        !gone(&seen.bytes.borrow()),
        "it goes while a call is under way"
    );

    seen.answer.send(()).unwrap();
    let answer = call.await.unwrap().unwrap_err();
    let answer = Err(AgentError::from_status("Ping", &answer));
    assert!(is_answer(&answer), "{answer:?}");
    let report = closing.await.unwrap();
    assert!(report.is_clean(), "{report}");
    let order: Vec<_> = report.steps().map(|(step, _)| step).collect();
    assert_eq!(order, ["grpc", "transport"]);
    after(5000).run(seen.relaying).await.unwrap().unwrap();
    let frames = frames(&seen.bytes.borrow());
    let (kind, payload) = frames.last().unwrap();
    assert_eq!(*kind, GOAWAY, "the last of {frames:?}");
    assert_eq!(payload[4..8], [0; 4], "no error");
    assert!(leases.held().is_empty());
}

/// The peer takes nothing, not even HTTP/2's first bytes.
#[tokio::test]
async fn l4_a_channel_that_cannot_be_made_ends_at_its_deadline() {
    let leases = LeaseSet::new("vm");
    let (transport, mut deaf) = pair(&leases);
    let mut io = transport.io().unwrap();
    let full = [0; 4096];
    while after(50).run(io.write_all(&full)).await.is_ok() {}
    drop(io);
    let making = AgentChannel::establish(transport, after(100));
    let error = after(5000).run(making).await.unwrap().unwrap_err();
    assert!(matches!(error, AgentError::Deadline { .. }), "{error:?}");
    assert!(leases.held().is_empty());
    deaf.read_to_end(&mut Vec::new()).await.unwrap();
}

#[tokio::test]
async fn calls_are_refused_once_closing_began() {
    let leases = LeaseSet::new("vm");
    let (channel, peer) = established(&leases).await;
    let _server = serve(peer);
    channel.refuse_calls();
    assert!(matches!(
        ping(&channel, after(5000)).await,
        Err(AgentError::Closing)
    ));
    let _ = channel.close(after(1000)).await;
}

#[tokio::test]
async fn a_call_ends_at_its_deadline() {
    let leases = LeaseSet::new("vm");
    let (channel, _deaf) = established(&leases).await;
    let error = ping(&channel, after(50)).await.unwrap_err();
    assert!(
        matches!(error, AgentError::Deadline { method: "Ping" }),
        "{error:?}"
    );
    let _ = channel.close(after(100)).await;
    assert!(leases.held().is_empty());
}

#[tokio::test]
async fn l6_strangers_are_turned_away_until_the_agent_comes() {
    let folder = tempfile::tempdir().unwrap();
    let leases = LeaseSet::new("vm");
    let vm = folder.path().join("vm");
    let listener = VsockListener::bind_hybrid(&vm, VsockPort::READY, leases.clone()).unwrap();
    let socket = folder.path().join(format!("vm_{}", VsockPort::READY));
    let guest = tokio::spawn(async move {
        drop(UnixStream::connect(&socket).await.unwrap());
        let stranger = UnixStream::connect(&socket).await.unwrap();
        stranger.try_write(&[0; 64]).unwrap();
        let stream = UnixStream::connect(&socket).await.unwrap();
        let guest_leases = LeaseSet::new("guest");
        let lease = guest_leases
            .issue(Holder::new(HolderKind::Control, "agent"))
            .unwrap();
        let fd = stream.into_std().unwrap().into();
        let agent = VsockTransport::adopt(fd, Peer::Host(VsockPort::READY), lease).unwrap();
        let times = GuestTimes {
            kernel_to_agent: Duration::from_millis(447),
            agent_to_ready: Duration::from_millis(9),
        };
        let token = announce(&agent, times, after(5000)).await.unwrap();
        (agent, token)
    });
    let token = Token::from_bytes([3; 32]);
    let counted = FOREIGN_READY.get();
    let connected = wait_for_agent(&listener, &token, after(5000), pending())
        .await
        .unwrap();
    // Other tests of this process have strangers, too.
    assert!(FOREIGN_READY.get() >= counted + 2);
    assert_eq!(connected.times.kernel_to_agent, Duration::from_millis(447));
    let (agent, received) = guest.await.unwrap();
    assert!(received.matches(&token));
    assert_eq!(
        leases.held().len(),
        1,
        "only the agent's connection is left"
    );
    let _ = connected.channel.close(after(1000)).await;
    let _ = agent.close(after(1000)).await;
    let _ = listener.close();
    assert!(leases.held().is_empty());
}

/// Whoever connects and says nothing is one connection, not the end of waiting.
#[tokio::test(start_paused = true)]
async fn l6_a_silent_stranger_does_not_keep_the_agent_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let leases = LeaseSet::new("vm");
    let vm = folder.path().join("vm");
    let listener = VsockListener::bind_hybrid(&vm, VsockPort::READY, leases.clone()).unwrap();
    let socket = folder.path().join(format!("vm_{}", VsockPort::READY));
    let _silent = UnixStream::connect(&socket).await.unwrap();
    let mut agent = UnixStream::connect(&socket).await.unwrap();
    agent.write_all(b"PHREADY1").await.unwrap();
    agent.write_all(&[0; 16]).await.unwrap();
    let connected = wait_for_agent(
        &listener,
        &Token::from_bytes([3; 32]),
        after(60_000),
        pending(),
    )
    .await
    .unwrap();
    let mut welcome = [0; 8];
    agent.read_exact(&mut welcome).await.unwrap();
    assert_eq!(&welcome, b"PHTOKEN1");
    assert_eq!(leases.held().len(), 1, "the stranger is gone");
    let _ = connected.channel.close(after(1000)).await;
}

#[tokio::test(start_paused = true)]
async fn l6_a_guest_that_never_comes_is_an_error_at_the_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let vm = folder.path().join("vm");
    let listener = VsockListener::bind_hybrid(&vm, VsockPort::READY, LeaseSet::new("vm")).unwrap();
    let error = wait_for_agent(
        &listener,
        &Token::from_bytes([3; 32]),
        after(5000),
        pending(),
    )
    .await
    .unwrap_err();
    assert!(matches!(error, AgentError::NotReady(_)));
}

/// Its VM has ended: whoever is let in by then is not left open.
#[tokio::test(start_paused = true)]
async fn l6_the_end_of_the_vm_ends_the_waiting_and_closes_who_came() {
    let folder = tempfile::tempdir().unwrap();
    let leases = LeaseSet::new("vm");
    let vm = folder.path().join("vm");
    let listener = VsockListener::bind_hybrid(&vm, VsockPort::READY, leases.clone()).unwrap();
    let socket = folder.path().join(format!("vm_{}", VsockPort::READY));
    let mut silent = UnixStream::connect(&socket).await.unwrap();
    let token = Token::from_bytes([3; 32]);
    let begin = tokio::time::Instant::now();
    let waited = wait_for_agent(&listener, &token, after(60_000), std::future::ready(()));
    let error = waited.await.unwrap_err();
    assert!(matches!(error, AgentError::VmGone { .. }), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert!(leases.held().is_empty(), "{:?}", leases.held());
    assert_eq!(silent.read(&mut [0; 1]).await.unwrap(), 0, "it is closed");
}
