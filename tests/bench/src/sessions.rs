// SPDX-License-Identifier: Apache-2.0
//! Exec, terminals and forwarded ports, with runc and with podhull in turn.

use std::fs::File;
use std::net::Ipv4Addr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podhull_testkit::cri::Container;
use podhull_testkit::programs::Programs;
use podhull_testkit::{Containerd, Node, pod_netns, pod_processes};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::machine::Machine;
use crate::options::Options;
use crate::quick::{log_as_usual, ms};
use crate::statistics::Series;
use crate::vsock::{self, Floor};

/// What is timed, in order; in ms but where it says so.
pub(crate) const FIGURES: [&str; 6] = [
    "ExecSync of `true`",
    "a keystroke's echo, through a terminal of client-go over SPDY",
    "forwarded port: connection, 64 bytes there and back",
    "forwarded port: connections in a row, per second",
    "forwarded port: throughput, one way (MiB/s)",
    "exec's standard output, by containerd's ctr (MiB/s)",
];
/// Of the last two: CPU that shim, VMM and device backends took, in s per GiB.
pub(crate) const COSTS: [&str; 2] = [
    "CPU on the node per GiB forwarded (s)",
    "CPU on the node per GiB of standard output (s)",
];

const MIB: usize = 1 << 20;
/// What one throughput run moves.
pub(crate) const VOLUME: usize = 64 * MIB;
const ECHO: u16 = 8001;
const SINK: u16 = 8002;
/// Nothing that is waited for takes longer.
const WITHIN: Duration = Duration::from_secs(120);
/// Keystrokes and connections that are not counted: the first find caches cold.
const WARM: usize = 3;

/// The figures of one handler.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    pub(crate) figures: [Series; FIGURES.len()],
    pub(crate) costs: [Series; COSTS.len()],
}

/// Everything that was measured, and where.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) runc: Figures,
    pub(crate) other: Figures,
    pub(crate) floor: Floor,
    pub(crate) machine: Machine,
    pub(crate) load_at_end: String,
}

pub(crate) async fn run(node: &Node, options: &Options) -> Result<Measured> {
    let mut machine = Machine::look(node)?;
    let containerd = node.start_containerd(options.release).await?;
    machine.see_containerd(&containerd).await?;
    log_as_usual(node)?;
    let mut measured = Measured {
        runc: Figures::default(),
        other: Figures::default(),
        floor: Floor::default(),
        machine,
        load_at_end: String::new(),
    };
    // A pod of each in turn, so that neither has the machine's better hours.
    for round in 1..=ROUNDS {
        eprintln!("round {round} of {ROUNDS}");
        for runc in [round % 2 == 1, round % 2 == 0] {
            let (handler, figures) = if runc {
                ("runc", &mut measured.runc)
            } else {
                (&*options.handler, &mut measured.other)
            };
            one_pod(node, &containerd, handler, options.runs, figures)
                .await
                .with_context(|| format!("round {round} with {handler}"))?;
        }
    }
    eprintln!("the floor");
    measured.floor = vsock::run(node, options.runs * ROUNDS).await?;
    measured.load_at_end = Machine::load()?;
    Ok(measured)
}

const ROUNDS: usize = 4;

async fn one_pod(
    node: &Node,
    containerd: &Containerd,
    handler: &str,
    runs: usize,
    figures: &mut Figures,
) -> Result<()> {
    let client = containerd.client();
    let pod = client.pod("bench").handler(handler).run().await?;
    let container = pod.container("main").idle().start().await?;
    let peer = node.programs().streams.with_file_name("peer");
    let folder = peer.parent().context("the peer's folder")?;
    let servers = [
        format!("echo=127.0.0.1:{ECHO}"),
        format!("sink=127.0.0.1:{SINK}"),
    ];
    let server = pod
        .container("server")
        .mount(&folder.to_string_lossy(), "/peer", true)
        .edit(|config| {
            config.command = std::iter::once("/peer/peer".to_owned())
                .chain(servers)
                .collect();
        })
        .start()
        .await?;
    server.wrote("ready", WITHIN).await?;
    let netns = pod_netns::open()?;

    let [exec, keys, connect, rate, throughput, output] = &mut figures.figures;
    let [forward_cost, output_cost] = &mut figures.costs;
    execs(&container, runs, exec).await?;
    keystrokes(node.programs(), &container, runs, keys).await?;
    let took = connections(&netns, runs, connect).await?;
    rate.push(per_second(runs, took));
    let before = cpu(pod.id())?;
    throughput.push(mib_per_second(send(&netns).await?));
    forward_cost.push(per_gib(cpu(pod.id())? - before));
    let before = cpu(pod.id())?;
    output.push(mib_per_second(
        standard_output(containerd, &container).await?,
    ));
    output_cost.push(per_gib(cpu(pod.id())? - before));

    for container in [container, server] {
        container.stop(0).await?;
    }
    pod.stop().await?;
    pod.remove().await
}

async fn execs(container: &Container, runs: usize, series: &mut Series) -> Result<()> {
    for run in 0..runs + WARM {
        let begin = Instant::now();
        container.exec(["true"]).await?.success()?;
        if run >= WARM {
            series.push(ms(begin.elapsed()));
        }
    }
    Ok(())
}

/// `cat` in a terminal: the kernel of the process echoes each byte at once.
async fn keystrokes(
    programs: &Programs,
    container: &Container,
    runs: usize,
    series: &mut Series,
) -> Result<()> {
    let url = container.exec_url(&["cat"], true, true).await?;
    let mut child = Command::new(&programs.streams)
        .args(["-protocol", "spdy", "-stdin", "-tty", "run"])
        .arg(url)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("run the streaming client: make streams")?;
    let mut keyboard = child.stdin.take().context("stdin")?;
    let mut screen = child.stdout.take().context("stdout")?;
    for run in 0..runs + WARM {
        let begin = Instant::now();
        keyboard.write_all(b"x").await?;
        let echo = tokio::time::timeout(WITHIN, screen.read_u8()).await;
        ensure!(echo.context("no echo")?? == b'x', "another echo");
        if run >= WARM {
            series.push(ms(begin.elapsed()));
        }
    }
    // The end of a line, then of the input.
    keyboard.write_all(b"\n\x04").await?;
    let mut rest = Vec::new();
    tokio::time::timeout(WITHIN, screen.read_to_end(&mut rest))
        .await
        .context("cat goes on")??;
    ensure!(child.wait().await?.success(), "the client failed");
    Ok(())
}

/// One after the other, as containerd makes them; how long all of them took.
async fn connections(netns: &File, runs: usize, series: &mut Series) -> Result<Duration> {
    let netns = netns.try_clone()?;
    // Inside for all of them: a thread for each would be measured, too.
    let times = pod_netns::inside(&netns, move || {
        use std::io::{Read, Write};
        let mut times = Vec::new();
        for _ in 0..runs + WARM {
            let begin = Instant::now();
            let mut stream = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, ECHO))?;
            stream.set_read_timeout(Some(WITHIN))?;
            let (sent, mut back) = ([7; 64], [0; 64]);
            stream.write_all(&sent)?;
            stream.read_exact(&mut back)?;
            ensure!(sent == back, "another echo");
            times.push(begin.elapsed());
        }
        Ok(times)
    })
    .await?;
    let counted = &times[WARM..];
    for time in counted {
        series.push(ms(*time));
    }
    Ok(counted.iter().sum())
}

/// Sends to a server that answers once it has everything.
async fn send(netns: &File) -> Result<Duration> {
    let mut stream: TcpStream = pod_netns::connect(netns, Ipv4Addr::LOCALHOST, SINK).await?;
    let block = vec![b'z'; MIB];
    let begin = Instant::now();
    let exchange = async {
        for _ in 0..VOLUME / MIB {
            stream.write_all(&block).await?;
        }
        stream.shutdown().await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        ensure!(answer.starts_with(&VOLUME.to_string()), "it got {answer}");
        Ok(())
    };
    tokio::time::timeout(WITHIN, exchange)
        .await
        .context("the server does not answer")??;
    Ok(begin.elapsed())
}

/// The standard output of a process, through its FIFO and ctr, to nowhere.
async fn standard_output(containerd: &Containerd, container: &Container) -> Result<Duration> {
    let blocks = (VOLUME / 65536).to_string();
    let count = format!("count={blocks}");
    let id = container.id();
    let args = [
        "tasks",
        "exec",
        "--exec-id",
        "flood",
        id,
        "dd",
        "if=/dev/zero",
        "bs=65536",
        &count,
    ];
    let begin = Instant::now();
    let status = containerd
        .ctr_command(&args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status();
    let status = tokio::time::timeout(WITHIN, status)
        .await
        .context("ctr goes on")??;
    ensure!(status.success(), "ctr ended with {status}");
    Ok(begin.elapsed())
}

/// What the pod's shim and all below it have used so far.
fn cpu(pod: &str) -> Result<Duration> {
    let ticks = pod_processes::of_pod(pod)?
        .iter()
        .map(|process| {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid))?;
            // The name in brackets may hold anything.
            let fields = stat.rsplit_once(')').context("stat")?.1;
            let fields: Vec<_> = fields.split_whitespace().collect();
            let [user, system] = [11, 12].map(|index| fields[index].parse::<u64>());
            Ok(user? + system?)
        })
        .sum::<Result<u64>>()?;
    // sysconf(_SC_CLK_TCK) is 100 on every Linux of ours.
    Ok(Duration::from_millis(ticks * 10))
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn per_second(count: usize, took: Duration) -> f64 {
    count as f64 / took.as_secs_f64()
}

pub(crate) fn mib_per_second(took: Duration) -> f64 {
    per_second(VOLUME / MIB, took)
}

fn per_gib(cpu: Duration) -> f64 {
    let parts = u32::try_from((1 << 30) / VOLUME).unwrap_or(1);
    (cpu * parts).as_secs_f64()
}
