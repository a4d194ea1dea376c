// SPDX-License-Identifier: Apache-2.0
//! The floor of what sessions can do: a VM whose guest only moves bytes, over
//! connections without anything around them and over sessions, in turn.

use std::env;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podhull_bench_guest::{RAW, Raw, Way, order};
use podhull_testkit::Node;
use podhull_testkit::programs::Programs;
use podhull_transport::{
    CloseReport, Holder, HolderKind, HostSession, SessionTarget, VsockTransport, open_session,
    welcome,
};
use podhull_types::{ContainerId, Deadline, ProcessRef, Token, VsockPort};
use podhull_vmm::{
    AccelPolicy, CgroupPlacement, Launched, Vm, VmConfig, launch, probe_acceleration,
};

use crate::quick::ms;
use crate::sessions::{VOLUME, mib_per_second};
use crate::statistics::Series;

const STEP: Duration = Duration::from_secs(120);
/// Copies each way; the first of each is not counted.
const COPIES: usize = 8;

/// What was measured.
#[derive(Debug, Default)]
pub(crate) struct Floor {
    /// A connection, in ms.
    pub(crate) dial: Series,
    /// A connection and the session's handshake, in ms.
    pub(crate) open: Series,
    /// MiB/s out of the guest.
    pub(crate) out: Pair,
    /// MiB/s into it.
    pub(crate) into: Pair,
}

/// A raw copy, and one through a session.
#[derive(Debug, Default)]
pub(crate) struct Pair {
    pub(crate) raw: Series,
    pub(crate) session: Series,
}

struct Guest {
    vm: Arc<dyn Vm>,
    token: Token,
    control: VsockTransport,
}

/// The guest's initramfs, which `make bench-sessions` builds.
pub(crate) fn initramfs() -> Result<PathBuf> {
    let path = env::var_os("PODHULL_BENCH_INITRAMFS").map(PathBuf::from);
    path.filter(|path| path.is_file())
        .context("PODHULL_BENCH_INITRAMFS names no file: make bench-sessions")
}

pub(crate) async fn run(node: &Node, runs: usize) -> Result<Floor> {
    let guest = boot(node.programs()).await?;
    let mut floor = Floor::default();
    let measured = measure(&guest, runs, &mut floor).await;
    let closed = guest.control.close(Deadline::after(STEP)).await;
    let stopped = guest.vm.stop(Deadline::after(STEP)).await;
    measured?;
    clean(&closed)?;
    ensure!(stopped.is_clean(), "the VM's end: {stopped:?}");
    Ok(floor)
}

async fn boot(programs: &Programs) -> Result<Guest> {
    let policy = AccelPolicy {
        allow_emulation: true,
    };
    let folder = PathBuf::from("/run/podhull/bench");
    let share = folder.join("share");
    std::fs::create_dir_all(&share).context("make the VM's folder")?;
    let config = VmConfig {
        name: "bench".into(),
        run_dir: folder.join("vm"),
        kernel: programs.kernel.clone(),
        initramfs: initramfs()?,
        memory_mib: 256,
        vcpus: 1,
        network: None,
        share,
        mapped_users: false,
        acceleration: probe_acceleration(policy, &programs.qemu).await?,
        cgroup: CgroupPlacement::none(),
        programs: podhull_vmm::Programs {
            qemu: programs.qemu.clone(),
            vsock_daemon: programs.vsock_daemon.clone(),
            helper: env::current_exe().context("find our own program")?,
        },
        user: None,
        console_bytes: 64 * 1024,
    };
    let by = Deadline::after(STEP);
    let Launched { vm, ready, .. } = launch(config, by).await?;
    let control = by
        .run(ready.accept())
        .await
        .ok()
        .with_context(|| format!("the guest does not come: {}", vm.console_tail()))??;
    let token = Token::from_bytes([7; Token::LEN]);
    welcome(&control, &token, by).await?;
    clean(&ready.close())?;
    Ok(Guest { vm, token, control })
}

async fn measure(guest: &Guest, runs: usize, floor: &mut Floor) -> Result<()> {
    for run in 0..=runs {
        let begin = Instant::now();
        let raw = guest.dial(RAW).await?;
        let dialled = begin.elapsed();
        clean(&raw.close(Deadline::after(STEP)).await)?;
        let begin = Instant::now();
        let session = guest.session().await?;
        let opened = begin.elapsed();
        session.end().await?;
        if run > 0 {
            floor.dial.push(ms(dialled));
            floor.open.push(ms(opened));
        }
    }
    for (way, pair) in [(Way::Out, &mut floor.out), (Way::In, &mut floor.into)] {
        for copy in 0..=COPIES {
            let raw = guest.raw_copy(way).await.context("a raw copy")?;
            let session = guest.session_copy(way).await.context("through a session")?;
            if copy > 0 {
                pair.raw.push(mib_per_second(raw));
                pair.session.push(mib_per_second(session));
            }
        }
    }
    Ok(())
}

impl Guest {
    async fn dial(&self, port: VsockPort) -> Result<VsockTransport> {
        let holder = Holder::new(HolderKind::Session, "bench");
        let lease = self.vm.leases().issue(holder)?;
        Ok(self
            .vm
            .address()
            .dial(port, lease, Deadline::after(STEP))
            .await?)
    }

    async fn session(&self) -> Result<Session> {
        let transport = self.dial(VsockPort::SESSIONS).await?;
        let target = SessionTarget::Process(ProcessRef::init(ContainerId::new("bench")?));
        let by = Deadline::after(STEP);
        Ok(Session(
            open_session(transport, &self.token, &target, by).await?,
        ))
    }

    async fn raw_copy(&self, way: Way) -> Result<Duration> {
        let connection = self.dial(RAW).await?;
        let (read, write) = tokio::io::split(connection.io()?);
        let (mut read, mut write) = (Raw::new(read), Raw::new(write));
        let begin = Instant::now();
        order(&mut read, &mut write, way, VOLUME as u64).await?;
        let took = begin.elapsed();
        drop((read, write));
        clean(&connection.close(Deadline::after(STEP)).await)?;
        Ok(took)
    }

    async fn session_copy(&self, way: Way) -> Result<Duration> {
        let Session(mut session) = self.session().await?;
        let begin = Instant::now();
        order(&mut session.output, &mut session.input, way, VOLUME as u64).await?;
        let took = begin.elapsed();
        Session(session).end().await?;
        Ok(took)
    }
}

struct Session(HostSession);

impl Session {
    async fn end(self) -> Result<()> {
        let HostSession {
            mut input, handle, ..
        } = self.0;
        tokio::io::AsyncWriteExt::shutdown(&mut input).await?;
        clean(&handle.close(Deadline::after(STEP)).await)
    }
}

fn clean(report: &CloseReport) -> Result<()> {
    ensure!(report.is_clean(), "closed: {report}");
    Ok(())
}
