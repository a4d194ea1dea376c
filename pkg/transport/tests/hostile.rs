// SPDX-License-Identifier: Apache-2.0
//! What bad input gets: its session ends with a named error, counted and logged
//! once; the others go on. The bytes are written here by hand, so that a change
//! of the wire format is seen.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::os::unix::net;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use podhull_transport::{
    GuestSession, Holder, HolderKind, HostSession, LeaseSet, Peer, SessionError, SessionTarget,
    VsockTransport, metrics, open_session, receive_session,
};
use podhull_types::{ContainerId, Deadline, ProcessRef, Token, VsockPort};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tracing::span;

/// Counters and log are the process's: one test at a time.
static ALONE: Mutex<()> = Mutex::const_new(());

const HELLO: u8 = 1;
const ACCEPT: u8 = 2;
const REFUSE: u8 = 3;
const DATA: u8 = 4;
const EOF: u8 = 5;
const CREDIT: u8 = 7;
const STOP: u8 = 8;
const EXIT: u8 = 9;

const INPUT: u8 = 0;
const OUTPUT: u8 = 1;
const ERROR: u8 = 2;

const WINDOW: usize = 256 * 1024;
const MAX_DATA: usize = 64 * 1024;

/// A frame's header, whose length may be a lie.
fn header(kind: u8, stream: u8, length: usize) -> Vec<u8> {
    let mut bytes = vec![kind, stream, 0, 0];
    bytes.extend(u32::try_from(length).unwrap().to_le_bytes());
    bytes
}

fn frame(kind: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    [&header(kind, stream, payload.len()), payload].concat()
}

fn data(stream: u8, length: usize) -> Vec<u8> {
    let pieces = vec![0; length];
    let frames = pieces.chunks(MAX_DATA).map(|it| frame(DATA, stream, it));
    frames.collect::<Vec<_>>().concat()
}

fn hello(version: u16, token: u8, target: &[u8]) -> Vec<u8> {
    let payload = [&version.to_le_bytes()[..], &[token; 32], target].concat();
    frame(HELLO, 0, &payload)
}

fn process(container: &str, exec: &str) -> Vec<u8> {
    let mut target = vec![1];
    for id in [container, exec] {
        target.push(u8::try_from(id.len()).unwrap());
        target.extend(id.bytes());
    }
    target
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn token() -> Token {
    Token::from_bytes([5; 32])
}

fn target() -> SessionTarget {
    SessionTarget::Process(ProcessRef::init(ContainerId::new("c1").unwrap()))
}

/// Counts this crate's warnings.
struct Warnings;

static WARNED: AtomicUsize = AtomicUsize::new(0);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN
    }
    fn event(&self, event: &tracing::Event<'_>) {
        if event
            .metadata()
            .target()
            .starts_with("podhull_transport::session")
        {
            WARNED.fetch_add(1, Ordering::Relaxed);
        }
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// One side, its leases, and a good session on it.
struct Side {
    leases: LeaseSet,
    host: HostSession,
    guest: GuestSession,
}

impl Side {
    async fn new() -> Self {
        // Fails if another test was first: it is the same one.
        drop(tracing::subscriber::set_global_default(Warnings));
        let leases = LeaseSet::new("vm");
        let (host, guest) = net::UnixStream::pair().unwrap();
        let (host, guest) = (adopt(&leases, host), adopt(&leases, guest));
        let receive = async {
            let incoming = receive_session(guest, &token(), soon()).await.unwrap();
            incoming.accept(soon()).await.unwrap()
        };
        let (token, target) = (token(), target());
        let (host, guest) = tokio::join!(open_session(host, &token, &target, soon()), receive);
        Self {
            leases,
            host: host.unwrap(),
            guest,
        }
    }

    /// The good session still carries bytes.
    async fn goes_on(&mut self, name: &str) {
        let bytes = name.as_bytes();
        let mut received = vec![0; bytes.len()];
        self.host.input.write_all(bytes).await.unwrap();
        self.guest.input.read_exact(&mut received).await.unwrap();
        self.guest.error.write_all(&received).await.unwrap();
        self.host.error.read_exact(&mut received).await.unwrap();
        assert_eq!(received, bytes);
        assert_eq!(self.leases.held().len(), 2, "the bad session is closed");
    }

    /// A transport of this side, and the bad peer.
    fn bad_peer(&self) -> (VsockTransport, UnixStream) {
        let (ours, theirs) = net::UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let peer = UnixStream::from_std(theirs).unwrap();
        (adopt(&self.leases, ours), peer)
    }
}

fn adopt(leases: &LeaseSet, end: net::UnixStream) -> VsockTransport {
    let holder = Holder::new(HolderKind::Session, "test");
    let lease = leases.issue(holder).unwrap();
    VsockTransport::adopt(end.into(), Peer::Guest(VsockPort::SESSIONS), lease).unwrap()
}

/// Writes while the other side takes it.
async fn say(peer: &mut UnixStream, bytes: &[u8]) {
    if let Err(error) = peer.write_all(bytes).await {
        assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    }
}

async fn counted<T>(name: &str, times: usize, work: impl Future<Output = T>) -> T {
    let counted = metrics::PROTOCOL_ERRORS.get();
    let done = work.await;
    let more = metrics::PROTOCOL_ERRORS.get() - counted;
    assert_eq!(more, u64::try_from(times).unwrap(), "{name}: counted");
    done
}

#[tokio::test]
async fn a_bad_guest_ends_its_own_session_with_a_named_error() {
    let _alone = ALONE.lock().await;
    let mut side = Side::new().await;
    let ended = [frame(EOF, OUTPUT, &[]), frame(EOF, ERROR, &[])].concat();
    let cases: &[(&str, Vec<u8>, &str)] = &[
        (
            "too long",
            header(DATA, OUTPUT, MAX_DATA + 1),
            "frame of 65537 bytes, at most 65536 are allowed",
        ),
        (
            "endless",
            header(DATA, OUTPUT, u32::MAX as usize),
            "frame of 4294967295 bytes, at most 65536 are allowed",
        ),
        (
            "long exit",
            header(EXIT, 0, 2),
            "frame of 2 bytes, at most 1 are allowed",
        ),
        ("unknown kind", header(77, 0, 0), "unknown frame kind 77"),
        ("kind 0", header(0, 0, 0), "unknown frame kind 0"),
        (
            "garbage",
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            "unknown frame kind 71",
        ),
        (
            "unknown stream",
            data(9, 1),
            "no stream 9 in this direction",
        ),
        ("wrong way", data(INPUT, 1), "no stream 0 in this direction"),
        (
            "credit for what it writes",
            frame(CREDIT, OUTPUT, &[1, 0, 0, 0]),
            "no stream 1 in this direction",
        ),
        (
            "stops what it writes",
            frame(STOP, ERROR, &[]),
            "no stream 2 in this direction",
        ),
        (
            "short credit",
            frame(CREDIT, INPUT, &[1]),
            "malformed CREDIT frame",
        ),
        ("empty exit", frame(EXIT, 0, &[]), "malformed EXIT frame"),
        (
            "credit overflow",
            frame(CREDIT, INPUT, &[1, 0, 0, 0]),
            "credit for stream 0 exceeds the window",
        ),
        (
            "credit overrun",
            data(OUTPUT, WINDOW + 7),
            "stream 1 overran its credit by 7 bytes",
        ),
        (
            "data after its end",
            [ended.clone(), data(OUTPUT, 1)].concat(),
            "unexpected DATA frame",
        ),
        (
            "two ends",
            [ended.clone(), frame(EOF, ERROR, &[])].concat(),
            "unexpected EOF frame",
        ),
        (
            "exit before the ends",
            frame(EXIT, 0, &[0]),
            "unexpected EXIT frame",
        ),
        (
            "two exits",
            [ended, frame(EXIT, 0, &[0]), frame(EXIT, 0, &[1])].concat(),
            "unexpected EXIT frame",
        ),
        (
            "accepts twice",
            frame(ACCEPT, 0, &[]),
            "unexpected ACCEPT frame",
        ),
        (
            "refuses late",
            frame(REFUSE, 0, b"no"),
            "unexpected REFUSE frame",
        ),
        (
            "hello from the guest",
            hello(1, 5, &process("c", "")),
            "unexpected HELLO frame",
        ),
    ];
    for (name, bytes, error) in cases {
        let (transport, mut peer) = side.bad_peer();
        let warned = WARNED.load(Ordering::Relaxed);
        let session = async {
            let bad = async {
                peer.read_exact(&mut [0; 8]).await.unwrap();
                say(&mut peer, &[frame(ACCEPT, 0, &[]), bytes.clone()].concat()).await;
                // Nor does it help to go on.
                say(&mut peer, &data(ERROR, 1)).await;
            };
            let (token, target) = (token(), target());
            let (opened, ()) = tokio::join!(open_session(transport, &token, &target, soon()), bad);
            let mut host = opened.unwrap();
            host.handle.closed().await;
            let read = host.output.read_to_end(&mut Vec::new()).await;
            let wrote = host.input.write(b"x").await.unwrap_err();
            let exit = host.handle.exit().await;
            (read, wrote, exit, host.handle.close(soon()).await)
        };
        let (read, wrote, exit, closed) = counted(name, 1, session).await;
        let expected = format!("protocol error: {error}");
        assert_eq!(wrote.to_string(), expected, "{name}");
        match exit {
            Err(error) => {
                assert_eq!(error.to_string(), expected, "{name}");
                let closed = closed.to_string();
                assert!(closed.contains(&expected), "{name}: {closed}");
            }
            // The code that came first, and all its output before it.
            Ok(code) => assert_eq!((code, *name, closed.is_clean()), (0, "two exits", true)),
        }
        let ended = ["data after its end", "two ends", "two exits"].contains(name);
        match read {
            Err(error) => assert_eq!(error.to_string(), expected, "{name}"),
            Ok(_) => assert!(ended, "{name}"),
        }
        assert_eq!(WARNED.load(Ordering::Relaxed), warned + 1, "{name}: logged");
        side.goes_on(name).await;
    }
}

#[tokio::test]
async fn a_bad_host_ends_its_own_session_with_a_named_error() {
    let _alone = ALONE.lock().await;
    let mut side = Side::new().await;
    let good = hello(1, 5, &process("c1", ""));
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("hello twice", good.clone(), "unexpected HELLO frame"),
        ("exit", frame(EXIT, 0, &[0]), "unexpected EXIT frame"),
        ("stdout", data(OUTPUT, 1), "no stream 1 in this direction"),
        (
            "stdin overrun",
            data(INPUT, WINDOW + 1),
            "stream 0 overran its credit by 1 bytes",
        ),
        (
            "credit overflow",
            frame(CREDIT, ERROR, &[255; 4]),
            "credit for stream 2 exceeds the window",
        ),
    ];
    for (name, bytes, error) in cases {
        let (transport, mut peer) = side.bad_peer();
        let warned = WARNED.load(Ordering::Relaxed);
        let session = async {
            say(&mut peer, &good).await;
            let incoming = receive_session(transport, &token(), soon()).await.unwrap();
            let mut guest = incoming.accept(soon()).await.unwrap();
            say(&mut peer, bytes).await;
            guest.handle.closed().await;
            let wrote = guest.output.write(b"x").await.unwrap_err();
            (wrote, guest.handle.close(soon()).await)
        };
        let (wrote, closed) = counted(name, 1, session).await;
        let expected = format!("protocol error: {error}");
        assert_eq!(wrote.to_string(), expected, "{name}");
        let closed = closed.to_string();
        assert!(closed.contains(&expected), "{name}: {closed}");
        assert_eq!(WARNED.load(Ordering::Relaxed), warned + 1, "{name}: logged");
        side.goes_on(name).await;
    }
}

#[tokio::test]
async fn a_bad_greeting_gets_no_session_and_no_answer() {
    let _alone = ALONE.lock().await;
    let mut side = Side::new().await;
    let good = hello(1, 5, &process("c1", "e1"));
    let malformed = "protocol error: malformed HELLO frame";
    let cases: &[(&str, Vec<u8>, &str)] = &[
        (
            "wrong token",
            hello(1, 6, &process("c1", "e1")),
            "wrong token",
        ),
        (
            "other version",
            hello(2, 5, &process("c1", "e1")),
            "protocol error: protocol version 2, expected 1",
        ),
        (
            "a path for an id",
            hello(1, 5, &process("../c1", "")),
            "protocol error: container id \"../c1\" may only have letters, digits and single . _ - inside",
        ),
        (
            "no id",
            hello(1, 5, &process("", "")),
            "protocol error: container id is empty",
        ),
        (
            "a long id",
            hello(1, 5, &process(&"x".repeat(77), "")),
            "protocol error: container id is 77 bytes long, at most 76 are allowed",
        ),
        ("id not of text", hello(1, 5, &[1, 1, 0xff, 0]), malformed),
        ("unknown target", hello(1, 5, &[3, 0, 0]), malformed),
        ("half a port", hello(1, 5, &[2, 80]), malformed),
        ("more than a port", hello(1, 5, &[2, 80, 0, 0]), malformed),
        ("no target", hello(1, 5, &[]), malformed),
        ("empty", frame(HELLO, 0, &[]), malformed),
        (
            "too long",
            header(HELLO, 0, 1025),
            "protocol error: frame of 1025 bytes, at most 1024 are allowed",
        ),
        (
            "data first",
            data(INPUT, 1),
            "protocol error: unexpected DATA frame",
        ),
        (
            "garbage",
            b"SSH-2.0-x\r\n".to_vec(),
            "protocol error: unknown frame kind 83",
        ),
        (
            "cut",
            good[..good.len() - 1].to_vec(),
            "connection lost: ended in the handshake",
        ),
        ("silent", vec![], "connection lost: ended in the handshake"),
    ];
    for (name, bytes, error) in cases {
        let (transport, mut peer) = side.bad_peer();
        let lost = error.starts_with("connection lost");
        let session = async {
            say(&mut peer, bytes).await;
            if lost {
                peer.shutdown().await.unwrap();
            }
            receive_session(transport, &token(), soon()).await.map(drop)
        };
        let refused = counted(name, usize::from(!lost), session)
            .await
            .unwrap_err();
        assert_eq!(refused.to_string(), *error, "{name}");
        let mut answer = Vec::new();
        peer.read_to_end(&mut answer).await.ok();
        assert!(answer.is_empty(), "{name}: learns nothing");
        side.goes_on(name).await;
    }
}

#[tokio::test]
async fn a_bad_answer_is_no_session() {
    let _alone = ALONE.lock().await;
    let mut side = Side::new().await;
    for (name, bytes, error) in [
        (
            "data",
            data(OUTPUT, 1),
            "protocol error: unexpected DATA frame",
        ),
        (
            "hello",
            hello(1, 5, &process("c1", "")),
            "protocol error: unexpected HELLO frame",
        ),
        (
            "long accept",
            header(ACCEPT, 0, 1),
            "protocol error: frame of 1 bytes, at most 0 are allowed",
        ),
    ] {
        let (transport, mut peer) = side.bad_peer();
        say(&mut peer, &bytes).await;
        let (token, target) = (token(), target());
        let opened = open_session(transport, &token, &target, soon());
        let failed = counted(name, 1, opened).await.map(drop).unwrap_err();
        assert_eq!(failed.to_string(), error, "{name}");
        side.goes_on(name).await;
    }
}

/// A connection that ends within a frame is lost, not a breach of the protocol.
#[tokio::test]
async fn half_a_frame_is_a_lost_connection() {
    let _alone = ALONE.lock().await;
    let mut side = Side::new().await;
    let (transport, mut peer) = side.bad_peer();
    let half = [
        frame(ACCEPT, 0, &[]),
        header(DATA, OUTPUT, 100),
        vec![0; 50],
    ]
    .concat();
    say(&mut peer, &half).await;
    peer.shutdown().await.unwrap();
    let (token, target) = (token(), target());
    let lost = async {
        let host = open_session(transport, &token, &target, soon())
            .await
            .unwrap();
        let exit = host.handle.exit().await;
        assert!(host.handle.close(soon()).await.steps().count() > 0);
        exit
    };
    let lost = counted("half", 0, lost).await;
    assert!(matches!(lost, Err(SessionError::Lost(_))), "{lost:?}");
    side.goes_on("half").await;
}
