// SPDX-License-Identifier: Apache-2.0
//! What the host sends to the pod's loopback.
//!
//! containerd forwards a port by entering the pod's network namespace and
//! connecting to localhost there, where with a VM nobody listens. A listener of
//! ours does, and all of the namespace's loopback is redirected to it.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener as StdListener};
use std::path::Path;

use nix::sys::socket::{getsockopt, sockopt};
use podhull_types::{Deadline, accept_again};
use tokio::net::{TcpListener, TcpStream};

use crate::error::NetworkError;
use crate::inside::inside;
use crate::redirect;

/// Takes every TCP connection that is made in a pod's namespace to its loopback.
#[derive(Debug)]
pub struct LoopbackListener {
    v4: TcpListener,
    /// Absent where the namespace has no IPv6.
    v6: Option<TcpListener>,
}

/// Both listeners, and the port that they share.
fn bind() -> io::Result<(StdListener, Option<StdListener>, u16)> {
    let v4 = StdListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    v4.set_nonblocking(true)?;
    let port = v4.local_addr()?.port();
    let v6 = match StdListener::bind((Ipv6Addr::LOCALHOST, port)) {
        Ok(v6) => {
            v6.set_nonblocking(true)?;
            Some(v6)
        }
        Err(error) if is_without_ipv6(&error) => None,
        Err(error) => return Err(error),
    };
    Ok((v4, v6, port))
}

fn is_without_ipv6(error: &io::Error) -> bool {
    use nix::errno::Errno;
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EADDRNOTAVAIL | Errno::EAFNOSUPPORT))
}

impl LoopbackListener {
    /// Listens in `netns`, and redirects its loopback there.
    ///
    /// # Errors
    /// The step that the kernel refused: one without nftables' NAT cannot
    /// redirect. Nothing stays then.
    pub(crate) async fn open(netns: &Path, by: Deadline) -> Result<Self, NetworkError> {
        let (v4, v6) = inside(netns, by, |_| async {
            let (v4, v6, port) =
                bind().map_err(NetworkError::step("listen on the pod's loopback"))?;
            redirect::install(port, v6.is_some())?;
            Ok((v4, v6))
        })
        .await?;
        let watched = |listener| {
            TcpListener::from_std(listener)
                .map_err(NetworkError::step("watch the loopback's listener"))
        };
        Ok(Self {
            v4: watched(v4)?,
            v6: v6.map(watched).transpose()?,
        })
    }

    /// The next connection, and the port that it was made to. One that is lost
    /// while it is accepted is logged, and the next one waited for. Cancel safe.
    ///
    /// # Errors
    /// What the kernel said, if the listener itself is broken.
    pub async fn accept(&self) -> io::Result<(TcpStream, u16)> {
        loop {
            let error = match self.accept_one().await {
                Ok(accepted) => return Ok(accepted),
                Err(error) => error,
            };
            tracing::warn!(%error, "a connection to the pod's loopback was lost");
            if !accept_again(&error).await {
                return Err(error);
            }
        }
    }

    async fn accept_one(&self) -> io::Result<(TcpStream, u16)> {
        let v6 = async {
            match &self.v6 {
                Some(v6) => v6.accept().await,
                None => std::future::pending().await,
            }
        };
        let (stream, local) = tokio::select! {
            accepted = self.v4.accept() => accepted?,
            accepted = v6 => accepted?,
        };
        let port = if local.is_ipv4() {
            getsockopt(&stream, sockopt::OriginalDst).map(|address| address.sin_port)
        } else {
            getsockopt(&stream, sockopt::Ip6tOriginalDst).map(|address| address.sin6_port)
        };
        Ok((stream, u16::from_be(port?)))
    }
}
