// SPDX-License-Identifier: Apache-2.0
//! Rows L4–L6 of the lifetime contract, against a gRPC server on a socket pair.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::future::pending;
use std::os::unix::net;
use std::time::{Duration, Instant};

use podhull_agent_client::{AgentChannel, AgentError, RpcKind, wait_for_agent};
use podhull_api::agent::PingRequest;
use podhull_transport::metrics::DROPPED_UNCLOSED;
use podhull_transport::{
    CloseReport, GuestTimes, Holder, HolderKind, LeaseSet, Outcome, Peer, VsockListener,
    VsockTransport, announce,
};
use podhull_types::{Deadline, Token, VsockPort};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::service::Routes;

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

async fn ping(channel: &AgentChannel, by: Deadline) -> Result<(), AgentError> {
    let ping = channel.call("Ping", by, async |mut client| {
        client.ping(PingRequest::default()).await
    });
    ping.await.map(drop)
}

fn is_answer(result: Result<(), AgentError>) -> bool {
    matches!(
        result,
        Err(AgentError::Rpc {
            kind: RpcKind::Unimplemented,
            ..
        })
    )
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
    assert!(listener.close(after(1000)).await.is_clean());
    (connected.unwrap().channel, serve(served))
}

/// Ten in a row, with 100 ms between the connection and its first call.
#[tokio::test]
async fn l5_the_first_call_may_come_late() {
    let leases = LeaseSet::new("vm");
    for _ in 0..10 {
        let (channel, server) = ready(&leases).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(is_answer(ping(&channel, after(5000)).await));
        assert!(is_answer(ping(&channel, after(5000)).await));
        let report = channel.close(after(5000)).await;
        assert!(report.is_clean(), "{report}");
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
    assert!(is_answer(ping(&channel, after(5000)).await));
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

#[tokio::test]
async fn l4_grpc_ends_before_the_transport() {
    let leases = LeaseSet::new("vm");
    let (channel, peer) = established(&leases).await;
    let _server = serve(peer);
    assert!(is_answer(ping(&channel, after(5000)).await));
    let report = channel.close(after(5000)).await;
    let order: Vec<_> = report.steps().map(|(step, _)| step).collect();
    assert_eq!(order, ["grpc", "transport"]);
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
    let connected = wait_for_agent(&listener, &token, after(5000), pending())
        .await
        .unwrap();
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
    let _ = listener.close(after(1000)).await;
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
