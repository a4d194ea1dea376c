// SPDX-License-Identifier: Apache-2.0
//! Between a session and a local TCP connection.
//!
//! A relay owns the whole session: its handle, and so the transport and the VM's
//! lease, live as long as bytes move. The end of a direction, and that nobody takes
//! its bytes any more, leave the other one alone: what a server has answered before
//! it hung up still arrives. A side that is lost takes both along, as a reset.

use std::future::pending;
use std::io::{self, ErrorKind};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use podhull_types::Deadline;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy, sink};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::{GuestSession, HostSession, StreamReader, StreamWriter};
use crate::report::CloseReport;

/// Time for a session's last frames once its streams have ended.
const CLOSE: Duration = Duration::from_secs(2);
/// Time for the local side to hang up once it has everything and nobody takes what
/// it sends: hanging up on bytes that were not read resets it, and takes the last
/// ones back.
const HANG_UP: Duration = Duration::from_secs(1);

/// What a relay did.
#[derive(Debug)]
pub struct RelayReport {
    /// Bytes from the local connection to the peer.
    pub sent: u64,
    /// Bytes from the peer to the local connection.
    pub received: u64,
    /// Why it did not carry everything.
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
        let (report, _) = relay(local, input, output, unserved, give_up).await;
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
        let (report, sent_all) = relay(local, output, input, pending(), &mut give_up).await;
        if sent_all {
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

/// Why a direction does not go on.
#[derive(Debug)]
enum Broken {
    /// The side that its bytes come from is lost.
    Source(io::Error),
    /// The side that they go to takes no more; what comes from there may go on.
    Sink(io::Error),
}

impl From<Broken> for io::Error {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Source(error) | Broken::Sink(error) => error,
        }
    }
}

/// How a connection's two directions ended.
#[derive(Debug)]
struct Ends {
    /// All of the local side has been sent, and its end.
    sent: bool,
    /// All for the local side has been delivered, and the end.
    delivered: bool,
    cut: Option<io::Error>,
}

impl Ends {
    fn of(there: Result<(), Broken>, back: Result<(), Broken>) -> Self {
        Self {
            sent: there.is_ok(),
            delivered: back.is_ok(),
            cut: there.and(back).err().map(Into::into),
        }
    }

    /// Neither direction goes on.
    fn lost(error: io::Error) -> Self {
        Self {
            sent: false,
            delivered: false,
            cut: Some(error),
        }
    }
}

/// Also tells whether all of the local side has been sent.
async fn relay(
    mut local: TcpStream,
    to_peer: StreamWriter,
    from_peer: StreamReader,
    unserved: impl Future<Output = ()>,
    give_up: impl Future<Output = ()>,
) -> (RelayReport, bool) {
    let (sent, received) = (AtomicU64::new(0), AtomicU64::new(0));
    let ends = {
        let (mut from_local, to_local) = local.split();
        let untaken = Notify::new();
        let there = async {
            let result = send(&mut from_local, to_peer, &sent).await;
            if let Err(Broken::Sink(_)) = result {
                untaken.notify_one();
                // A local side that cannot write on may not read either.
                drop(copy(&mut from_local, &mut sink()).await);
            }
            result
        };
        // Kept to the end of both: a stream that is dropped early is cut, and
        // the peer would cut the other direction with it.
        let mut there = pin!(there);
        let there = async {
            tokio::select! {
                result = &mut there => result,
                () = unserved => Ok(()),
            }
        };
        let back = deliver(from_peer, to_local, &received);
        tokio::select! {
            ends = both(there, back, &untaken) => ends,
            () = give_up => Ends::lost(io::Error::new(ErrorKind::TimedOut, "given up")),
        }
    };
    if !ends.delivered {
        reset(local);
    }
    let report = RelayReport {
        sent: sent.into_inner(),
        received: received.into_inner(),
        cut: ends.cut,
        closed: CloseReport::default(),
    };
    (report, ends.sent)
}

/// Runs both directions to their ends. `untaken` tells that nobody takes what goes
/// `there` any more.
async fn both(
    there: impl Future<Output = Result<(), Broken>>,
    back: impl Future<Output = Result<(), Broken>>,
    untaken: &Notify,
) -> Ends {
    let (mut there, mut back) = (pin!(there), pin!(back));
    let (there, back) = tokio::select! {
        there = &mut there => match there {
            Err(Broken::Source(error)) => return Ends::lost(error),
            there => (there, back.await),
        },
        back = &mut back => match back {
            Err(Broken::Source(error)) => return Ends::lost(error),
            back => {
                let hangs_up = async {
                    untaken.notified().await;
                    tokio::time::sleep(HANG_UP).await;
                };
                tokio::select! {
                    there = &mut there => (there, back),
                    () = hangs_up => (Err(Broken::Sink(ErrorKind::BrokenPipe.into())), back),
                }
            }
        },
    };
    Ends::of(there, back)
}

/// Sends what comes from the local side until its end, and passes that on. Both
/// ends are dropped with it, so a stream that was not copied whole is seen to be
/// cut.
async fn send(
    mut from: impl AsyncRead + Unpin,
    mut to: StreamWriter,
    copied: &AtomicU64,
) -> Result<(), Broken> {
    loop {
        match to.send_while_taken(&mut from).await {
            Ok(0) => {
                to.finish();
                return Ok(());
            }
            Ok(count) => copied.fetch_add(count as u64, Ordering::Relaxed),
            // No connection fails so when it is read.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                return Err(Broken::Sink(error));
            }
            Err(error) => return Err(Broken::Source(error)),
        };
    }
}

/// The other direction.
async fn deliver(
    mut from: StreamReader,
    mut to: impl AsyncWrite + Unpin,
    copied: &AtomicU64,
) -> Result<(), Broken> {
    while let Some(chunk) = from.chunk().await.map_err(Broken::Source)? {
        to.write_all(&chunk).await.map_err(Broken::Sink)?;
        copied.fetch_add(chunk.len() as u64, Ordering::Relaxed);
    }
    to.shutdown().await.map_err(Broken::Sink)
}
