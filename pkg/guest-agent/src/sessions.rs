// SPDX-License-Identifier: Apache-2.0
//! Accepting the host's sessions.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use podhull_transport::{
    IncomingSession, SessionTarget, TransportError, VsockListener, VsockTransport, receive_session,
    reset,
};
use podhull_types::{Deadline, ProcessRef, Token};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::containers::Containers;
use crate::pod::Pod;
use crate::stdio;

/// Time for a session's first frame, which the host sends at once, and for each
/// step of the answer.
const GREETING: Duration = Duration::from_secs(10);

/// Most connections that are accepted and have not said yet who they are. The next
/// ones wait in the listener's queue: many peers at once are no reason to refuse
/// one, and who says nothing makes room after [`GREETING`].
const STRANGERS: usize = 256;

/// Accepts sessions until `stop`, or until the listener ends. One that fails ends
/// only itself; all have ended when this returns.
pub(crate) async fn serve(
    listener: VsockListener,
    token: Token,
    containers: Containers,
    stop: CancellationToken,
) {
    let strangers = Arc::new(Semaphore::new(STRANGERS));
    let mut sessions = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = next(&listener, &strangers) => accepted,
            Some(ended) = sessions.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a session died");
                }
                continue;
            }
        };
        match accepted {
            Ok((transport, stranger)) => {
                let (token, containers) = (token.clone(), containers.clone());
                sessions.spawn(session(transport, stranger, token, containers));
            }
            Err(error) => {
                tracing::error!(%error, "no more sessions");
                break;
            }
        }
    }
    let report = listener.close();
    tracing::debug!(%report, "no more sessions are accepted");
    sessions.shutdown().await;
}

/// The next connection, once there is a place for it. Cancel safe.
async fn next(
    listener: &VsockListener,
    strangers: &Arc<Semaphore>,
) -> Result<(VsockTransport, OwnedSemaphorePermit), TransportError> {
    let Ok(stranger) = Arc::clone(strangers).acquire_owned().await else {
        unreachable!("nobody closes the semaphore")
    };
    Ok((listener.accept().await?, stranger))
}

async fn session(
    transport: VsockTransport,
    stranger: OwnedSemaphorePermit,
    token: Token,
    containers: Containers,
) {
    let by = Deadline::after(GREETING);
    let received = receive_session(transport, &token, by).await;
    drop(stranger);
    // Otherwise it was counted and told where it was received.
    if let Ok(incoming) = received {
        match incoming.target().clone() {
            SessionTarget::Process(id) => process(incoming, &id, &containers).await,
            SessionTarget::Forward { port } => {
                let by = Deadline::after(GREETING);
                forward(incoming, containers.pod(), port, by).await;
            }
        }
    }
}

async fn process(incoming: IncomingSession, id: &ProcessRef, containers: &Containers) {
    let by = Deadline::after(GREETING);
    let process = match containers.process(id) {
        Ok(process) => process,
        Err(error) => {
            tracing::warn!(process = %id, %error, "session refused");
            return incoming.refuse(&error.to_string(), by).await;
        }
    };
    let session = match incoming.accept(by).await {
        Ok(session) => session,
        Err(error) => {
            tracing::debug!(process = %id, %error, "the host is gone");
            return;
        }
    };
    // An added process's terminal is there once it was started.
    let ends = tokio::select! {
        ends = process.take_ends() => ends,
        () = process.give_up.cancelled() => None,
        () = session.handle.closed() => None,
    };
    let Some(ends) = ends else {
        let report = session.handle.close(Deadline::after(GREETING)).await;
        tracing::debug!(process = %id, %report, "session of a process that never ran");
        return;
    };
    stdio::relay(ends, session, process.exit(), process.give_up.clone()).await;
}

/// Connects to a server on the pod's loopback.
async fn connect(pod: &Pod, port: u16, by: Deadline) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::ConnectionRefused);
    for address in [
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ] {
        let address = SocketAddr::new(address, port);
        // A socket stays in the network where it was made.
        let connecting = async {
            let socket = pod.in_network(move || match address {
                SocketAddr::V4(_) => TcpSocket::new_v4(),
                SocketAddr::V6(_) => TcpSocket::new_v6(),
            });
            socket.await?.connect(address).await
        };
        match by.run(connecting).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
    }
    Err(last)
}

/// Serves a forwarded connection, if a server is found before `found_by`.
async fn forward(incoming: IncomingSession, pod: &Pod, port: u16, found_by: Deadline) {
    let found = connect(pod, port, found_by).await;
    // Whatever that took.
    let by = Deadline::after(GREETING);
    let stream = match found {
        Ok(stream) => stream,
        Err(error) => return incoming.refuse(&format!("port {port}: {error}"), by).await,
    };
    let session = match incoming.accept(by).await {
        Ok(session) => session,
        Err(error) => {
            tracing::debug!(port, %error, "the host is gone");
            return reset(stream);
        }
    };
    // Its end comes with the host's, or with the VM's.
    let report = session.relay(stream, std::future::pending()).await;
    tracing::debug!(port, ?report, "forwarded connection closed");
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use podhull_transport::{Holder, HolderKind, LeaseSet, Peer, SessionError, open_session};
    use podhull_types::{ContainerId, VsockPort};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;
    use tokio::task::JoinHandle;

    use super::*;
    use crate::events::Events;
    use crate::reaper::Reaper;

    const TOKEN: [u8; Token::LEN] = [5; Token::LEN];

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(5))
    }

    /// Connects; the agent has accepted `held` connections then.
    async fn connect(socket: &Path, leases: &LeaseSet, held: usize) -> UnixStream {
        let stream = UnixStream::connect(socket).await.unwrap();
        while leases.held().len() < held {
            tokio::task::yield_now().await;
        }
        stream
    }

    async fn has_ended(stream: &mut UnixStream) -> bool {
        matches!(soon().run(stream.read(&mut [0])).await, Ok(Ok(0) | Err(_)))
    }

    /// What a host that has this token is told.
    async fn ask(stream: UnixStream, token: [u8; Token::LEN]) -> SessionError {
        let lease = LeaseSet::new("vm")
            .issue(Holder::new(HolderKind::Session, "test"))
            .unwrap();
        let fd = stream.into_std().unwrap().into();
        let transport = VsockTransport::adopt(fd, Peer::Guest(VsockPort::SESSIONS), lease).unwrap();
        let target = SessionTarget::Process(ProcessRef::init(ContainerId::new("c1").unwrap()));
        let opened = open_session(transport, &Token::from_bytes(token), &target, soon()).await;
        opened.map(drop).unwrap_err()
    }

    /// Sessions that are accepted at a socket of the test's.
    struct Serving {
        _folder: tempfile::TempDir,
        socket: PathBuf,
        leases: LeaseSet,
        stop: CancellationToken,
        task: JoinHandle<()>,
    }

    impl Serving {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let vm = folder.path().join("vm");
            let leases = LeaseSet::new("guest");
            let listener =
                VsockListener::bind_hybrid(&vm, VsockPort::SESSIONS, leases.clone()).unwrap();
            let containers = Containers::new(Reaper::default(), Events::default());
            let stop = CancellationToken::new();
            let token = Token::from_bytes(TOKEN);
            Self {
                socket: folder.path().join(format!("vm_{}", VsockPort::SESSIONS)),
                _folder: folder,
                task: tokio::spawn(serve(listener, token, containers, stop.clone())),
                leases,
                stop,
            }
        }

        /// Ends it, and waits for that; its folder stays.
        async fn end(&mut self) {
            self.stop.cancel();
            soon().run(&mut self.task).await.unwrap().unwrap();
        }
    }

    /// Both sides are in this process: each has its line.
    #[tokio::test]
    async fn who_gets_no_session_is_told_of_once() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let lines = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_max_level(tracing::Level::INFO)
            .with_writer(std::sync::Mutex::new(log.reopen().unwrap()));
        let _lines = tracing::subscriber::set_default(lines.finish());
        let mut serving = Serving::new();
        let none = ask(UnixStream::connect(&serving.socket).await.unwrap(), TOKEN).await;
        assert!(matches!(none, SessionError::Refused { .. }), "{none}");
        let other = [6; Token::LEN];
        let wrong = ask(UnixStream::connect(&serving.socket).await.unwrap(), other).await;
        assert!(matches!(wrong, SessionError::Lost(_)), "{wrong}");
        serving.end().await;
        let log = std::fs::read_to_string(log.path()).unwrap();
        let said = |of: &str, what: &str| {
            let about = |line: &&str| line.contains(of) && line.contains(what);
            log.lines().filter(about).count()
        };
        let (guest, transport) = ("podhull_guest_agent::", "podhull_transport::");
        assert_eq!((said(guest, "c1"), said(transport, "c1")), (1, 2), "{log}");
        assert_eq!(said("WARN", "wrong token"), 1, "{log}");
        assert_eq!(log.lines().count(), 4, "{log}");
    }

    /// Who says nothing takes a place, and gives it back: the others wait for it.
    #[tokio::test]
    async fn strangers_are_limited_and_make_room_when_they_go() {
        let mut serving = Serving::new();
        let (socket, leases) = (serving.socket.clone(), serving.leases.clone());
        let mut silent = Vec::new();
        for number in 1..=STRANGERS {
            let connecting = connect(&socket, &leases, number);
            silent.push(soon().run(connecting).await.unwrap());
        }
        let next = UnixStream::connect(&socket).await.unwrap();
        let mut answer = Box::pin(ask(next, TOKEN));
        let early = tokio::time::timeout(Duration::from_millis(200), &mut answer);
        assert!(early.await.is_err(), "one too many is let in");
        assert_eq!(leases.held().len(), STRANGERS, "one of the others is not");

        // One breaks the protocol: there is room for the next.
        let mut first = silent.remove(0);
        first.write_all(&[0; 8]).await.unwrap();
        assert!(has_ended(&mut first).await);
        let answer = answer.await;
        assert!(matches!(answer, SessionError::Refused { .. }), "{answer}");
        let connecting = connect(&socket, &leases, STRANGERS);
        silent.push(soon().run(connecting).await.unwrap());

        // All end with it, and are gone when it is.
        serving.end().await;
        assert!(leases.held().is_empty());
        for stranger in &mut silent {
            assert!(has_ended(stranger).await);
        }
        assert!(UnixStream::connect(&socket).await.is_err(), "it listens");
    }
    /// Looking for who listens at the port has taken all the time.
    #[tokio::test]
    async fn a_refusal_has_time_of_its_own() {
        let (mut host, guest) = UnixStream::pair().unwrap();
        let leases = LeaseSet::new("guest");
        let lease = leases.issue(Holder::new(HolderKind::Session, "test"));
        let (fd, peer) = (
            guest.into_std().unwrap().into(),
            Peer::Guest(VsockPort::SESSIONS),
        );
        let transport = VsockTransport::adopt(fd, peer, lease.unwrap()).unwrap();
        let target = [2, 1, 0];
        let hello = [&[1, 0][..], &TOKEN, &target].concat();
        let length = u32::try_from(hello.len()).unwrap().to_le_bytes();
        let hello = [&[1, 0, 0, 0][..], &length, &hello].concat();
        host.write_all(&hello).await.unwrap();
        let token = Token::from_bytes(TOKEN);
        let incoming = receive_session(transport, &token, soon()).await.unwrap();
        let pod = Pod::default();
        let mut refusing = Box::pin(forward(incoming, &pod, 1, Deadline::after(Duration::ZERO)));
        // Hanging up before the host has read it could lose it.
        let early = tokio::time::timeout(Duration::from_millis(100), &mut refusing);
        assert!(early.await.is_err(), "it hangs up at once");
        let said = host.read_u8().await.unwrap();
        assert_eq!(said, 3, "it is no refusal");
        drop(host);
        soon().run(refusing).await.unwrap();
    }
}
