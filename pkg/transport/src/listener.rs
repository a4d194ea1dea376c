// SPDX-License-Identifier: Apache-2.0
//! Accepting connections from the other side of a VM's boundary.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::socket::{Backlog, listen};
use podhull_types::{Cid, VsockPort, accept_again};
use tokio::net::UnixListener;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr};

use crate::error::TransportError;
use crate::lease::{Holder, HolderKind, LeaseSet};
use crate::metrics;
use crate::report::{CloseReport, Outcome};
use crate::transport::{Peer, VsockTransport};

/// `VMADDR_PORT_ANY` of linux/vm_sockets.h: the kernel chooses a port.
const VMADDR_PORT_ANY: u32 = u32::MAX;

/// Lets as many connections wait for their accept as the system does (sysctl
/// `net.core.somaxconn`). The crate that makes the socket allows 128, and AF_VSOCK
/// resets what is beyond: a burst, or all that came while the guest was frozen.
fn let_wait(listener: &impl AsFd) -> io::Result<()> {
    Ok(listen(listener, Backlog::MAXALLOWABLE)?)
}

#[derive(Debug)]
enum Socket {
    Vsock {
        listener: tokio_vsock::VsockListener,
        only_from: Cid,
    },
    Hybrid {
        listener: UnixListener,
        file: SocketFile,
    },
}

/// The file of a listening socket; it goes with its owner.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl SocketFile {
    fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::warn!(path = %self.0.display(), %error, "a socket's file is left");
        }
    }
}

/// Accepts connections; each one is a transport with a lease of its own, so it
/// lives until its user is done, whatever becomes of the listener.
#[derive(Debug)]
pub struct VsockListener {
    socket: Socket,
    port: VsockPort,
    leases: LeaseSet,
}

impl VsockListener {
    /// Listens for a guest's connections to `port` of the host where a VMM or
    /// daemon forwards them to UNIX sockets: at `<vm_socket>_<port>`, mode 0600.
    ///
    /// # Errors
    /// [`TransportError::Listen`] if the socket cannot be made.
    pub fn bind_hybrid(
        vm_socket: &Path,
        port: VsockPort,
        leases: LeaseSet,
    ) -> Result<Self, TransportError> {
        let mut name = OsString::from(vm_socket);
        name.push(format!("_{port}"));
        let path = PathBuf::from(name);
        let failed = |source| TransportError::Listen {
            at: path.display().to_string(),
            source,
        };
        let listener = UnixListener::bind(&path).map_err(failed)?;
        let file = SocketFile(path.clone());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(Self {
            socket: Socket::Hybrid { listener, file },
            port,
            leases,
        })
    }

    /// Listens on AF_VSOCK at `port`, or at one that the kernel chooses. Peers
    /// with another context id than `only_from` are refused.
    ///
    /// # Errors
    /// [`TransportError::Listen`] if the port is taken or the host has no vsock.
    pub fn bind_vsock(
        port: Option<VsockPort>,
        only_from: Cid,
        leases: LeaseSet,
    ) -> Result<Self, TransportError> {
        let wanted = port.map_or(VMADDR_PORT_ANY, |port| port.0);
        let failed = |source| TransportError::Listen {
            at: format!("vsock port {wanted}"),
            source,
        };
        let listener = tokio_vsock::VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, wanted))
            .map_err(failed)?;
        let_wait(&listener).map_err(failed)?;
        let port = VsockPort(listener.local_addr().map_err(failed)?.port());
        Ok(Self {
            socket: Socket::Vsock {
                listener,
                only_from,
            },
            port,
            leases,
        })
    }

    /// The port it listens at.
    #[must_use]
    pub fn port(&self) -> VsockPort {
        self.port
    }

    /// The next connection. A connection that is lost or not allowed while it
    /// is accepted is logged and counted, and the next one waited for. Cancel
    /// safe.
    ///
    /// # Errors
    /// [`TransportError::Closing`] once the VM is being stopped;
    /// [`TransportError::Io`] if the listener itself is broken.
    pub async fn accept(&self) -> Result<VsockTransport, TransportError> {
        loop {
            let error = match self.accept_one().await {
                Ok(transport) => return Ok(transport),
                Err(error @ TransportError::Closing(_)) => return Err(error),
                Err(error) => error,
            };
            metrics::ACCEPT_FAILED.inc();
            tracing::warn!(port = %self.port, %error, "connection lost in accept");
            if let TransportError::Io { source, .. } = &error
                && !accept_again(source).await
            {
                return Err(error);
            }
        }
    }

    async fn accept_one(&self) -> Result<VsockTransport, TransportError> {
        let failed = |source| TransportError::Io {
            what: "accept",
            source,
        };
        let (fd, cid) = match &self.socket {
            Socket::Vsock {
                listener,
                only_from,
            } => {
                let (stream, peer) = listener.accept().await.map_err(failed)?;
                let cid = Cid(peer.cid());
                if cid != *only_from {
                    return Err(TransportError::WrongPeer {
                        cid,
                        expected: *only_from,
                    });
                }
                (OwnedFd::from(stream), Some(cid))
            }
            Socket::Hybrid { listener, .. } => {
                let (stream, _) = listener.accept().await.map_err(failed)?;
                (OwnedFd::from(stream.into_std().map_err(failed)?), None)
            }
        };
        let peer = Peer::Accepted {
            port: self.port,
            cid,
        };
        let lease = self
            .leases
            .issue(Holder::new(HolderKind::Listener, peer.to_string()))?;
        VsockTransport::adopt(fd, peer, lease)
    }

    /// Stops listening and removes the socket, as its drop does, and says how that
    /// went. Connections that were accepted are their users' and stay.
    pub fn close(self) -> CloseReport {
        let outcome = match &self.socket {
            Socket::Vsock { .. } => Outcome::Clean,
            Socket::Hybrid { file, .. } => match file.remove() {
                Ok(()) => Outcome::Clean,
                Err(error) => Outcome::Failed(format!("remove {}: {error}", file.0.display())),
            },
        };
        CloseReport::of("listener", outcome)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use podhull_types::Deadline;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    use super::*;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(5))
    }

    #[tokio::test]
    async fn l7_an_accepted_connection_outlives_its_listener() {
        let folder = tempfile::tempdir().unwrap();
        let leases = LeaseSet::new("vm");
        let vm = folder.path().join("vm");
        let listener = VsockListener::bind_hybrid(&vm, VsockPort::READY, leases.clone()).unwrap();
        let mut client =
            UnixStream::connect(folder.path().join(format!("vm_{}", VsockPort::READY)))
                .await
                .unwrap();
        let transport = listener.accept().await.unwrap();
        assert!(listener.close().is_clean());
        assert!(
            !folder
                .path()
                .join(format!("vm_{}", VsockPort::READY))
                .exists()
        );
        client.write_all(b"x").await.unwrap();
        let mut io = transport.io().unwrap();
        assert_eq!(io.read_u8().await.unwrap(), b'x');
        assert_eq!(leases.held().len(), 1);
        drop(io);
        assert!(transport.close(soon()).await.is_clean());
        assert!(leases.held().is_empty());
    }

    /// On whichever way out.
    #[tokio::test]
    async fn l7_a_listener_that_is_dropped_leaves_no_socket() {
        let folder = tempfile::tempdir().unwrap();
        let vm = folder.path().join("vm");
        let bind = || VsockListener::bind_hybrid(&vm, VsockPort::READY, LeaseSet::new("vm"));
        for _ in 0..2 {
            let listener = bind().unwrap();
            // It is another's: not touched.
            assert!(matches!(bind(), Err(TransportError::Listen { .. })));
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
            drop(listener);
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }

    /// Whatever was allowed before. AF_VSOCK itself: `tests/vsock/burst.rs`.
    #[tokio::test]
    async fn l7_a_listener_lets_a_burst_wait() {
        const MANY: usize = 200;
        let folder = tempfile::tempdir().unwrap();
        let vm = folder.path().join("vm");
        let listener =
            VsockListener::bind_hybrid(&vm, VsockPort::READY, LeaseSet::new("vm")).unwrap();
        let Socket::Hybrid { listener: few, .. } = &listener.socket else {
            unreachable!("{listener:?}")
        };
        listen(few, Backlog::new(1).unwrap()).unwrap();
        let_wait(few).unwrap();
        let mut clients = Vec::new();
        for number in 0..MANY {
            let path = folder.path().join(format!("vm_{}", VsockPort::READY));
            let client = UnixStream::connect(path).await;
            clients.push(client.unwrap_or_else(|error| panic!("connection {number}: {error}")));
        }
        for _ in clients {
            let transport = soon().run(listener.accept()).await.unwrap().unwrap();
            assert!(transport.close(soon()).await.is_clean());
        }
    }

    #[tokio::test]
    async fn l7_a_peer_that_is_gone_already_is_still_accepted() {
        let folder = tempfile::tempdir().unwrap();
        let vm = folder.path().join("vm");
        let listener =
            VsockListener::bind_hybrid(&vm, VsockPort::READY, LeaseSet::new("vm")).unwrap();
        drop(
            UnixStream::connect(folder.path().join(format!("vm_{}", VsockPort::READY)))
                .await
                .unwrap(),
        );
        let transport = listener.accept().await.unwrap();
        assert_eq!(transport.io().unwrap().read(&mut [0]).await.unwrap(), 0);
        assert!(transport.close(soon()).await.is_clean());
    }

    #[tokio::test]
    async fn l10_a_stopping_vm_ends_the_accept_loop() {
        let folder = tempfile::tempdir().unwrap();
        let vm = folder.path().join("vm");
        let leases = LeaseSet::new("vm");
        let listener = VsockListener::bind_hybrid(&vm, VsockPort::READY, leases.clone()).unwrap();
        leases.close();
        let _client = UnixStream::connect(folder.path().join(format!("vm_{}", VsockPort::READY)))
            .await
            .unwrap();
        assert!(matches!(
            listener.accept().await,
            Err(TransportError::Closing(_))
        ));
    }
}
