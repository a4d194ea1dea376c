// SPDX-License-Identifier: Apache-2.0
//! Streams of a pod whose VM stands still for a while.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use podhull_testkit::containerd::podhull_config;
use podhull_testkit::cri::{Container, Pod};
use tokio::net::TcpStream;

use super::lifecycle::boot_id;
use super::node::CONFIG;
use super::stream_load::{PORT, busy_pod};
use crate::case::{cases, contains, same};
use crate::context::{Context, heavy, refusal};
use crate::held::run_folder;
use crate::peer::{Spdy, echoes, numbers};
use crate::procfs::{Processes, Role, signal};
use crate::stream::Session;

cases! {
    // Only podhull's pods have a VM that can stand still.
    PODHULL_ONCE:
        load_on_a_frozen_guest_of_3_s_goes_unnoticed,
        load_on_a_frozen_guest_goes_on_after_it;
}

const WITHIN: Duration = Duration::from_secs(20);

/// A pod with one stream of each kind.
struct Streams {
    pod: Pod,
    container: Container,
    exec: Session,
    attached: Session,
    spdy: Spdy,
    forwarded: TcpStream,
    _server: Container,
}

impl Streams {
    async fn open(t: &Context) -> Result<Self> {
        let (pod, container, server) = busy_pod(t).await?;
        let script = "while read word; do echo $word; done; exit 3";
        let exec = Session::exec(&container, &["sh", "-c", script], false).await?;
        let mut attached = Session::attach(&container, false).await?;
        let spdy = Spdy::forward(t, &pod, PORT).await?;
        let forwarded = spdy.connect().await?;
        attached.ask("attached\n", "attached\n").await?;
        let mut streams = Self {
            pod,
            container,
            exec,
            attached,
            spdy,
            forwarded,
            _server: server,
        };
        streams.carry("before").await?;
        Ok(streams)
    }

    /// Bytes on all of them, and back.
    async fn carry(&mut self, word: &str) -> Result<()> {
        let line = format!("{word}\n");
        self.exec.send(&line).await?;
        self.attached.send(&line).await?;
        self.exec.wrote(&line).await?;
        self.attached.wrote(&line).await?;
        echoes(&mut self.forwarded, &numbers(50_000)).await
    }

    /// Nothing is lost, and nothing said twice, of what was carried before, during
    /// and after it.
    async fn are_whole(mut self) -> Result<()> {
        self.carry("after").await?;
        ensure!(self.pod.is_ready().await?, "the pod was given up");
        let said = "before\nmeanwhile\nafter\n";
        same!(String::from_utf8_lossy(&self.exec.stdout), said);
        let text = String::from_utf8_lossy(&self.attached.stdout).into_owned();
        same!(text.trim_start_matches("attached\n"), said);
        same!(
            self.spdy.end().await?,
            "",
            "what the forwarding client says"
        );
        Ok(())
    }
}

/// Whether the shim's log says that the guest was suspect.
fn was_suspect(processes: &Processes) -> Result<bool> {
    let folder = run_folder(processes.pid(Role::Shim)?)?;
    let log = fs::read_to_string(folder.join("shim.log"))?;
    Ok(log.contains("suspect=true"))
}

async fn load_on_a_frozen_guest_of_3_s_goes_unnoticed(t: &Context) -> Result<()> {
    let mut streams = Streams::open(t).await?;
    let processes = Processes::of(streams.pod.id())?;
    let boot = boot_id(&streams.container).await?;
    let vmm = processes.pid(Role::Vmm)?;
    let container = streams.container.clone();
    signal(vmm, Signal::SIGSTOP)?;
    let new = async {
        let output = container.exec(["echo", "late"]).await?;
        same!(output.text(), "late");
        anyhow::Ok(())
    };
    let thaw = async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        signal(vmm, Signal::SIGCONT)
    };
    tokio::try_join!(streams.carry("meanwhile"), new, thaw)?;
    same!(boot_id(&streams.container).await?, boot, "the guest");
    streams.are_whole().await?;
    ensure!(!was_suspect(&processes)?, "the guest was suspect");
    Ok(())
}

async fn load_on_a_frozen_guest_goes_on_after_it(t: &Context) -> Result<()> {
    let (beat, frozen) = if heavy() { (5, 30) } else { (2, 7) };
    let config = podhull_config(t.node().programs());
    let text = format!("{config}heartbeat_seconds = {beat}\n");
    fs::write(CONFIG, text).context("write podhull's configuration")?;
    let mut streams = Streams::open(t).await?;
    let processes = Processes::of(streams.pod.id())?;
    let vmm = processes.pid(Role::Vmm)?;
    let container = streams.container.clone();
    signal(vmm, Signal::SIGSTOP)?;
    let begin = Instant::now();
    // Their words wait; whoever comes new is told at once.
    let new = async {
        // A beat is due, and then missed.
        tokio::time::sleep(Duration::from_secs(2 * beat + 1)).await;
        let asked = Instant::now();
        let text = refusal(container.exec(["true"]).await, "an exec in a frozen guest")?;
        let took = asked.elapsed();
        contains!(&text, "heartbeat");
        ensure!(took < Duration::from_secs(1), "told only after {took:?}");
        let left = Duration::from_secs(frozen).saturating_sub(begin.elapsed());
        tokio::time::sleep(left).await;
        signal(vmm, Signal::SIGCONT)
    };
    tokio::try_join!(streams.carry("meanwhile"), new)?;
    streams.are_whole().await?;
    ensure!(
        was_suspect(&processes)?,
        "the log does not say suspect=true"
    );
    // It is no longer.
    let by = Instant::now() + WITHIN;
    while container.exec(["true"]).await.is_err() {
        ensure!(Instant::now() < by, "it is still suspect");
    }
    Ok(())
}
