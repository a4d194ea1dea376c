// SPDX-License-Identifier: Apache-2.0
//! The guest is dead, or does as if: whoever has a stream open is told.

use std::fs;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use podhull_testkit::containerd::podhull_config;
use podhull_testkit::cri::{Container, Pod};
use podhull_testkit::pod_netns;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::node::CONFIG;
use crate::case::{cases, contains, same};
use crate::client::{STDIN, exec};
use crate::context::{Context, refusal};
use crate::peer::{Spdy, echoes, numbers, serve};
use crate::procfs::{Processes, Role, signal};
use crate::stream::Session;

cases! {
    PODHULL_TWICE:
        dead_vmm_is_seen_within_a_second,
        dead_vmm_ends_every_stream;
    PODHULL_ONCE:
        dead_silent_guest_ends_every_stream;
}

const PORT: u16 = 8001;
const WITHIN: Duration = Duration::from_secs(20);
/// What containerd waits for a client's own end after that of a forwarded port.
const CONTAINERD_WAITS: Duration = Duration::from_secs(1);
/// For all clients to be told, also on a busy machine that is emulated itself. Silence is noticed after a minute.
const SOON: Duration = Duration::from_secs(5);

async fn dead_vmm_is_seen_within_a_second(t: &Context) -> Result<()> {
    const SEEN: Duration = Duration::from_secs(1);
    let (pod, container) = t.idle().await?;
    let processes = Processes::of(pod.id())?;
    let exec = container.shell("echo begun >/dev/shm/begun; sleep 1000");
    let exec = async {
        let answer = exec.await;
        (answer, Instant::now())
    };
    let killed = async {
        while container.shell("cat /dev/shm/begun").await?.text() != "begun" {}
        signal(processes.pid(Role::Vmm)?, Signal::SIGKILL)?;
        let begin = Instant::now();
        container.exited(WITHIN).await?;
        let container_seen = begin.elapsed();
        pod.not_ready(WITHIN).await?;
        anyhow::Ok((begin, container_seen, begin.elapsed()))
    };
    let both = async { tokio::join!(exec, killed) };
    let ((_, answered), killed) = tokio::time::timeout(WITHIN, both)
        .await
        .context("the exec is not answered")?;
    let (begin, container_seen, pod_seen) = killed?;
    for (who, took) in [
        ("the exec", answered - begin),
        ("the container", container_seen),
        ("the pod", pod_seen),
    ] {
        ensure!(took < SEEN, "{who} ended only after {took:?}");
    }
    Ok(())
}

/// Everything that a client may have open, in use.
#[derive(Debug)]
struct Open {
    attached: Session,
    exec: Session,
    /// Writes to a process that does not read.
    writer: tokio::process::Child,
    spdy: Spdy,
    forwarded: TcpStream,
    direct: TcpStream,
}

impl Open {
    async fn on(t: &Context, pod: &Pod, container: &Container) -> Result<Self> {
        let mut attached = Session::attach(container, false).await?;
        attached.ask("attached\n", "attached\n").await?;
        let mut exec_session = Session::exec(container, &["cat"], false).await?;
        exec_session.send("exec\n").await?;
        exec_session.wrote("exec\n").await?;
        let script = "echo up >/tmp/writer; exec sleep 1000";
        let writer = exec(t, container, STDIN, &["sh", "-c", script])
            .await?
            .spawn()?;
        let by = Instant::now() + WITHIN;
        while container.shell("cat /tmp/writer").await?.text() != "up" {
            ensure!(Instant::now() < by, "an exec does not start");
        }
        let spdy = Spdy::forward(t, pod, PORT).await?;
        let mut forwarded = spdy.connect().await?;
        echoes(&mut forwarded, b"some").await?;
        let namespace = pod_netns::open()?;
        let mut direct = pod_netns::connect(&namespace, Ipv4Addr::LOCALHOST, PORT).await?;
        echoes(&mut direct, b"some").await?;
        Ok(Self {
            attached,
            exec: exec_session,
            writer,
            spdy,
            forwarded,
            direct,
        })
    }

    /// Waits until all of them have ended; when the last one did.
    async fn ended(mut self) -> Result<Instant> {
        let mut stdin = self.writer.stdin.take().context("stdin")?;
        let block = numbers(1 << 16);
        let writing = async {
            while stdin.write_all(&block).await.is_ok() {}
            self.writer.wait().await.context("the writer's client")
        };
        let over = async |mut stream: TcpStream| {
            let mut buffer = [0; 1024];
            // An end or a reset: but not silence.
            while let Ok(1..) = stream.read(&mut buffer).await {}
            anyhow::Ok(())
        };
        tokio::try_join!(
            async { self.attached.ended().await.context("the attach") },
            async { self.exec.ended().await.context("the exec") },
            writing,
            over(self.forwarded),
            over(self.direct),
        )?;
        let ended = Instant::now();
        self.spdy.end().await?;
        Ok(ended)
    }
}

/// A pod with a container that echoes its input, and a server.
async fn open_pod(t: &Context) -> Result<(Pod, Container)> {
    let pod = t.ready_pod().await?;
    serve(t, &pod, "server", &["echo=127.0.0.1:8001"]).await?;
    let container = t
        .container(&pod, "main")
        .shell("while read word; do echo $word; done")
        .edit(|config| config.stdin = true)
        .start()
        .await?;
    Ok((pod, container))
}

/// The pod can be removed, and nothing of it runs.
async fn is_removed(pod: &Pod, container: &Container, processes: &Processes) -> Result<()> {
    same!(container.exited(WITHIN).await?.exit_code, 137, "exit code");
    pod.not_ready(WITHIN).await?;
    pod.stop().await?;
    container.remove().await?;
    pod.remove().await?;
    processes.gone(WITHIN).await
}

async fn dead_vmm_ends_every_stream(t: &Context) -> Result<()> {
    let (pod, container) = open_pod(t).await?;
    let processes = Processes::of(pod.id())?;
    let open = Open::on(t, &pod, &container).await?;
    signal(processes.pid(Role::Vmm)?, Signal::SIGKILL)?;
    let begin = Instant::now();
    let ended = tokio::time::timeout(WITHIN, open.ended()).await;
    let took = ended.context("a stream goes on")?? - begin;
    ensure!(
        took < CONTAINERD_WAITS + SOON,
        "all ended only after {took:?}"
    );
    is_removed(&pod, &container, &processes).await
}

async fn dead_silent_guest_ends_every_stream(t: &Context) -> Result<()> {
    const DEAD_AFTER: Duration = Duration::from_secs(8);
    let config = podhull_config(t.node().programs());
    let seconds = DEAD_AFTER.as_secs();
    let text = format!("{config}heartbeat_seconds = 1\ndead_after_seconds = {seconds}\n");
    fs::write(CONFIG, text).context("write podhull's configuration")?;
    let (pod, container) = open_pod(t).await?;
    let processes = Processes::of(pod.id())?;
    let open = Open::on(t, &pod, &container).await?;
    signal(processes.pid(Role::Vmm)?, Signal::SIGSTOP)?;
    let begin = Instant::now();
    let answers = async {
        // Asked before the guest is suspect, and answered by the verdict.
        let (exec, stopped) = tokio::join!(container.exec(["true"]), container.stop(100));
        for answer in [exec.map(drop), stopped] {
            contains!(&refusal(answer, "a call to a silent guest")?, "silent");
        }
        anyhow::Ok(())
    };
    let all = async { tokio::try_join!(answers, open.ended()) };
    let ((), ended) = tokio::time::timeout(DEAD_AFTER + WITHIN, all)
        .await
        .context("not everybody who waits is answered")??;
    let took = ended - begin;
    let given_up = DEAD_AFTER - Duration::from_secs(1)..DEAD_AFTER + Duration::from_secs(4);
    ensure!(given_up.contains(&took), "all ended after {took:?}");
    is_removed(&pod, &container, &processes).await
}
