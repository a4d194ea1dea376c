// SPDX-License-Identifier: Apache-2.0
//! Row L10 of the lifetime contract: a VM outlives every lease. The VM here has
//! real processes, real leases and a real stop; only the programs are scripts
//! that do nothing.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use podhull_transport::{Holder, HolderKind, Peer, VsockTransport};
use podhull_types::{Deadline, VsockPort};
use podhull_vmm::{Acceleration, CgroupPlacement, Programs, StopReport, Vm, VmConfig, launch};

struct Fake {
    vm: Arc<dyn Vm>,
    pids: Vec<u32>,
    _folder: tempfile::TempDir,
}

impl Fake {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str| {
            let path = folder.path().join(name);
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        // It greets as a helper does, and waits to be ended.
        let greet = "printf x >&4; head -c 1 <&4 >/dev/null; exec sleep 600";
        let idle = file("idle", &format!("#!/bin/sh\n{greet}\n"));
        let run_dir = folder.path().join("vm");
        fs::create_dir(&run_dir).unwrap();
        // Where there is no vhost-vsock, somebody must listen for QEMU's end.
        let _daemon = UnixListener::bind(run_dir.join("vhost")).unwrap();
        let config = VmConfig {
            name: "fake".into(),
            run_dir,
            // A bzImage by its magic.
            kernel: file("kernel", &("\0".repeat(0x202) + "HdrS")),
            initramfs: file("initramfs", "070701"),
            memory_mib: 1,
            vcpus: 1,
            network: None,
            share: folder.path().into(),
            acceleration: Acceleration::Emulation,
            cgroup: CgroupPlacement::none(),
            programs: Programs {
                qemu: idle.clone(),
                vsock_daemon: idle.clone(),
                helper: idle,
            },
            user: None,
            mapped_users: false,
            console_bytes: 1024,
        };
        let launched = launch(config, after(5000)).await.unwrap();
        let pids = launched
            .vm
            .processes()
            .iter()
            .map(|(_, pid)| *pid)
            .collect();
        Self {
            vm: launched.vm,
            pids,
            _folder: folder,
        }
    }

    fn running(&self) -> usize {
        let exists = |pid: &&u32| Path::new(&format!("/proc/{pid}")).exists();
        self.pids.iter().filter(exists).count()
    }

    fn all_run(&self) -> bool {
        self.running() == self.pids.len() && !self.pids.is_empty()
    }
}

fn after(milliseconds: u64) -> Deadline {
    Deadline::after(Duration::from_millis(milliseconds))
}

fn holder() -> Holder {
    Holder::new(HolderKind::Session, "exec c/e")
}

/// Starts a stop and returns once it refuses new leases.
async fn stopping(vm: &Arc<dyn Vm>, by: Deadline) -> tokio::task::JoinHandle<StopReport> {
    let stopped = Arc::clone(vm);
    let stop = tokio::spawn(async move { stopped.stop(by).await });
    while vm.leases().issue(holder()).is_ok() {
        tokio::task::yield_now().await;
    }
    stop
}

#[tokio::test]
async fn l10_stop_returns_only_after_a_held_lease_is_dropped() {
    let fake = Fake::new().await;
    let lease = fake.vm.leases().issue(holder()).unwrap();
    let dropped = Arc::new(AtomicBool::new(false));
    let stop = stopping(&fake.vm, after(30_000)).await;
    let holding = tokio::spawn({
        let dropped = Arc::clone(&dropped);
        async move {
            tokio::time::sleep(Duration::from_millis(300)).await;
            dropped.store(true, Ordering::SeqCst);
            drop(lease);
        }
    });
    // While somebody holds it, every process of the VM lives.
    while !dropped.load(Ordering::SeqCst) {
        assert!(fake.all_run() && !stop.is_finished());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let report = stop.await.unwrap();
    holding.await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(fake.running(), 0);
}

#[tokio::test]
async fn l10_stop_names_who_holds_on_at_the_deadline_and_goes_on() {
    let fake = Fake::new().await;
    let lease = fake.vm.leases().issue(holder()).unwrap();
    // Its connection to the guest.
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let peer = Peer::Guest(VsockPort::SESSIONS);
    let transport = VsockTransport::adopt(ours.into(), peer.clone(), lease).unwrap();
    let began = Instant::now();
    let stop = stopping(&fake.vm, after(200)).await;
    assert!(fake.all_run());
    let report = stop.await.unwrap();
    assert!(began.elapsed() >= Duration::from_millis(200), "not before");
    let [held] = &report.holders[..] else {
        panic!("{report:?}");
    };
    assert_eq!(held.holder, holder());
    assert_eq!(held.peer, Some(peer.to_string()));
    assert!(held.age >= Duration::from_millis(190), "{held}");
    assert!(
        held.to_string()
            .starts_with("session exec c/e with guest port 1025 for 0."),
        "{held}"
    );
    assert_eq!(fake.running(), 0, "ended all the same");
    assert!(transport.close(after(1000)).await.is_clean());
}

#[tokio::test]
async fn l10_a_vm_that_nobody_holds_stops_at_once() {
    let fake = Fake::new().await;
    drop(fake.vm.leases().issue(holder()).unwrap());
    let report = stopping(&fake.vm, after(30_000)).await.await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    let again = fake.vm.stop(after(1000)).await;
    assert!(again.is_clean(), "a second stop does nothing: {again:?}");
    assert!(fake.vm.leases().issue(holder()).is_err());
}

#[tokio::test]
async fn a_stop_ends_the_vmm_before_its_helpers() {
    let fake = Fake::new().await;
    let exists = |pid: u32| Path::new(&format!("/proc/{pid}")).exists();
    let vmm = fake.vm.pid();
    let helpers: Vec<_> = fake.pids.iter().filter(|pid| **pid != vmm).collect();
    assert!(helpers.len() + 1 == fake.pids.len() && !helpers.is_empty());
    let stop = stopping(&fake.vm, after(30_000)).await;
    while !stop.is_finished() {
        // Asked for before the VMM: it must have been gone before they are.
        let lost = helpers.iter().filter(|pid| !exists(***pid)).count();
        assert!(lost == 0 || !exists(vmm), "{lost} helpers went first");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(stop.await.unwrap().is_clean());
    assert_eq!(fake.running(), 0);
}
