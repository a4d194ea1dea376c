// SPDX-License-Identifier: Apache-2.0
//! One owned connection to a guest.

use std::fmt;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use podhull_types::{Cid, Deadline, VsockPort};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;

use crate::conn::{Conn, Direction, View};
use crate::error::TransportError;
use crate::lease::{Holder, Lease};
use crate::metrics;
use crate::report::{CloseReport, Outcome};

/// Most bytes in one write to a guest. vhost-device-vsock 0.3 loses a packet
/// that the kernel made of several pages, and with it the connection; up to
/// this size a packet is always one piece.
pub(crate) const MAX_WRITE: usize = 16 * 1024;
/// Most pieces of one write.
pub(crate) const PIECES: usize = 8;

/// The other end of a transport, for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// A port of the guest.
    Guest(VsockPort),
    /// A port of the host, seen from the guest.
    Host(VsockPort),
    /// Somebody who connected to a listener of ours.
    Accepted {
        /// The listener's port.
        port: VsockPort,
        /// The peer's context id, where the kernel says it.
        cid: Option<Cid>,
    },
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest(port) => write!(f, "guest port {port}"),
            Self::Host(port) => write!(f, "host port {port}"),
            Self::Accepted {
                port,
                cid: Some(cid),
            } => write!(f, "cid {cid} at port {port}"),
            Self::Accepted { port, cid: None } => write!(f, "peer at port {port}"),
        }
    }
}

/// AF_UNIX or AF_VSOCK: tokio's type serves any stream socket, as it only
/// polls, reads and writes.
#[derive(Debug)]
struct Socket(UnixStream);

impl Drop for Socket {
    fn drop(&mut self) {
        metrics::OPEN.dec();
    }
}

/// One connection to the guest: the only owner of its descriptor, and a lease
/// on the VM for as long as the descriptor is open.
///
/// Close it with [`close`](Self::close); that reports. Dropping it unclosed
/// closes it too, logs a warning and counts it.
///
/// One that is closed cannot be used, nor closed again:
/// ```
/// # use podhull_transport::VsockTransport;
/// # async fn f(transport: VsockTransport, by: podhull_types::Deadline) {
/// assert!(transport.io().is_ok());
/// assert!(transport.close(by).await.is_clean());
/// # }
/// ```
/// ```compile_fail,E0382
/// # use podhull_transport::VsockTransport;
/// # async fn f(transport: VsockTransport, by: podhull_types::Deadline) {
/// assert!(transport.close(by).await.is_clean());
/// assert!(transport.io().is_ok());
/// # }
/// ```
/// ```compile_fail,E0382
/// # use podhull_transport::VsockTransport;
/// # async fn f(transport: VsockTransport, by: podhull_types::Deadline) {
/// assert!(transport.close(by).await.is_clean());
/// assert!(transport.close(by).await.is_clean());
/// # }
/// ```
/// Its descriptor is nobody else's, not even to look at:
/// ```compile_fail,E0277
/// # use podhull_transport::VsockTransport;
/// fn take(_: impl std::os::fd::AsFd) {}
/// # fn f(transport: &VsockTransport) {
/// take(transport);
/// # }
/// ```
#[derive(Debug)]
#[must_use = "dropping a transport closes it"]
pub struct VsockTransport {
    // Dropped in this order: the descriptor is closed when that is told.
    conn: Conn<Socket>,
    unclosed: Unclosed,
}

/// Tells of a transport that was dropped.
#[derive(Debug)]
struct Unclosed {
    peer: Peer,
    /// False once it is closed, and while whoever prepares it may be cancelled,
    /// its view with it: to drop it then is no mistake.
    is_mistake: bool,
}

impl Drop for Unclosed {
    fn drop(&mut self) {
        if self.is_mistake {
            metrics::DROPPED_UNCLOSED.inc();
            tracing::warn!(peer = %self.peer, "transport dropped without close");
        }
    }
}

impl VsockTransport {
    /// Takes ownership of a connected stream socket. Must be called inside a
    /// tokio runtime. The descriptor is made non-blocking.
    ///
    /// # Errors
    /// [`TransportError::Io`] if the descriptor cannot be watched; it is closed
    /// and the lease released then.
    pub fn adopt(fd: OwnedFd, peer: Peer, lease: Lease) -> Result<Self, TransportError> {
        let socket = net::UnixStream::from(fd);
        socket
            .set_nonblocking(true)
            .map_err(TransportError::io("make the socket non-blocking"))?;
        let socket =
            UnixStream::from_std(socket).map_err(TransportError::io("watch the socket"))?;
        metrics::OPEN.inc();
        lease.connected_to(peer.to_string());
        Ok(Self {
            conn: Conn::new(Socket(socket), lease),
            unclosed: Unclosed {
                peer,
                is_mistake: true,
            },
        })
    }

    pub(crate) fn set_preparing(&mut self, preparing: bool) {
        self.unclosed.is_mistake = !preparing;
    }

    /// The other end.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.unclosed.peer
    }

    /// Says whom the VM is held for from now on.
    pub fn rename_holder(&self, holder: Holder) {
        self.conn.lease().rename(holder);
    }

    /// The one view through which bytes are read and written. It keeps the
    /// descriptor and the VM until it is dropped; after `close` it fails with
    /// `ConnectionAborted`.
    ///
    /// # Errors
    /// [`TransportError::InUse`] while another view exists.
    pub fn io(&self) -> Result<TransportIo, TransportError> {
        let view = self.conn.view().ok_or(TransportError::InUse)?;
        Ok(TransportIo { view })
    }

    /// A transport with a descriptor (close-on-exec) and a lease of its own on
    /// the same connection. This one stays open. It is for who hands a connection
    /// on and keeps it: nobody in podhull does, the contract (L2) has it.
    ///
    /// # Errors
    /// [`TransportError::Io`] if the process has no descriptor left.
    pub fn try_dup(&self) -> Result<Self, TransportError> {
        let fd = self
            .conn
            .socket()
            .0
            .as_fd()
            .try_clone_to_owned()
            .map_err(TransportError::io("duplicate"))?;
        Self::adopt(fd, self.peer().clone(), self.conn.lease().clone())
    }

    /// Ends the view, waits until it is gone, then closes the descriptor and
    /// releases the VM. Not cancel safe: a cancelled close goes on as a drop.
    pub async fn close(self, by: Deadline) -> CloseReport {
        let Self { conn, mut unclosed } = self;
        unclosed.is_mistake = false;
        conn.begin_close();
        let unused = poll_fn(|cx| conn.poll_unused(cx));
        let outcome = match by.run(unused).await {
            Ok(()) => Outcome::Clean,
            // Closing the number under a reader would let it be reused: it is
            // closed when the view goes.
            Err(_) => Outcome::Forced(format!("{}: a view is still in use", unclosed.peer)),
        };
        CloseReport::of("transport", outcome)
    }
}

/// The view of a transport: a byte stream in both directions.
///
/// Shutting down only flushes: half-close does not survive most vsock backends,
/// so the ends of streams are frames (see [`crate::session`]).
#[derive(Debug)]
pub struct TransportIo {
    view: View<Socket>,
}

impl AsyncRead for TransportIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let Socket(socket) = self.view.socket(Direction::Read, cx)?;
            ready!(socket.poll_read_ready(cx))?;
            match socket.try_read_buf(buf) {
                Ok(_) => return Poll::Ready(Ok(())),
                Err(error) if is_retried(&error) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

fn is_retried(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

impl AsyncWrite for TransportIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let buf = buf.get(..MAX_WRITE).unwrap_or(buf);
        loop {
            let Socket(socket) = self.view.socket(Direction::Write, cx)?;
            ready!(socket.poll_write_ready(cx))?;
            match socket.try_write(buf) {
                Err(error) if is_retried(&error) => {}
                result => return Poll::Ready(result),
            }
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut room = MAX_WRITE;
        let mut slices = [IoSlice::new(&[]); PIECES];
        for (slice, buf) in slices.iter_mut().zip(bufs) {
            *slice = IoSlice::new(buf.get(..room).unwrap_or(buf));
            room -= slice.len();
        }
        loop {
            let Socket(socket) = self.view.socket(Direction::Write, cx)?;
            ready!(socket.poll_write_ready(cx))?;
            match socket.try_write_vectored(&slices) {
                Err(error) if is_retried(&error) => {}
                result => return Poll::Ready(result),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::lease::{HolderKind, LeaseSet};

    fn adopted() -> (VsockTransport, UnixStream) {
        let (ours, theirs) = net::UnixStream::pair().unwrap();
        let lease = LeaseSet::new("vm")
            .issue(Holder::new(HolderKind::Session, "test"))
            .unwrap();
        let transport =
            VsockTransport::adopt(ours.into(), Peer::Guest(VsockPort::SESSIONS), lease).unwrap();
        theirs.set_nonblocking(true).unwrap();
        (transport, UnixStream::from_std(theirs).unwrap())
    }

    fn flags(fd: impl AsFd) -> FdFlag {
        FdFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFD).unwrap())
    }

    /// The call that found the descriptor dead in the seed.
    #[tokio::test]
    async fn l1_the_descriptor_is_valid_by_fcntl_after_every_other_copy_went_away() {
        let (transport, mut peer) = adopted();
        let mut io = transport.io().unwrap();
        let copies: Vec<_> = (0..3).map(|_| transport.try_dup().unwrap()).collect();
        for copy in copies {
            assert!(copy.close(Deadline::after(Duration::ZERO)).await.is_clean());
        }
        // The owner, too: the view is the last copy.
        drop(transport);
        let cx = &Context::from_waker(std::task::Waker::noop());
        assert!(io.view.socket(Direction::Read, cx).is_err(), "unusable");
        assert!(flags(&io.view.descriptor().0).contains(FdFlag::FD_CLOEXEC));
        assert!(peer.try_read(&mut [0]).is_err(), "not yet at its end");
        assert!(io.write_all(b"x").await.is_err());
        drop(io);
        assert_eq!(peer.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn no_write_is_larger_than_a_guest_takes() {
        let (transport, _peer) = adopted();
        let mut io = transport.io().unwrap();
        let buffer = [0; 40_000];
        assert_eq!(io.write(&buffer).await.unwrap(), MAX_WRITE);
        let pieces = [10, 10_000, 40_000, 40_000].map(|size| IoSlice::new(&buffer[..size]));
        assert_eq!(io.write_vectored(&pieces).await.unwrap(), MAX_WRITE);
        drop(io);
        assert!(
            transport
                .close(Deadline::after(Duration::ZERO))
                .await
                .is_clean()
        );
    }

    #[tokio::test]
    async fn l2_a_duplicate_is_valid_by_fcntl_and_closed_in_children() {
        let (transport, _peer) = adopted();
        let duplicate = transport.try_dup().unwrap();
        assert!(
            transport
                .close(Deadline::after(Duration::ZERO))
                .await
                .is_clean()
        );
        let socket = duplicate.conn.socket();
        assert!(flags(&socket.0).contains(FdFlag::FD_CLOEXEC));
        assert!(
            duplicate
                .close(Deadline::after(Duration::ZERO))
                .await
                .is_clean()
        );
    }
}
