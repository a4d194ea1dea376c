// SPDX-License-Identifier: Apache-2.0
//! Between a session and a local TCP connection.
//!
//! A relay owns the whole session: its handle, and so the transport and the VM's
//! lease, live as long as bytes move. An end on one side is passed on and leaves
//! the other direction open; anything else than an end resets both sides.

use std::future::pending;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use podhull_types::Deadline;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{GuestSession, HostSession, StreamReader, StreamWriter};
use crate::report::CloseReport;

/// Time for a session's last frames once its streams have ended.
const CLOSE: Duration = Duration::from_secs(2);

/// What a relay did.
#[derive(Debug)]
pub struct RelayReport {
    /// Bytes from the local connection to the peer.
    pub sent: u64,
    /// Bytes from the peer to the local connection.
    pub received: u64,
    /// Why it ended before both sides had ended.
    pub cut: Option<io::Error>,
    /// How the session's end went.
    pub closed: CloseReport,
}

/// Makes the peer of `local` see a reset instead of an end.
pub fn reset(local: TcpStream) {
    let at_once = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    if let Err(error) = setsockopt(&local, sockopt::Linger, &at_once) {
        tracing::debug!(%error, "a connection ends instead of being reset");
    }
    drop(local);
}

impl HostSession {
    /// Carries bytes between `local` and the guest until both directions have
    /// ended, one of them breaks, or `give_up` resolves. Not cancel safe: a
    /// cancelled relay drops the session.
    pub async fn relay(self, local: TcpStream, give_up: impl Future<Output = ()>) -> RelayReport {
        self.relay_until(local, pending(), give_up).await
    }

    /// As [`relay`](Self::relay), but once `unserved` resolves nobody in the
    /// guest reads any more: what comes from there is still delivered, and the
    /// local side's end is not waited for.
    pub async fn relay_until(
        self,
        local: TcpStream,
        unserved: impl Future<Output = ()>,
        give_up: impl Future<Output = ()>,
    ) -> RelayReport {
        let Self {
            input,
            output,
            error,
            handle,
        } = self;
        drop(error);
        let report = relay(local, input, output, unserved, give_up).await;
        let closed = handle.close(Deadline::after(CLOSE)).await;
        RelayReport { closed, ..report }
    }
}

impl GuestSession {
    /// As [`HostSession::relay`], between the host and a server of the guest.
    pub async fn relay(self, local: TcpStream, give_up: impl Future<Output = ()>) -> RelayReport {
        let Self {
            input,
            output,
            error,
            handle,
        } = self;
        drop(error);
        let mut give_up = pin!(give_up);
        let report = relay(local, output, input, pending(), &mut give_up).await;
        if report.cut.is_none() {
            // The host hangs up once it has everything: hanging up first could
            // lose it on the way.
            tokio::select! {
                () = handle.closed() => {}
                () = give_up => {}
            }
        }
        let closed = handle.close(Deadline::after(CLOSE)).await;
        RelayReport { closed, ..report }
    }
}

async fn relay(
    mut local: TcpStream,
    to_peer: StreamWriter,
    from_peer: StreamReader,
    unserved: impl Future<Output = ()>,
    give_up: impl Future<Output = ()>,
) -> RelayReport {
    let (sent, received) = (AtomicU64::new(0), AtomicU64::new(0));
    let result = {
        let (from_local, to_local) = local.split();
        // Kept to the end of both: a stream that is dropped early is cut, and
        // the peer would cut the other direction with it.
        let mut there = pin!(send(from_local, to_peer, &sent));
        let there = async {
            tokio::select! {
                result = &mut there => result,
                () = unserved => Ok(()),
            }
        };
        let both = async { tokio::try_join!(there, deliver(from_peer, to_local, &received)) };
        tokio::select! {
            result = both => result.map(drop),
            () = give_up => Err(io::Error::new(io::ErrorKind::TimedOut, "given up")),
        }
    };
    let cut = result.err();
    if cut.is_some() {
        reset(local);
    }
    RelayReport {
        sent: sent.into_inner(),
        received: received.into_inner(),
        cut,
        closed: CloseReport::default(),
    }
}

/// Sends what comes from the local side until its end, and passes that on. Both
/// ends are dropped with it, so a stream that was not copied whole is seen to be
/// cut.
async fn send(
    mut from: impl AsyncRead + Unpin,
    mut to: StreamWriter,
    copied: &AtomicU64,
) -> io::Result<()> {
    loop {
        match to.send_from(&mut from).await? {
            0 => {
                to.finish();
                return Ok(());
            }
            count => copied.fetch_add(count as u64, Ordering::Relaxed),
        };
    }
}

/// The other direction.
async fn deliver(
    mut from: StreamReader,
    mut to: impl AsyncWrite + Unpin,
    copied: &AtomicU64,
) -> io::Result<()> {
    while let Some(chunk) = from.chunk().await? {
        to.write_all(&chunk).await?;
        copied.fetch_add(chunk.len() as u64, Ordering::Relaxed);
    }
    to.shutdown().await
}
