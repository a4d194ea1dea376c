// SPDX-License-Identifier: Apache-2.0
//! Accepting the host's sessions.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use podhull_transport::{
    IncomingSession, SessionTarget, VsockListener, VsockTransport, receive_session, reset,
};
use podhull_types::{Deadline, ProcessRef, Token};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use crate::containers::Containers;
use crate::refused::Refused;
use crate::stdio;

/// Time for a session's first frame: the host sends it at once.
const GREETING: Duration = Duration::from_secs(10);

/// Most connections that have not said yet who they are.
const STRANGERS: usize = 256;

/// Accepts sessions until the listener ends. One that fails ends only itself;
/// all end with this future.
pub(crate) async fn serve(
    listener: VsockListener,
    token: Token,
    containers: Containers,
    refused: Refused,
) {
    let strangers = Arc::new(Semaphore::new(STRANGERS));
    let mut sessions = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(ended) = sessions.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a session died");
                }
                continue;
            }
        };
        match accepted {
            Ok(transport) => match Arc::clone(&strangers).try_acquire_owned() {
                Ok(stranger) => {
                    let (token, containers) = (token.clone(), containers.clone());
                    let refused = refused.clone();
                    sessions.spawn(session(transport, stranger, token, containers, refused));
                }
                Err(_) => {
                    refused.one_too_many();
                    let report = transport.close(Deadline::after(Duration::ZERO)).await;
                    tracing::warn!(%report, "too many connections that say nothing");
                }
            },
            Err(error) => {
                tracing::error!(%error, "no more sessions");
                return;
            }
        }
    }
}

async fn session(
    transport: VsockTransport,
    stranger: OwnedSemaphorePermit,
    token: Token,
    containers: Containers,
    refused: Refused,
) {
    let by = Deadline::after(GREETING);
    let received = receive_session(transport, &token, by).await;
    drop(stranger);
    match received {
        Ok(incoming) => match incoming.target().clone() {
            SessionTarget::Process(id) => process(incoming, &id, &containers, by).await,
            SessionTarget::Forward { port } => forward(incoming, port, by).await,
        },
        Err(error) => {
            refused.greeting_failed(&error);
            tracing::warn!(%error, "session refused");
        }
    }
}

async fn process(
    incoming: IncomingSession,
    id: &ProcessRef,
    containers: &Containers,
    by: Deadline,
) {
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

/// Connects to a server on the guest's loopback.
async fn connect(port: u16, by: Deadline) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::ConnectionRefused);
    for address in [
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ] {
        match by
            .run(TcpStream::connect(SocketAddr::new(address, port)))
            .await
        {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
    }
    Err(last)
}

async fn forward(incoming: IncomingSession, port: u16, by: Deadline) {
    let stream = match connect(port, by).await {
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
    use std::path::Path;

    use podhull_transport::{Holder, HolderKind, LeaseSet, Peer, SessionError, open_session};
    use podhull_types::{ContainerId, VsockPort};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

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

    /// What a host that has the token is told.
    async fn ask(stream: UnixStream) -> SessionError {
        let lease = LeaseSet::new("vm")
            .issue(Holder::new(HolderKind::Session, "test"))
            .unwrap();
        let fd = stream.into_std().unwrap().into();
        let transport = VsockTransport::adopt(fd, Peer::Guest(VsockPort::SESSIONS), lease).unwrap();
        let target = SessionTarget::Process(ProcessRef::init(ContainerId::new("c1").unwrap()));
        let opened = open_session(transport, &Token::from_bytes(TOKEN), &target, soon()).await;
        opened.map(drop).unwrap_err()
    }

    /// Who says nothing takes a place, and gives it back.
    #[tokio::test]
    async fn strangers_are_limited_and_make_room_when_they_go() {
        let folder = tempfile::tempdir().unwrap();
        let vm = folder.path().join("vm");
        let leases = LeaseSet::new("guest");
        let listener =
            VsockListener::bind_hybrid(&vm, VsockPort::SESSIONS, leases.clone()).unwrap();
        let socket = folder.path().join(format!("vm_{}", VsockPort::SESSIONS));
        let containers = Containers::new(Reaper::default(), Events::default());
        let token = Token::from_bytes(TOKEN);
        let serving = tokio::spawn(serve(listener, token, containers, Refused::default()));

        let mut silent = Vec::new();
        for number in 1..=STRANGERS {
            let connecting = connect(&socket, &leases, number);
            silent.push(soon().run(connecting).await.unwrap());
        }
        let mut late = UnixStream::connect(&socket).await.unwrap();
        assert!(has_ended(&mut late).await, "one too many is kept");
        assert_eq!(leases.held().len(), STRANGERS, "one of the others is not");

        // One breaks the protocol: there is room for somebody else, and for no more.
        let mut first = silent.remove(0);
        first.write_all(&[0; 8]).await.unwrap();
        assert!(has_ended(&mut first).await);
        let next = UnixStream::connect(&socket).await.unwrap();
        let answer = ask(next).await;
        assert!(matches!(answer, SessionError::Refused { .. }), "{answer}");
        let connecting = connect(&socket, &leases, STRANGERS);
        silent.push(soon().run(connecting).await.unwrap());
        let mut late = UnixStream::connect(&socket).await.unwrap();
        assert!(has_ended(&mut late).await, "one too many is kept");

        serving.abort();
        assert!(serving.await.unwrap_err().is_cancelled());
    }
}
