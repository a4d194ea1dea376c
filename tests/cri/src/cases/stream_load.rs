// SPDX-License-Identifier: Apache-2.0
//! Many streams of a pod at once: what is left of them, and what becomes of
//! them when the pod is stopped.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use podhull_testkit::cri::{Container, Pod};
use podhull_testkit::pod_netns;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::case::{cases, same};
use crate::context::{Context, heavy};
use crate::held::{GROWTH_KIB, Held, InGuest, OfEach};
use crate::peer::{SIZE, Spdy, echoes, numbers, rest, serve};
use crate::procfs::{self, Processes, Role};
use crate::stream::Session;

cases! {
    ALL_TWICE:
        load_stopped_pod_ends_every_stream_in_order;
    // What is counted are podhull's own descriptors and threads.
    PODHULL_TWICE:
        load_that_has_ended_leaves_the_shim_as_it_was;
    PODHULL_ONCE:
        load_of_hundreds_of_execs_leaves_the_shim_as_it_was;
}

const EXECS: usize = 5;
const ATTACHES: usize = 2;
const FORWARDS: usize = 5;
pub(super) const PORT: u16 = 8001;
/// Sends [`SIZE`] bytes and ends.
const SOURCE: u16 = 8002;
const WITHIN: Duration = Duration::from_secs(20);
/// What the kubelet gives a pod by default, and containerd after it.
const GRACE: Duration = Duration::from_secs(30);

/// Writes what no buffer on the way is too small for, and waits.
const SAID: &str = "seq 20000; echo all >/tmp/said; exec sleep 1000";
const COUNT: &str = "n=0; while :; do n=$((n+1)); echo line $n; done";

/// Lines that follow each other; the last may be cut, and the first, too, unless
/// they are to begin with the first of all. Gives how many they are.
fn contiguous(bytes: &[u8], from_the_first: bool) -> Result<u64> {
    let mut text = std::str::from_utf8(bytes).context("no text")?;
    let mut next = Some(1);
    if !from_the_first {
        text = text.split_once('\n').map_or("", |(_, whole)| whole);
        let first = text.lines().next().unwrap_or_default();
        next = first
            .rsplit(' ')
            .next()
            .and_then(|number| number.parse().ok());
    }
    let mut count = 0;
    for line in text.split_inclusive('\n') {
        let number = next.with_context(|| format!("no number in {line:?}"))? + count;
        let expected = format!("line {number}\n");
        let cut = !line.ends_with('\n') && expected.starts_with(line);
        ensure!(
            line == expected || cut,
            "{line:?} after {count} lines, expected {expected:?}"
        );
        count += 1;
    }
    Ok(count)
}

/// A pod with a container that counts, and one with servers for what is
/// forwarded.
pub(super) async fn busy_pod(t: &Context) -> Result<(Pod, Container, Container)> {
    let pod = t.ready_pod().await?;
    let server = serve(
        t,
        &pod,
        "server",
        &["echo=127.0.0.1:8001", "source=127.0.0.1:8002"],
    )
    .await?;
    let script = format!("while read word; do echo $word; [ $word != go ] || {{ {COUNT}; }}; done");
    let container = t
        .container(&pod, "main")
        .shell(&script)
        .edit(|config| config.stdin = true)
        .start()
        .await?;
    Ok((pod, container, server))
}

/// Sends numbers to a server that echoes and checks them, until something
/// ends it; gives how many bytes came back.
async fn pump(mut stream: TcpStream) -> Result<u64> {
    let block = numbers(32 << 10);
    let (mut from, mut to) = stream.split();
    let sending = async { while to.write_all(&block).await.is_ok() {} };
    let reading = async {
        let mut count = 0;
        let mut buffer = vec![0; 1 << 16];
        while let Ok(size @ 1..) = from.read(&mut buffer).await {
            for byte in &buffer[..size] {
                ensure!(
                    *byte == block[count % block.len()],
                    "the byte at {count} differs"
                );
                count += 1;
            }
        }
        Ok(u64::try_from(count)?)
    };
    tokio::pin!(sending);
    tokio::pin!(reading);
    tokio::select! {
        count = &mut reading => count,
        () = &mut sending => reading.await,
    }
}

/// The shim's line about the end of a sandbox, once it is written.
async fn stop_report(t: &Context, pod: &Pod) -> Result<String> {
    let by = Instant::now() + WITHIN;
    loop {
        let log = t.containerd().await.log();
        let line = log
            .lines()
            .find(|line| line.contains("sandbox stopped") && line.contains(pod.id()));
        if let Some((_, report)) = line.and_then(|line| line.split_once("report=")) {
            return Ok(report.to_owned());
        }
        ensure!(Instant::now() < by, "the shim does not tell of the end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The shim of a pod that was stopped without ever having had a stream, where
/// shims outlive the stop.
async fn quiet_shim(t: &Context) -> Result<Option<u32>> {
    if !t.setup().shim_is_sandboxer() {
        return Ok(None);
    }
    let (pod, ..) = busy_pod(t).await?;
    let shim = Processes::of(pod.id())?.pid(Role::Shim)?;
    pod.stop().await?;
    Ok(Some(shim))
}

/// Whatever the streams had of a shim is given back with its pod's stop: it has
/// ended, or holds what one does whose pod had no streams.
async fn shim_gave_back(processes: &Processes, quiet: Option<u32>) -> Result<()> {
    let Some(quiet) = quiet else {
        return processes.gone(WITHIN).await;
    };
    let quiet = Held::at_rest(quiet).await?;
    quiet.again(processes.pid(Role::Shim)?).await
}

async fn load_stopped_pod_ends_every_stream_in_order(t: &Context) -> Result<()> {
    // First: its pool's idle threads have ended when the other pod is stopped.
    let quiet = quiet_shim(t).await?;
    let (pod, container, server) = busy_pod(t).await?;
    let processes = t.is_podhull().then(|| Processes::of(pod.id()));
    let processes = processes.transpose()?;
    let mut attached = Vec::new();
    for _ in 0..ATTACHES {
        attached.push(Session::attach(&container, false).await?);
    }
    let mut execs = Vec::new();
    for _ in 0..EXECS {
        execs.push(Session::exec(&container, &["sh", "-c", COUNT], false).await?);
    }
    // Without containerd between, whose relay may stand still with its client's.
    let namespace = pod_netns::open()?;
    let mut forwards = Vec::new();
    for _ in 0..FORWARDS {
        let mut stream = pod_netns::connect(&namespace, Ipv4Addr::LOCALHOST, PORT).await?;
        echoes(&mut stream, b"some").await?;
        forwards.push(tokio::spawn(pump(stream)));
    }
    for session in &mut execs {
        session.wrote("line 100\n").await?;
    }
    if let Some(session) = attached.first_mut() {
        session.send("go\n").await?;
    }
    for session in &mut attached {
        session.wrote("00\n").await?;
    }

    // All that these have to say is said, and nobody has read it when the stop comes.
    let mut unread = Session::exec(&container, &["sh", "-c", SAID], false).await?;
    let mut last = pod_netns::connect(&namespace, Ipv4Addr::LOCALHOST, SOURCE).await?;
    // It shares the guest's CPU with all that moves.
    let by = Instant::now() + 3 * WITHIN;
    while container.shell("cat /tmp/said").await?.text() != "all" {
        ensure!(Instant::now() < by, "an exec does not write");
    }
    server.wrote("source end", WITHIN).await?;

    // Everything moves: every byte that comes from here on is checked, too.
    let begin = Instant::now();
    let ends = execs
        .iter_mut()
        .chain([&mut unread])
        .map(Session::exit_code);
    let ending = async {
        tokio::try_join!(
            try_join_all(ends),
            try_join_all(attached.iter_mut().map(Session::ended)),
            rest(&mut last)
        )
    };
    let (stopped, ended) = tokio::join!(pod.stop(), tokio::time::timeout(GRACE, ending));
    stopped?;
    let (codes, _, last) = ended.context("a session goes on")??;
    let took = begin.elapsed();
    ensure!(took < GRACE, "all sessions ended only after {took:?}");
    same!(codes, vec![137; EXECS + 1], "exit codes");
    for session in &execs {
        let lines = contiguous(&session.stdout, true).context("an exec")?;
        ensure!(lines >= 100, "an exec has {lines} lines");
    }
    for session in &attached {
        // It may begin anywhere.
        contiguous(&session.stdout, false).context("an attach")?;
    }
    let said: String = (1..=20000).map(|number| format!("{number}\n")).collect();
    ensure!(
        unread.stdout == said.as_bytes(),
        "{} bytes of an exec that had said all",
        unread.stdout.len()
    );
    ensure!(
        last == numbers(SIZE),
        "{} bytes of a server that had ended",
        last.len()
    );
    for forward in forwards {
        let count = tokio::time::timeout(WITHIN, forward)
            .await
            .context("a forward goes on")??;
        let count = count.context("a forward")?;
        ensure!(count > 0, "nothing was forwarded");
    }
    if let Some(processes) = processes {
        // In the order in which they were done: the channel to the agent before its
        // transport, and the VM after both. Everybody read on: nothing had to be forced.
        let report = stop_report(t, &pod).await?;
        let steps = [
            "processes",
            "sessions",
            "agent",
            "grpc",
            "transport",
            "vm",
            "network",
            "tree",
            "folder",
        ];
        let clean = steps.map(|step| format!("{step}: clean")).join(", ");
        same!(report.trim_matches('"'), clean, "the end of the sandbox");
        shim_gave_back(&processes, quiet).await?;
    }
    Ok(())
}

/// Opens, uses and ends one round of everything.
async fn round(t: &Context, pod: &Pod, container: &Container) -> Result<()> {
    let mut attached = Vec::new();
    for _ in 0..ATTACHES {
        attached.push(Session::attach(container, false).await?);
    }
    let execs = (0..EXECS).map(|_| async {
        let script = "read line; seq 10000; exit 3";
        let mut session = Session::exec(container, &["sh", "-c", script], false).await?;
        session.send("go\n").await?;
        same!(session.exit_code().await?, 3);
        anyhow::Ok(())
    });
    try_join_all(execs).await?;
    let spdy = Spdy::forward(t, pod, PORT).await?;
    let mut streams = Vec::new();
    for _ in 0..FORWARDS {
        streams.push(spdy.connect().await?);
    }
    let bytes = numbers(100_000);
    try_join_all(streams.iter_mut().map(|stream| echoes(stream, &bytes))).await?;
    drop(streams);
    for mut session in attached {
        session.ask("word\n", "word\n").await?;
        session.close().await?;
    }
    spdy.end().await?;
    Ok(())
}

async fn load_that_has_ended_leaves_the_shim_as_it_was(t: &Context) -> Result<()> {
    let (pod, container, _server) = busy_pod(t).await?;
    let shim = Processes::of(pod.id())?.pid(Role::Shim)?;
    // The first makes what stays: threads of the pool, connections.
    round(t, &pod, &container).await?;
    let before = Held::at_rest(shim).await?;
    let inside = InGuest::now(shim).await?;
    for _ in 0..3 {
        round(t, &pod, &container).await?;
    }
    before.again(shim).await?;
    inside.again(shim).await
}

async fn load_of_hundreds_of_execs_leaves_the_shim_as_it_was(t: &Context) -> Result<()> {
    let many = if heavy() { 1000 } else { 100 };
    let (pod, container) = t.idle().await?;
    let container = &container;
    let processes = Processes::of(pod.id())?;
    let shim = processes.pid(Role::Shim)?;
    let some = async |count: u32| {
        for number in 0..count {
            let output = container
                .shell(&format!("echo {number}"))
                .await?
                .success()?;
            same!(output.text(), number.to_string());
        }
        anyhow::Ok(())
    };
    let at_once = async || {
        let execs = (0..50).map(|number| async move {
            same!(
                container.shell(&format!("exit {number}")).await?.code,
                number
            );
            anyhow::Ok(())
        });
        try_join_all(execs).await
    };
    // Each worker thread's allocator keeps what its busiest moment took.
    for _ in 0..3 {
        at_once().await?;
    }
    some(20).await?;
    let (before, resident) = (Held::at_rest(shim).await?, procfs::resident_kib(shim)?);
    let each = OfEach::at_rest(&processes).await?;
    let inside = InGuest::now(shim).await?;
    some(many).await?;
    at_once().await?;
    before.again(shim).await?;
    let now = procfs::resident_kib(shim)?;
    ensure!(
        now <= resident + GROWTH_KIB,
        "{resident} KiB were resident, now {now}"
    );
    each.again(&processes).await?;
    inside.again(shim).await
}
