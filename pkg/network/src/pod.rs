// SPDX-License-Identifier: Apache-2.0
//! The pod's network, from attach to detach.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use podhull_types::Deadline;

use crate::error::NetworkError;
use crate::inside::inside;
use crate::loopback::LoopbackListener;
use crate::read::{self, GuestNetwork};
use crate::{redirect, sys, wire};

/// The tap's name in the pod's namespace.
const TAP: &str = "podhull0";

/// A pod's network that is handed to a VM.
///
/// Dropped without [`detach`](Self::detach), the tap goes and a redirect to
/// nowhere stays on the CNI's interface until [`sweep`], or the namespace's end.
#[derive(Debug)]
pub struct PodNetwork {
    netns: PathBuf,
    tap: OwnedFd,
    mac: [u8; 6],
    guest: GuestNetwork,
}

impl PodNetwork {
    /// Makes the tap in `netns` and ties it to the CNI's interface.
    ///
    /// # Errors
    /// [`NetworkError::NoInterface`] if the CNI gave the pod no address,
    /// [`NetworkError::Interfaces`] if it gave addresses to more than a VM can
    /// be given; else the step that the kernel refused. Nothing stays then, but
    /// after [`NetworkError::Deadline`] what [`sweep`] removes.
    pub async fn attach(netns: &Path, by: Deadline) -> Result<Self, NetworkError> {
        let path = netns.to_path_buf();
        let attached = inside(netns, by, move |handle| async move {
            let found = read::find_interface(&handle, &path).await?;
            let interface = found.interface;
            let guest = GuestNetwork {
                routes: read::routes(&handle, found.index, &interface.name).await?,
                neighbours: read::neighbours(&handle, found.index, &interface.name).await?,
                interfaces: vec![interface.clone()],
            };
            let tap = sys::make_tap(TAP).map_err(NetworkError::step("make the tap"))?;
            // The tap is a wire: the namespace's own stack must not talk on it.
            let quiet = format!("/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6");
            if let Err(error) = std::fs::write(&quiet, "1") {
                tracing::debug!(%error, path = quiet, "not written");
            }
            let links = read::links(&handle).await?;
            let tap_index = links
                .iter()
                .find(|link| read::name_of(link) == Some(TAP))
                .map(|link| link.header.index);
            let tap_index = tap_index.ok_or_else(|| {
                NetworkError::step("find the tap")(io::Error::from(io::ErrorKind::NotFound))
            })?;
            wire::bring_up(&handle, tap_index, interface.mtu).await?;
            wire::tie(&handle, found.index, tap_index).await?;
            Ok(Self {
                netns: path,
                tap,
                mac: interface.mac,
                guest,
            })
        })
        .await?;
        tracing::debug!(netns = %attached.netns.display(), guest = ?attached.guest, "tap tied");
        Ok(attached)
    }

    /// A descriptor of the tap, for the VMM.
    ///
    /// # Errors
    /// If it cannot be duplicated.
    pub fn tap(&self) -> Result<OwnedFd, NetworkError> {
        self.tap
            .try_clone()
            .map_err(NetworkError::step("duplicate the tap"))
    }

    /// The hardware address of the guest's device.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// What the guest sets up.
    #[must_use]
    pub fn guest(&self) -> &GuestNetwork {
        &self.guest
    }

    /// Takes the connections that are made to the namespace's loopback. They are
    /// redirected until [`detach`](Self::detach).
    ///
    /// # Errors
    /// The step that the kernel refused; nothing is redirected then.
    pub async fn listen_on_loopback(&self, by: Deadline) -> Result<LoopbackListener, NetworkError> {
        LoopbackListener::open(&self.netns, by).await
    }

    /// Unties the interface and lets the tap go. A namespace that is gone
    /// already has taken both with it.
    ///
    /// # Errors
    /// The step that the kernel refused.
    pub async fn detach(self, by: Deadline) -> Result<(), NetworkError> {
        drop(self.tap);
        sweep(&self.netns, by).await
    }
}

/// Removes redirects that were left in `netns`; the tap went with its owner.
/// Succeeds if the namespace, or what it held, is gone.
///
/// # Errors
/// The step that the kernel refused.
pub async fn sweep(netns: &Path, by: Deadline) -> Result<(), NetworkError> {
    let swept = inside(netns, by, |handle| async move {
        let loopback = redirect::remove();
        for link in read::links(&handle).await? {
            wire::untie(&handle, link.header.index).await?;
        }
        loopback
    })
    .await;
    match swept {
        // EINVAL: a file stayed where the namespace was mounted.
        Err(NetworkError::Namespace { source, .. })
            if matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::InvalidInput
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}
