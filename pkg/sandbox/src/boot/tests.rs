// SPDX-License-Identifier: Apache-2.0
//! Boots that fail once the guest has come up, or before it is started.

use std::os::unix::net::UnixStream;

use podhull_transport::{GuestAddress, GuestTimes, LeaseSet};

use super::*;
use crate::fixture::{self, FakeVm, Stop, apart, ip, name_netns, runtime, soon, spec};

/// A guest that has said READY, and the agent's end of its channel.
async fn connected(folder: &Path) -> (Parts, Arc<FakeVm>, Connected, UnixStream) {
    let leases = LeaseSet::new("vm");
    let (channel, guest) = fixture::channel(&leases).await;
    let socket = folder.join("vsock");
    let address = GuestAddress::Hybrid { socket };
    let vm = FakeVm::new(leases, address, Stop::Panics);
    let run_dir = RunDir::of(folder, "k8s.io", &spec().id);
    let mut parts = Parts::new(run_dir, runtime(folder).metrics.clone());
    parts.vm = Some(Arc::<FakeVm>::clone(&vm));
    let times = GuestTimes {
        kernel_to_agent: Duration::ZERO,
        agent_to_ready: Duration::ZERO,
    };
    (parts, vm, Connected { channel, times }, guest)
}

/// The connection's end comes first, the VM's is seen later.
#[tokio::test]
async fn a_guest_that_dies_while_it_is_configured_is_told_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let (parts, vm, connected, guest) = connected(folder.path()).await;
    let (spec, give_up) = (spec(), CancellationToken::new());
    let ends = async {
        drop(guest);
        tokio::time::sleep(Duration::from_millis(300)).await;
        vm.die("out of ideas");
    };
    let configured = configure(&parts, &spec, &connected, soon(), &give_up);
    let (configured, ()) = tokio::join!(configured, ends);
    let error = configured.unwrap_err();
    assert!(
        matches!(&error, SandboxError::VmDied { reason, .. } if reason.contains("out of ideas")),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_guest_that_hangs_while_it_is_configured_is_told_with_its_console() {
    let folder = tempfile::tempdir().unwrap();
    let (parts, _vm, connected, _guest) = connected(folder.path()).await;
    let by = Deadline::after(Duration::from_millis(50));
    let (spec, give_up) = (spec(), CancellationToken::new());
    let configured = configure(&parts, &spec, &connected, by, &give_up);
    let text = chain(&configured.await.unwrap_err());
    assert!(
        text.contains("its console") && text.contains("Configure"),
        "{text}"
    );
}

#[tokio::test]
async fn a_guest_that_hangs_is_not_waited_for_once_the_boot_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let (parts, _vm, connected, _guest) = connected(folder.path()).await;
    let (spec, give_up) = (spec(), CancellationToken::new());
    let configured = configure(&parts, &spec, &connected, soon(), &give_up);
    let (configured, ()) = tokio::join!(configured, async { give_up.cancel() });
    let error = configured.unwrap_err();
    assert!(matches!(error, SandboxError::Stopping(_)), "{error:?}");
}

#[test]
fn what_an_attach_leaves_at_its_deadline_is_removed() {
    apart(async |folder| {
        ip("link add eth0 type veth peer name host");
        ip("address add 10.9.0.2/24 dev eth0");
        let netns = folder.join("netns");
        name_netns(&netns);
        // A redirect to nowhere, as of one that was cut half way.
        drop(PodNetwork::attach(&netns, soon()).await.unwrap());
        let attached = attach(&netns, Deadline::after(Duration::ZERO)).await;
        assert!(matches!(attached, Err(NetworkError::Deadline)));
        // Its queue would be in the way.
        let network = PodNetwork::attach(&netns, soon()).await.unwrap();
        network.detach(soon()).await.unwrap();
    });
}
