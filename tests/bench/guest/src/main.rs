// SPDX-License-Identifier: Apache-2.0
//! PID 1 of a guest that moves bytes over vsock and does nothing else.

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use podhull_bench_guest::{RAW, Raw, obey};
use podhull_transport::{
    CloseReport, GuestTimes, Holder, HolderKind, LeaseSet, VsockListener, VsockTransport, announce,
    dial_host, receive_session,
};
use podhull_types::{Cid, Deadline, Token, VsockPort};
use tokio::io::AsyncReadExt;

const STEP: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    if let Err(error) = run() {
        eprintln!("podhull-bench-guest: {error:#}");
    }
    // The end of PID 1 is the end of the guest.
    ExitCode::FAILURE
}

fn run() -> Result<()> {
    let none: Option<&str> = None;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).context("mount /proc")?;
    let words = fs::read_to_string("/proc/cmdline").context("read the command line")?;
    let port = VsockPort::ready_on(&words).context("no port for READY")?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(serve(port))
}

async fn serve(ready: VsockPort) -> Result<()> {
    let leases = LeaseSet::new("guest");
    let raw = VsockListener::bind_vsock(Some(RAW), Cid::HOST, leases.clone())?;
    let sessions = VsockListener::bind_vsock(Some(VsockPort::SESSIONS), Cid::HOST, leases.clone())?;
    let lease = leases.issue(Holder::new(HolderKind::Control, "host"))?;
    let host = dial_host(ready, lease, Deadline::after(STEP)).await?;
    let times = GuestTimes {
        kernel_to_agent: Duration::ZERO,
        agent_to_ready: Duration::ZERO,
    };
    let token = announce(&host, times, Deadline::after(STEP)).await?;
    let mut io = host.io()?;
    loop {
        tokio::select! {
            // The host says nothing more; its end is ours.
            _ = io.read_u8() => return Ok(()),
            connection = raw.accept() => {
                let connection = connection?;
                tokio::spawn(async move { told(without_session(connection).await) });
            }
            connection = sessions.accept() => {
                let (connection, token) = (connection?, token.clone());
                tokio::spawn(async move { told(with_session(connection, &token).await) });
            }
        }
    }
}

/// The console's reader is the only one to tell.
fn told(result: Result<()>) {
    if let Err(error) = result {
        eprintln!("podhull-bench-guest: {error:#}");
    }
}

async fn without_session(connection: VsockTransport) -> Result<()> {
    let (read, write) = tokio::io::split(connection.io()?);
    let (mut read, mut write) = (Raw::new(read), Raw::new(write));
    obey(&mut read, &mut write).await?;
    drop((read, write));
    clean(&connection.close(Deadline::after(STEP)).await)
}

async fn with_session(connection: VsockTransport, token: &Token) -> Result<()> {
    let incoming = receive_session(connection, token, Deadline::after(STEP)).await?;
    let mut session = incoming.accept(Deadline::after(STEP)).await?;
    drop(session.error);
    obey(&mut session.input, &mut session.output).await?;
    session.handle.send_exit(0);
    session.handle.closed().await;
    clean(&session.handle.close(Deadline::after(STEP)).await)
}

fn clean(report: &CloseReport) -> Result<()> {
    ensure!(report.is_clean(), "closed: {report}");
    Ok(())
}
