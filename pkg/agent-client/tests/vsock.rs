// SPDX-License-Identifier: Apache-2.0
//! Rows L4–L6 of the lifetime contract over AF_VSOCK itself, where the kernel
//! loops it back.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test"
)]

use std::future::pending;
use std::time::{Duration, Instant};

use podhull_agent_client::{AgentChannel, AgentError, wait_for_agent};
use podhull_api::agent::PingRequest;
use podhull_transport::{
    CloseReport, GuestTimes, LeaseSet, Outcome, TransportIo, VsockListener, VsockTransport,
    announce,
};
use podhull_types::{Cid, Deadline, Token};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tonic::service::Routes;

use calls::{first_call_after, is_answer, ping};
use loopback::{LOCAL, connected, dial, soon, with_loopback};

#[path = "shared/calls.rs"]
mod calls;
#[path = "../../transport/tests/shared/loopback.rs"]
mod loopback;

/// What has no reason to wait, on a slow machine.
const AT_ONCE: Duration = Duration::from_secs(5);
const TIMES: GuestTimes = GuestTimes {
    kernel_to_agent: Duration::from_millis(447),
    agent_to_ready: Duration::from_millis(9),
};

fn token() -> Token {
    Token::from_bytes([3; Token::LEN])
}

fn after(milliseconds: u64) -> Deadline {
    Deadline::after(Duration::from_millis(milliseconds))
}

/// A channel, and the guest's end of its connection: the guest has dialled.
async fn established(leases: &LeaseSet) -> (AgentChannel, VsockTransport) {
    let (guest, host) = connected(leases).await;
    let channel = AgentChannel::establish(host, soon()).await;
    (channel.unwrap(), guest)
}

/// A gRPC server that knows no method: its answers still show a living channel.
/// It gives how the guest's end was closed.
fn serve(guest: VsockTransport) -> JoinHandle<CloseReport> {
    tokio::spawn(async move {
        let (mut relayed, served) = UnixStream::pair().unwrap();
        let once = futures::stream::iter([Ok::<_, std::io::Error>(served)]);
        let server = tonic::transport::Server::builder().add_routes(Routes::default());
        let mut io = guest.io().unwrap();
        let relaying = async {
            // The host is free to end it as it likes.
            drop(copy_bidirectional(&mut io, &mut relayed).await);
            drop(relayed);
        };
        let (served, ()) = tokio::join!(server.serve_with_incoming(once), relaying);
        served.unwrap();
        drop(io);
        guest.close(soon()).await
    })
}

fn is_gone(result: &Result<(), AgentError>) -> bool {
    matches!(result, Err(AgentError::VmGone { method: "Ping" }))
}

fn step(report: &CloseReport, name: &str) -> Outcome {
    let mut steps = report.steps();
    steps.find(|(step, _)| *step == name).unwrap().1.clone()
}

/// The peer sees an end, and no error: AF_VSOCK has none for bytes unread.
async fn sees_the_end(guest: VsockTransport, mut io: TransportIo) {
    io.read_to_end(&mut Vec::new()).await.unwrap();
    drop(io);
    assert!(guest.close(soon()).await.is_clean());
}

/// Reads HTTP/2 until there is a call in it: its preface, then frames of
/// headers (RFC 9113, 3.4 and 4.1).
async fn called(io: &mut TransportIo) {
    const HEADERS: u8 = 1;
    io.read_exact(&mut [0; 24]).await.unwrap();
    let mut frame = [0; 9];
    while frame[3] != HEADERS {
        io.read_exact(&mut frame).await.unwrap();
        let length = u32::from_be_bytes([0, frame[0], frame[1], frame[2]]);
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        io.read_exact(&mut payload).await.unwrap();
    }
}

#[test]
fn l4_grpc_ends_before_the_transport() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let (channel, guest) = established(&leases).await;
        let server = serve(guest);
        assert!(is_answer(&ping(&channel, soon()).await));
        let report = channel.close(soon()).await;
        assert!(report.is_clean(), "{report}");
        let order: Vec<_> = report.steps().map(|(step, _)| step).collect();
        assert_eq!(order, ["grpc", "transport"]);
        assert!(server.await.unwrap().is_clean());
        assert!(leases.held().is_empty());
    });
}

/// The peer accepts bytes and never answers.
#[test]
fn l4_a_hanging_grpc_shutdown_still_closes_the_transport() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let (channel, deaf) = established(&leases).await;
        let mut client = channel.client().unwrap();
        let pending = tokio::spawn(async move { client.ping(PingRequest::default()).await });
        let mut io = deaf.io().unwrap();
        called(&mut io).await;
        let report = channel.close(after(100)).await;
        let forced = step(&report, "grpc");
        assert!(matches!(forced, Outcome::Forced(_)), "{report}");
        assert_eq!(step(&report, "transport"), Outcome::Clean, "{report}");
        assert_eq!(leases.held().len(), 1, "only the guest's end is left");
        assert!(pending.await.unwrap().is_err(), "the waiter is answered");
        sees_the_end(deaf, io).await;
        assert!(leases.held().is_empty());
    });
}

/// The peer speaks no HTTP/2: gRPC's connection fails.
#[test]
fn l4_grpc_shutdown_error_still_closes_transport() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let (channel, stranger) = established(&leases).await;
        let mut io = stranger.io().unwrap();
        io.write_all(&[0xff; 256]).await.unwrap();
        let answer = ping(&channel, soon()).await;
        assert!(is_gone(&answer), "{answer:?}");
        let report = channel.close(soon()).await;
        assert_eq!(step(&report, "transport"), Outcome::Clean, "{report}");
        assert_eq!(leases.held().len(), 1, "only the guest's end is left");
        sees_the_end(stranger, io).await;
        assert!(leases.held().is_empty());
    });
}

#[test]
fn l4_a_lost_peer_still_closes_the_transport() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let (channel, guest) = established(&leases).await;
        assert!(guest.close(soon()).await.is_clean());
        let report = channel.close(soon()).await;
        assert_eq!(step(&report, "transport"), Outcome::Clean, "{report}");
        assert!(leases.held().is_empty());
    });
}

/// Dropped without close: nothing stays.
#[test]
fn l4_a_channel_dropped_unclosed_ends_its_calls_and_its_transport() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let (channel, deaf) = established(&leases).await;
        let mut client = channel.client().unwrap();
        let pending = tokio::spawn(async move { client.ping(PingRequest::default()).await });
        let mut io = deaf.io().unwrap();
        called(&mut io).await;
        drop(channel);
        assert!(pending.await.unwrap().is_err(), "the waiter is answered");
        sees_the_end(deaf, io).await;
        assert_eq!(leases.drained(soon()).await, Ok(()));
    });
}

/// As often as `times`, with `pause` between the connection and its first call.
fn late(times: u32, pause: Duration) {
    with_loopback(async move {
        let leases = LeaseSet::new("vm");
        for _ in 0..times {
            let (channel, guest) = established(&leases).await;
            let server = serve(guest);
            first_call_after(pause, channel).await;
            assert!(server.await.unwrap().is_clean());
            assert!(leases.held().is_empty());
        }
    });
}

#[test]
fn l5_the_first_call_may_come_late() {
    late(10, Duration::from_millis(100));
}

#[test]
#[ignore = "it takes 30 s: make test-all PART=kvm"]
fn l5_the_first_call_may_come_after_30_s() {
    late(1, Duration::from_secs(30));
}

#[test]
fn l5_a_vm_that_is_gone_is_an_error_at_once() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let (channel, guest) = established(&leases).await;
        assert!(guest.close(soon()).await.is_clean());
        for _ in 0..3 {
            let began = Instant::now();
            let answer = ping(&channel, soon()).await;
            assert!(is_gone(&answer), "{answer:?}");
            assert!(began.elapsed() < AT_ONCE);
        }
        drop(channel.close(soon()).await);
        assert!(leases.held().is_empty());
    });
}

#[test]
fn l6_strangers_are_turned_away_until_the_agent_comes() {
    with_loopback(async {
        let (leases, guests) = (LeaseSet::new("vm"), LeaseSet::new("guests"));
        let listener = VsockListener::bind_vsock(None, LOCAL, leases.clone()).unwrap();
        let port = listener.port();
        let token = token();
        let guest = async {
            let leaves = dial(&guests, port).await.unwrap();
            assert!(leaves.close(soon()).await.is_clean());
            let speaks = dial(&guests, port).await.unwrap();
            speaks.io().unwrap().write_all(&[0; 64]).await.unwrap();
            let silent = dial(&guests, port).await.unwrap();
            let agent = dial(&guests, port).await.unwrap();
            let received = announce(&agent, TIMES, soon()).await.unwrap();
            assert!(received.matches(&token));
            for stranger in [speaks, silent] {
                let io = stranger.io().unwrap();
                sees_the_end(stranger, io).await;
            }
            agent
        };
        let (ready, agent) =
            tokio::join!(wait_for_agent(&listener, &token, soon(), pending()), guest);
        let ready = ready.unwrap();
        assert_eq!(ready.times, TIMES);
        assert_eq!(leases.held().len(), 1, "only the agent's connection");
        // Its transport has come with it.
        let server = serve(agent);
        let answer = ping(&ready.channel, soon()).await;
        assert!(is_answer(&answer), "{answer:?}");
        assert!(ready.channel.close(soon()).await.is_clean());
        assert!(server.await.unwrap().is_clean());
        assert!(listener.close().is_clean());
        assert!(leases.held().is_empty() && guests.held().is_empty());
    });
}

/// It says all that an agent says, and is another VM's.
#[test]
fn l6_an_agent_of_another_vm_is_no_answer_and_the_wait_ends_at_its_deadline() {
    with_loopback(async {
        let (leases, guests) = (LeaseSet::new("vm"), LeaseSet::new("guests"));
        let listener = VsockListener::bind_vsock(None, Cid(77), leases.clone()).unwrap();
        let token = token();
        let other = async {
            let agent = dial(&guests, listener.port()).await.unwrap();
            let received = announce(&agent, TIMES, soon()).await;
            assert!(received.is_err(), "another VM's agent has the token");
            assert!(agent.close(soon()).await.is_clean());
        };
        let waiting = wait_for_agent(&listener, &token, after(3000), pending());
        let (ready, ()) = tokio::join!(waiting, other);
        let error = ready.unwrap_err();
        assert!(matches!(error, AgentError::NotReady(_)), "{error:?}");
        assert!(leases.held().is_empty());
        assert!(listener.close().is_clean());
    });
}
