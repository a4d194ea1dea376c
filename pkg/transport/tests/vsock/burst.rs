// SPDX-License-Identifier: Apache-2.0
//! Many connections before the first is accepted.

use futures::future::try_join_all;
use podhull_transport::{LeaseSet, VsockListener};

use super::loopback::{LOCAL, dial, soon, with_loopback};

/// As of a guest that goes on after it was frozen.
#[test]
fn l7_a_burst_before_the_first_accept_is_taken() {
    const MANY: usize = 200;
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let listener = VsockListener::bind_vsock(None, LOCAL, leases.clone()).unwrap();
        let dialling = (0..MANY).map(|_| dial(&leases, listener.port()));
        let mut all = try_join_all(dialling).await.unwrap();
        for _ in 0..MANY {
            let accepted = soon().run(listener.accept()).await.unwrap();
            all.push(accepted.unwrap());
        }
        for transport in all {
            assert!(transport.close(soon()).await.is_clean());
        }
        assert!(listener.close().is_clean());
        assert!(leases.held().is_empty());
    });
}
