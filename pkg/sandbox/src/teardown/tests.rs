// SPDX-License-Identifier: Apache-2.0
//! Ends of a sandbox whose VM is none.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::Pin;
use std::time::Instant;

use podhull_config::Config;
use podhull_transport::{GuestAddress, Holder, HolderKind, LeaseSet, Peer, VsockTransport};
use podhull_types::{SandboxId, VsockPort};
use podhull_vmm::{Acceleration, StopReport, VmDeath};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::error::SandboxError;
use crate::sandbox::Booted;
use crate::spec::{EventSink, PodFiles, Runtime, SandboxSpec};

/// A VM that cannot be stopped without a panic, if it is told so.
#[derive(Debug)]
struct FakeVm {
    leases: LeaseSet,
    address: GuestAddress,
    panics: bool,
}

impl Vm for FakeVm {
    fn leases(&self) -> &LeaseSet {
        &self.leases
    }

    fn address(&self) -> &GuestAddress {
        &self.address
    }

    fn acceleration(&self) -> Acceleration {
        Acceleration::Emulation
    }

    fn pid(&self) -> u32 {
        1
    }

    fn processes(&self) -> Vec<(&'static str, u32)> {
        vec![]
    }

    fn died(&self) -> watch::Receiver<Option<VmDeath>> {
        watch::channel(None).1
    }

    fn console_tail(&self) -> String {
        String::new()
    }

    // As `async_trait` writes it.
    fn stop<'life0, 'async_trait>(
        &'life0 self,
        _: Deadline,
    ) -> Pin<Box<dyn Future<Output = StopReport> + Send + 'async_trait>>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        Box::pin(async {
            assert!(!self.panics, "planted");
            StopReport::default()
        })
    }
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn spec() -> SandboxSpec {
    SandboxSpec {
        id: SandboxId::new("s1").unwrap(),
        namespace: "k8s.io".into(),
        hostname: String::new(),
        domainname: String::new(),
        netns: None,
        cgroups_path: None,
        sysctls: std::collections::BTreeMap::new(),
        memory_limit_bytes: None,
        vcpus: None,
        shm_size: None,
        files: PodFiles::default(),
        started: Instant::now(),
    }
}

fn runtime(folder: &Path) -> Arc<Runtime> {
    Arc::new(Runtime {
        config: Config {
            run_dir: folder.into(),
            ..Config::default()
        },
        helper: "/nonexistent".into(),
        metrics: Metrics::new().unwrap(),
    })
}

/// A sandbox whose agent never answers.
async fn sandbox(folder: &Path, panics: bool) -> (Arc<Sandbox>, UnixStream) {
    let (runtime, spec) = (runtime(folder), spec());
    let leases = LeaseSet::new("vm");
    let (ours, guest) = UnixStream::pair().unwrap();
    let lease = leases
        .issue(Holder::new(HolderKind::Control, "test"))
        .unwrap();
    let transport =
        VsockTransport::adopt(ours.into(), Peer::Guest(VsockPort::READY), lease).unwrap();
    let channel = AgentChannel::establish(transport, soon()).await.unwrap();
    let address = GuestAddress::Hybrid {
        socket: folder.join("vsock"),
    };
    let vm = FakeVm {
        leases: leases.clone(),
        address: address.clone(),
        panics,
    };
    let run_dir = RunDir::of(folder, &spec.namespace, &spec.id);
    run_dir.create().unwrap();
    let mut parts = Parts::new(run_dir, runtime.metrics.clone());
    parts.vm = Some(Arc::new(vm));
    let booted = Booted::with(channel, parts, address, leases);
    let events = EventSink::new(|_| {});
    let sandbox = Sandbox::new(runtime, spec, events, booted);
    sandbox.death.set("it is none".into()).unwrap();
    (sandbox, guest)
}

#[tokio::test]
async fn a_stop_that_panics_is_an_error_for_later_callers() {
    let folder = tempfile::tempdir().unwrap();
    let (sandbox, _guest) = sandbox(folder.path(), true).await;
    let waits = tokio::spawn({
        let sandbox = Arc::clone(&sandbox);
        async move { sandbox.stopped().await }
    });
    let stops = tokio::spawn({
        let sandbox = Arc::clone(&sandbox);
        async move { sandbox.stop(soon()).await }
    });
    assert!(stops.await.unwrap_err().is_panic());
    let began = Instant::now();
    let report = sandbox.stop(soon()).await;
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "it was waited for"
    );
    assert!(report.to_string().contains("cut short"), "{report}");
    assert_eq!(waits.await.unwrap().code, ExitStatus::vm_gone().code);
    assert!(sandbox.exit().is_some());
}

#[tokio::test]
async fn a_second_stop_has_nothing_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let (sandbox, _guest) = sandbox(folder.path(), false).await;
    let first = sandbox.stop(soon()).await;
    assert!(first.steps().any(|(step, _)| step == "vm"), "{first}");
    assert!(sandbox.stop(soon()).await.is_clean());
}

#[tokio::test]
async fn a_boot_after_the_end_began_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let give_up = CancellationToken::new();
    give_up.cancel();
    let events = EventSink::new(|_| {});
    let booted = Sandbox::boot(runtime(folder.path()), spec(), events, &give_up).await;
    let error = booted.unwrap_err();
    assert!(
        matches!(&error, SandboxError::Stopping(id) if id.as_str() == "s1"),
        "{error}"
    );
    // Nothing was made for it.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
