// SPDX-License-Identifier: Apache-2.0
//! Connections over AF_VSOCK itself, where the kernel loops them back (module
//! vsock_loopback): both ends are ours.

use std::path::Path;
use std::time::Duration;

use podhull_transport::{
    GuestAddress, Holder, HolderKind, Lease, LeaseSet, TransportError, VsockListener,
    VsockTransport,
};
use podhull_types::{Cid, Deadline, VsockPort};

/// `VMADDR_CID_LOCAL` of linux/vm_sockets.h.
pub(crate) const LOCAL: Cid = Cid(1);

pub(crate) fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

pub(crate) fn lease(leases: &LeaseSet) -> Lease {
    let holder = Holder::new(HolderKind::Session, "test");
    leases.issue(holder).unwrap()
}

pub(crate) async fn dial(
    leases: &LeaseSet,
    port: VsockPort,
) -> Result<VsockTransport, TransportError> {
    let address = GuestAddress::Vsock { cid: LOCAL };
    address.dial(port, lease(leases), soon()).await
}

/// Who has dialled, and who has accepted.
pub(crate) async fn connected(leases: &LeaseSet) -> (VsockTransport, VsockTransport) {
    let listener = VsockListener::bind_vsock(None, LOCAL, leases.clone()).unwrap();
    let (dialled, accepted) = tokio::join!(dial(leases, listener.port()), listener.accept());
    assert!(listener.close().is_clean());
    (dialled.unwrap(), accepted.unwrap())
}

/// Runs `test`, or says why not.
pub(crate) fn with_loopback(test: impl Future<Output = ()>) {
    if !Path::new("/sys/module/vsock_loopback").exists() {
        println!("SKIP: the kernel does not loop AF_VSOCK back");
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(test);
}
