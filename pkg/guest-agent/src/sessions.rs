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
