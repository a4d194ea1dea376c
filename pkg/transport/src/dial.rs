// SPDX-License-Identifier: Apache-2.0
//! Connecting to the other side of a VM's boundary.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use podhull_types::{Cid, Deadline, VsockPort};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_vsock::{VsockAddr, VsockStream};

use crate::error::TransportError;
use crate::lease::Lease;
use crate::transport::{Peer, VsockTransport};

/// Longest answer to CONNECT: `OK ` and a 32-bit port.
const MAX_ANSWER: usize = 32;

/// Where a guest is reached from the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestAddress {
    /// Through the kernel's vhost-vsock.
    Vsock {
        /// The guest's context id.
        cid: Cid,
    },
    /// Through the UNIX socket of a VMM or vsock daemon that understands
    /// `CONNECT <port>` (the convention of Firecracker's `vsock.md`).
    Hybrid {
        /// The socket's path; the guest's own connections arrive at
        /// `<socket>_<port>`.
        socket: PathBuf,
    },
}

impl fmt::Display for GuestAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock { cid } => write!(f, "cid {cid}"),
            Self::Hybrid { socket } => write!(f, "{}", socket.display()),
        }
    }
}

impl GuestAddress {
    /// Connects to `port` of the guest. Cancel safe: nothing stays open.
    ///
    /// It takes a lease on the VM, which only its [`LeaseSet`](crate::LeaseSet)
    /// hands out:
    /// ```
    /// # use podhull_transport::*;
    /// # use podhull_types::{Deadline, VsockPort};
    /// # async fn f(guest: GuestAddress, lease: Lease, by: Deadline) {
    /// let transport = guest.dial(VsockPort::SESSIONS, lease, by).await;
    /// # }
    /// ```
    /// ```compile_fail,E0061
    /// # use podhull_transport::*;
    /// # use podhull_types::{Deadline, VsockPort};
    /// # async fn f(guest: GuestAddress, by: Deadline) {
    /// let transport = guest.dial(VsockPort::SESSIONS, by).await;
    /// # }
    /// ```
    /// ```compile_fail,E0382
    /// # use podhull_transport::*;
    /// # use podhull_types::{Deadline, VsockPort};
    /// # async fn f(guest: GuestAddress, lease: Lease, by: Deadline) {
    /// let first = guest.dial(VsockPort::SESSIONS, lease, by).await;
    /// let second = guest.dial(VsockPort::SESSIONS, lease, by).await;
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`TransportError::Dial`] or [`TransportError::Refused`] if the guest does
    /// not listen there, [`TransportError::Deadline`] if it did not answer.
    pub async fn dial(
        &self,
        port: VsockPort,
        lease: Lease,
        by: Deadline,
    ) -> Result<VsockTransport, TransportError> {
        let connecting = async {
            match self {
                Self::Vsock { cid } => connect_vsock(*cid, port).await,
                Self::Hybrid { socket } => {
                    let stream = UnixStream::connect(socket)
                        .await
                        .map_err(|source| TransportError::Dial { port, source })?;
                    ask_hybrid(stream, port).await
                }
            }
        };
        let fd = by
            .run(connecting)
            .await
            .map_err(TransportError::deadline("connect"))??;
        VsockTransport::adopt(fd, Peer::Guest(port), lease)
    }
}

/// Connects to `port` of the host; for the guest's side. Cancel safe.
///
/// # Errors
/// As [`GuestAddress::dial`].
pub async fn dial_host(
    port: VsockPort,
    lease: Lease,
    by: Deadline,
) -> Result<VsockTransport, TransportError> {
    let fd = by
        .run(connect_vsock(Cid::HOST, port))
        .await
        .map_err(TransportError::deadline("connect to the host"))??;
    VsockTransport::adopt(fd, Peer::Host(port), lease)
}

async fn connect_vsock(cid: Cid, port: VsockPort) -> Result<OwnedFd, TransportError> {
    patiently(|| VsockStream::connect(VsockAddr::new(cid.0, port.0)))
        .await
        .map(OwnedFd::from)
        .map_err(|source| TransportError::Dial { port, source })
}

/// Connects, however long the guest takes: the kernel gives up after 2 s
/// (vsock(7), SO_VM_SOCKETS_CONNECT_TIMEOUT), and a guest that was paused for
/// longer is still there. The caller's deadline ends it.
async fn patiently<T, F>(connect: impl Fn() -> F) -> io::Result<T>
where
    F: Future<Output = io::Result<T>>,
{
    loop {
        match connect().await {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                tracing::debug!("the guest does not answer yet");
            }
            result => return result,
        }
    }
}

async fn ask_hybrid(mut stream: UnixStream, port: VsockPort) -> Result<OwnedFd, TransportError> {
    let dial = |source| TransportError::Dial { port, source };
    // One write: a daemon may refuse a line that comes in two pieces.
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await
        .map_err(dial)?;
    // Byte by byte: what follows the line belongs to the connection's user.
    let mut answer = Vec::with_capacity(MAX_ANSWER);
    while answer.last() != Some(&b'\n') && answer.len() < MAX_ANSWER {
        match stream.read_u8().await {
            Ok(byte) => answer.push(byte),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(dial(error)),
        }
    }
    let answer = String::from_utf8_lossy(&answer);
    if !(answer.starts_with("OK ") && answer.ends_with('\n')) {
        return Err(TransportError::Refused {
            port,
            answer: answer.into_owned(),
        });
    }
    stream.into_std().map(OwnedFd::from).map_err(dial)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::net::UnixListener;

    use super::*;
    use crate::lease::{Holder, HolderKind, LeaseSet};

    /// Dials a fake daemon that reads the request and answers `answer`.
    async fn dial_answered(answer: &'static [u8]) -> Result<Vec<u8>, TransportError> {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("vm");
        let listener = UnixListener::bind(&socket).unwrap();
        let daemon = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 13];
            stream.read_exact(&mut request).await.unwrap();
            assert_eq!(&request, b"CONNECT 1025\n");
            stream.write_all(answer).await.unwrap();
        });
        let lease = LeaseSet::new("vm")
            .issue(Holder::new(HolderKind::Session, "t"))
            .unwrap();
        let by = Deadline::after(Duration::from_secs(5));
        let transport = GuestAddress::Hybrid { socket }
            .dial(VsockPort::SESSIONS, lease, by)
            .await?;
        daemon.await.unwrap();
        let mut rest = Vec::new();
        transport.io()?.read_to_end(&mut rest).await.unwrap();
        assert!(transport.close(by).await.is_clean());
        Ok(rest)
    }

    #[tokio::test]
    async fn l7_a_dial_gives_a_transport_with_the_bytes_behind_the_answer() {
        assert_eq!(
            dial_answered(b"OK 1073741824\nhello").await.unwrap(),
            b"hello"
        );
    }

    #[tokio::test]
    async fn a_closed_port_is_refused() {
        let error = dial_answered(b"").await.unwrap_err();
        assert!(matches!(error, TransportError::Refused { answer, .. } if answer.is_empty()));
    }

    #[tokio::test]
    async fn an_endless_answer_is_refused() {
        let error = dial_answered(&[b'x'; 4096]).await.unwrap_err();
        assert!(
            matches!(error, TransportError::Refused { answer, .. } if answer.len() == MAX_ANSWER)
        );
    }

    #[tokio::test]
    async fn l5_a_guest_that_is_slow_to_answer_is_waited_for() {
        let asked = std::cell::Cell::new(0);
        let connect = async || {
            asked.set(asked.get() + 1);
            match asked.get() {
                1 | 2 => Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)),
                _ => Ok(()),
            }
        };
        patiently(connect).await.unwrap();
        assert_eq!(asked.get(), 3);
    }

    #[tokio::test]
    async fn l5_a_guest_that_is_gone_is_not_waited_for() {
        let gone = async || Err::<(), _>(io::Error::from_raw_os_error(libc::ECONNRESET));
        let error = patiently(gone).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn l5_an_absent_vm_is_an_error_at_once() {
        let lease = LeaseSet::new("vm")
            .issue(Holder::new(HolderKind::Session, "t"))
            .unwrap();
        let gone = GuestAddress::Hybrid {
            socket: "/nonexistent/vm".into(),
        };
        let error = gone
            .dial(
                VsockPort::SESSIONS,
                lease,
                Deadline::after(Duration::from_secs(5)),
            )
            .await
            .unwrap_err();
        assert!(matches!(error, TransportError::Dial { .. }));
    }
}
