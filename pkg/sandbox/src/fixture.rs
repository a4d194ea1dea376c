// SPDX-License-Identifier: Apache-2.0
//! A sandbox whose VM is none and whose agent never answers.

use std::fmt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use podhull_agent_client::AgentChannel;
use podhull_config::Config;
use podhull_telemetry::Metrics;
use podhull_transport::{GuestAddress, Holder, HolderKind, LeaseSet, Peer, VsockTransport};
use podhull_types::{Deadline, SandboxId, VsockPort};
use podhull_vmm::{Acceleration, StopReport, Vm, VmDeath};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::rundir::RunDir;
use crate::sandbox::{Booted, Sandbox};
use crate::spec::{EventSink, PodFiles, Runtime, SandboxSpec};
use crate::teardown::Parts;

/// What stopping the VM comes to.
pub(crate) enum Stop {
    Panics,
    /// It ends once this is cancelled.
    Waits(CancellationToken),
    /// It calls this, and ends.
    Calls(Box<dyn Fn() -> StopReport + Send + Sync>),
}

struct FakeVm {
    leases: LeaseSet,
    address: GuestAddress,
    stop: Stop,
    died: watch::Sender<Option<VmDeath>>,
}

impl fmt::Debug for FakeVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FakeVm")
    }
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
        self.died.subscribe()
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
            match &self.stop {
                Stop::Panics => panic!("planted"),
                Stop::Waits(ends) => {
                    ends.cancelled().await;
                    StopReport::default()
                }
                Stop::Calls(look) => look(),
            }
        })
    }
}

pub(crate) fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

pub(crate) fn spec() -> SandboxSpec {
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

pub(crate) fn runtime(folder: &Path) -> Arc<Runtime> {
    Arc::new(Runtime {
        config: Config {
            run_dir: folder.into(),
            heartbeat_seconds: 1,
            dead_after_seconds: 8,
            ..Config::default()
        },
        helper: "/nonexistent".into(),
        metrics: Metrics::new().unwrap(),
    })
}

/// The guest's session port is at `<folder>/vsock`, if somebody listens there.
/// The stream is the agent's end of the channel.
pub(crate) async fn sandbox(folder: &Path, stop: Stop) -> (Arc<Sandbox>, UnixStream) {
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
        stop,
        died: watch::Sender::new(None),
    };
    let run_dir = RunDir::of(folder, &spec.namespace, &spec.id);
    run_dir.create().unwrap();
    let mut parts = Parts::new(run_dir, runtime.metrics.clone());
    parts.vm = Some(Arc::new(vm));
    let booted = Booted::with(channel, parts, address, leases);
    let events = EventSink::new(|_| {});
    (Sandbox::new(runtime, spec, events, booted), guest)
}
