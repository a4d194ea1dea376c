// SPDX-License-Identifier: Apache-2.0
//! A sandbox whose VM is none and whose agent never answers, and a node to have
//! it on.

use std::fmt;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
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

/// One that is none.
pub(crate) struct FakeVm {
    leases: LeaseSet,
    address: GuestAddress,
    stop: Stop,
    died: watch::Sender<Option<VmDeath>>,
}

impl FakeVm {
    pub(crate) fn new(leases: LeaseSet, address: GuestAddress, stop: Stop) -> Arc<Self> {
        Arc::new(Self {
            leases,
            address,
            stop,
            died: watch::Sender::new(None),
        })
    }

    /// It ends by itself, with these last words.
    pub(crate) fn die(&self, said: &str) {
        self.died.send_replace(Some(VmDeath {
            child: "qemu",
            status: "exit status: 1".into(),
            out_of_memory: false,
            said: said.into(),
            console: String::new(),
        }));
    }
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
        "its console".into()
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
        users: None,
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

/// A channel, and the agent's end of it.
pub(crate) async fn channel(leases: &LeaseSet) -> (AgentChannel, UnixStream) {
    let (ours, guest) = UnixStream::pair().unwrap();
    let lease = leases
        .issue(Holder::new(HolderKind::Control, "test"))
        .unwrap();
    let transport =
        VsockTransport::adopt(ours.into(), Peer::Guest(VsockPort::READY), lease).unwrap();
    let channel = AgentChannel::establish(transport, soon()).await.unwrap();
    (channel, guest)
}

/// The guest's session port is at `<folder>/vsock`, if somebody listens there.
/// The stream is the agent's end of the channel.
pub(crate) async fn sandbox(folder: &Path, stop: Stop) -> (Arc<Sandbox>, UnixStream) {
    let (runtime, spec) = (runtime(folder), spec());
    let leases = LeaseSet::new("vm");
    let (channel, guest) = channel(&leases).await;
    let address = GuestAddress::Hybrid {
        socket: folder.join("vsock"),
    };
    let vm = FakeVm::new(leases.clone(), address.clone(), stop);
    let run_dir = RunDir::of(folder, &spec.namespace, &spec.id);
    run_dir.create().unwrap();
    let mut parts = Parts::new(run_dir, runtime.metrics.clone());
    parts.vm = Some(vm);
    let booted = Booted::with(channel, parts, address, leases);
    let events = EventSink::new(|_| {});
    (Sandbox::new(runtime, spec, events, booted), guest)
}

/// Runs `test` on a thread, and those that it starts, with mounts and a network
/// of their own.
pub(crate) fn apart(test: impl AsyncFnOnce(&Path) + Send) {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP: mounts and networks need root");
        return;
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let own = CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET;
            unshare(own).unwrap();
            let (none, private) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
            mount(none, "/", none, private, none).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(test(folder.path()));
        });
    });
}

pub(crate) fn ip(args: &str) {
    let status = Command::new("ip").args(args.split(' ')).status().unwrap();
    assert!(status.success(), "ip {args}: {status}");
}

/// A name of the namespace that this thread is in, as a boot is given one.
pub(crate) fn name_netns(name: &Path) {
    let task = nix::unistd::gettid();
    symlink(format!("/proc/self/task/{task}/ns/net"), name).unwrap();
}

/// A folder whose server is away, as a FUSE file system that is never answered
/// for: whoever looks into it waits until this is dropped.
pub(crate) struct Away {
    at: PathBuf,
    server: Option<File>,
}

impl Away {
    pub(crate) fn new(at: &Path) -> Option<Self> {
        let Ok(server) = File::options().read(true).write(true).open("/dev/fuse") else {
            println!("SKIP: no /dev/fuse");
            return None;
        };
        std::fs::create_dir_all(at).unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            server.as_raw_fd()
        );
        let (kind, flags) = (Some("fuse"), MsFlags::empty());
        mount(Some("away"), at, kind, flags, Some(options.as_str())).unwrap();
        Some(Self {
            at: at.into(),
            server: Some(server),
        })
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        drop(self.server.take());
        umount2(&self.at, MntFlags::MNT_DETACH).unwrap();
    }
}
