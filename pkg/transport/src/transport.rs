// SPDX-License-Identifier: Apache-2.0
//! One owned connection to a guest.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use futures::task::AtomicWaker;
use podhull_types::{Cid, Deadline, VsockPort};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::Notify;

use crate::error::TransportError;
use crate::lease::{Holder, Lease};
use crate::metrics;
use crate::report::{CloseReport, Outcome};

/// Most bytes in one write to a guest. vhost-device-vsock 0.3 loses a packet
/// that the kernel made of several pages, and with it the connection; up to
/// this size a packet is always one piece.
pub(crate) const MAX_WRITE: usize = 16 * 1024;

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

/// A descriptor and the lease that keeps its VM. Fields are dropped in this
/// order: the descriptor first, the VM's lease last.
#[derive(Debug)]
struct Conn {
    /// AF_UNIX or AF_VSOCK: tokio's type serves any stream socket, as it only
    /// polls, reads and writes.
    socket: UnixStream,
    closing: AtomicBool,
    viewed: AtomicBool,
    reader: AtomicWaker,
    writer: AtomicWaker,
    view_gone: Notify,
    lease: Lease,
}

impl Conn {
    /// Makes every pending and later use of a view fail, and wakes it. The
    /// descriptor stays open as long as the view exists.
    fn begin_close(&self) {
        self.closing.store(true, Ordering::Release);
        self.reader.wake();
        self.writer.wake();
    }

    fn check_open(&self) -> io::Result<()> {
        if self.closing.load(Ordering::Acquire) {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "transport closed",
            ));
        }
        Ok(())
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        metrics::OPEN.dec();
    }
}

/// One connection to the guest: the only owner of its descriptor, and a lease
/// on the VM for as long as the descriptor is open.
///
/// Close it with [`close`](Self::close); that reports. Dropping it unclosed
/// closes it too, logs a warning and counts it.
#[derive(Debug)]
#[must_use = "dropping a transport closes it"]
pub struct VsockTransport {
    // `None` once closed.
    conn: Option<Arc<Conn>>,
    peer: Peer,
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
        let conn = Conn {
            socket,
            closing: AtomicBool::new(false),
            viewed: AtomicBool::new(false),
            reader: AtomicWaker::new(),
            writer: AtomicWaker::new(),
            view_gone: Notify::new(),
            lease,
        };
        Ok(Self {
            conn: Some(Arc::new(conn)),
            peer,
        })
    }

    fn conn(&self) -> Result<&Arc<Conn>, TransportError> {
        self.conn
            .as_ref()
            .ok_or(TransportError::NotUsable { state: "closed" })
    }

    /// The other end.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Says whom the VM is held for from now on.
    pub fn rename_holder(&self, holder: Holder) {
        if let Some(conn) = &self.conn {
            conn.lease.rename(holder);
        }
    }

    /// The one view through which bytes are read and written. It keeps the
    /// descriptor and the VM until it is dropped; after `close` it fails with
    /// `ConnectionAborted`.
    ///
    /// # Errors
    /// [`TransportError::NotUsable`] while another view exists.
    pub fn io(&self) -> Result<TransportIo, TransportError> {
        let conn = self.conn()?;
        if conn.viewed.swap(true, Ordering::AcqRel) {
            return Err(TransportError::NotUsable { state: "in use" });
        }
        Ok(TransportIo {
            conn: Arc::clone(conn),
        })
    }

    /// A transport with a descriptor (close-on-exec) and a lease of its own on
    /// the same connection. This one stays open.
    ///
    /// # Errors
    /// [`TransportError::Io`] if the process has no descriptor left.
    pub fn try_dup(&self) -> Result<Self, TransportError> {
        let conn = self.conn()?;
        let fd = conn
            .socket
            .as_fd()
            .try_clone_to_owned()
            .map_err(TransportError::io("duplicate"))?;
        Self::adopt(fd, self.peer.clone(), conn.lease.clone())
    }

    /// Ends the view, waits until it is gone, then closes the descriptor and
    /// releases the VM. Not cancel safe: a cancelled close goes on as a drop.
    pub async fn close(mut self, by: Deadline) -> CloseReport {
        let Some(conn) = self.conn.take() else {
            return CloseReport::default();
        };
        conn.begin_close();
        let unused = async {
            loop {
                let gone = conn.view_gone.notified();
                tokio::pin!(gone);
                gone.as_mut().enable();
                if !conn.viewed.load(Ordering::Acquire) {
                    return;
                }
                gone.await;
            }
        };
        let outcome = match by.run(unused).await {
            Ok(()) => Outcome::Clean,
            // Closing the number under a reader would let it be reused: it is
            // closed when the view goes.
            Err(_) => Outcome::Forced(format!("{}: a view is still in use", self.peer)),
        };
        CloseReport::of("transport", outcome)
    }
}

impl Drop for VsockTransport {
    fn drop(&mut self) {
        if let Some(conn) = self.conn.take() {
            conn.begin_close();
            metrics::DROPPED_UNCLOSED.inc();
            tracing::warn!(peer = %self.peer, "transport dropped without close");
        }
    }
}

/// The view of a transport: a byte stream in both directions.
///
/// Shutting down only flushes: half-close does not survive most vsock backends,
/// so the ends of streams are frames (see [`crate::session`]).
#[derive(Debug)]
pub struct TransportIo {
    conn: Arc<Conn>,
}

impl Drop for TransportIo {
    fn drop(&mut self) {
        self.conn.viewed.store(false, Ordering::Release);
        self.conn.view_gone.notify_waiters();
    }
}

impl AsyncRead for TransportIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let conn = &self.conn;
        conn.reader.register(cx.waker());
        loop {
            conn.check_open()?;
            ready!(conn.socket.poll_read_ready(cx))?;
            match conn.socket.try_read(buf.initialize_unfilled()) {
                Ok(count) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
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
        let conn = &self.conn;
        conn.writer.register(cx.waker());
        let buf = buf.get(..MAX_WRITE).unwrap_or(buf);
        loop {
            conn.check_open()?;
            ready!(conn.socket.poll_write_ready(cx))?;
            match conn.socket.try_write(buf) {
                Err(error) if is_retried(&error) => {}
                result => return Poll::Ready(result),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
