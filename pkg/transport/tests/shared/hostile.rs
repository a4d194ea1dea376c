// SPDX-License-Identifier: Apache-2.0
//! A peer that says what it likes, beside a good session; what is counted and
//! logged of it. The bytes are written here by hand, so that a change of the wire
//! format is seen.
#![allow(dead_code, reason = "each of the tests has its part of it")]

use std::os::unix::net;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use podhull_transport::{
    GuestSession, Holder, HolderKind, HostSession, LeaseSet, Peer, SessionTarget, VsockTransport,
    metrics, open_session, receive_session,
};
use podhull_types::{ContainerId, Deadline, ProcessRef, Token, VsockPort};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tracing::span;

/// Counters and log are the process's: one test at a time.
pub(crate) static ALONE: Mutex<()> = Mutex::const_new(());

pub(crate) const HELLO: u8 = 1;
pub(crate) const ACCEPT: u8 = 2;
pub(crate) const REFUSE: u8 = 3;
pub(crate) const DATA: u8 = 4;
pub(crate) const EOF: u8 = 5;
pub(crate) const CREDIT: u8 = 7;
pub(crate) const STOP: u8 = 8;
pub(crate) const EXIT: u8 = 9;

pub(crate) const INPUT: u8 = 0;
pub(crate) const OUTPUT: u8 = 1;
pub(crate) const ERROR: u8 = 2;

pub(crate) const WINDOW: usize = 256 * 1024;
pub(crate) const MAX_DATA: usize = 64 * 1024;

/// A frame's header, whose length may be a lie.
pub(crate) fn header(kind: u8, stream: u8, length: usize) -> Vec<u8> {
    let mut bytes = vec![kind, stream, 0, 0];
    bytes.extend(u32::try_from(length).unwrap().to_le_bytes());
    bytes
}

pub(crate) fn frame(kind: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    [&header(kind, stream, payload.len()), payload].concat()
}

pub(crate) fn data(stream: u8, length: usize) -> Vec<u8> {
    let pieces = vec![0; length];
    let frames = pieces.chunks(MAX_DATA).map(|it| frame(DATA, stream, it));
    frames.collect::<Vec<_>>().concat()
}

pub(crate) fn hello(version: u16, token: u8, target: &[u8]) -> Vec<u8> {
    let payload = [&version.to_le_bytes()[..], &[token; 32], target].concat();
    frame(HELLO, 0, &payload)
}

pub(crate) fn process(container: &str, exec: &str) -> Vec<u8> {
    let mut target = vec![1];
    for id in [container, exec] {
        target.push(u8::try_from(id.len()).unwrap());
        target.extend(id.bytes());
    }
    target
}

pub(crate) fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

pub(crate) fn token() -> Token {
    Token::from_bytes([5; 32])
}

pub(crate) fn target() -> SessionTarget {
    SessionTarget::Process(ProcessRef::init(ContainerId::new("c1").unwrap()))
}

/// Counts this crate's warnings.
pub(crate) struct Warnings;

pub(crate) static WARNED: AtomicUsize = AtomicUsize::new(0);

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
pub(crate) struct Side {
    pub(crate) leases: LeaseSet,
    pub(crate) host: HostSession,
    pub(crate) guest: GuestSession,
}

impl Side {
    pub(crate) async fn new() -> Self {
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
    pub(crate) async fn goes_on(&mut self, name: &str) {
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
    pub(crate) fn bad_peer(&self) -> (VsockTransport, UnixStream) {
        let (ours, theirs) = net::UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let peer = UnixStream::from_std(theirs).unwrap();
        (adopt(&self.leases, ours), peer)
    }
}

pub(crate) fn adopt(leases: &LeaseSet, end: net::UnixStream) -> VsockTransport {
    let holder = Holder::new(HolderKind::Session, "test");
    let lease = leases.issue(holder).unwrap();
    VsockTransport::adopt(end.into(), Peer::Guest(VsockPort::SESSIONS), lease).unwrap()
}

/// Writes while the other side takes it.
pub(crate) async fn say(peer: &mut UnixStream, bytes: &[u8]) {
    if let Err(error) = peer.write_all(bytes).await {
        assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    }
}

/// What was counted of each kind, and the warnings.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) protocol: u64,
    pub(crate) refused: u64,
    pub(crate) token: u64,
    pub(crate) greeting: u64,
    pub(crate) silence: u64,
    pub(crate) warned: usize,
}

impl Told {
    fn now() -> Self {
        Self {
            protocol: metrics::PROTOCOL_ERRORS.get(),
            refused: metrics::REFUSED.get(),
            token: metrics::WRONG_TOKEN.get(),
            greeting: metrics::BAD_GREETING.get(),
            silence: metrics::NO_GREETING.get(),
            warned: WARNED.load(Ordering::Relaxed),
        }
    }

    /// What `work` added, and what it gives.
    pub(crate) async fn by<T>(work: impl Future<Output = T>) -> (Self, T) {
        let before = Self::now();
        let done = work.await;
        let now = Self::now();
        let more = Self {
            protocol: now.protocol - before.protocol,
            refused: now.refused - before.refused,
            token: now.token - before.token,
            greeting: now.greeting - before.greeting,
            silence: now.silence - before.silence,
            warned: now.warned - before.warned,
        };
        (more, done)
    }

    /// A session that a breach of the protocol ended: counted and logged once.
    pub(crate) fn breach() -> Self {
        Self {
            protocol: 1,
            warned: 1,
            ..Self::default()
        }
    }
}
