// SPDX-License-Identifier: Apache-2.0
//! The runs: a pod's life with runc and with podhull in turn, and a bare boot.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use podhull_testkit::containerd::podhull_config;
use podhull_testkit::cri::{Client, Container};
use podhull_testkit::oracle::{self, Snapshot};
use podhull_testkit::pod_processes::{self, Part};
use podhull_testkit::{Containerd, Node};

use crate::floor::{Boot, Floor};
use crate::machine::Machine;
use crate::options::Options;
use crate::statistics::Series;

/// For the node to be as it was between two pods.
const CLEAN_WITHIN: Duration = Duration::from_secs(30);

/// The steps that are timed, in order.
pub(crate) const STEPS: [&str; 5] = [
    "RunPodSandbox",
    "CreateContainer",
    "StartContainer",
    "ExecSync of `true`",
    "StopContainer (SIGKILL) + StopPodSandbox + RemovePodSandbox",
];

/// The parts whose memory is counted, in order.
pub(crate) const PARTS: [(Part, &str); 4] = [
    (Part::Shim, "shim"),
    (
        Part::Vmm,
        "VMM, with the guest's memory that it has touched",
    ),
    (Part::Helper, "device backends"),
    (
        Part::Container,
        "processes of the containers, pause among them",
    ),
];

/// The figures of one handler: times in ms, memory in MiB.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    pub(crate) steps: [Series; STEPS.len()],
    pub(crate) until_runs: Series,
    pub(crate) memory: [Series; PARTS.len()],
    pub(crate) memory_sum: Series,
    /// MemTotal − MemAvailable in the guest.
    pub(crate) guest: Series,
}

/// The figures of bare boots, in ms.
#[derive(Debug, Default)]
pub(crate) struct FloorFigures {
    pub(crate) first_line: Series,
    pub(crate) end: Series,
    pub(crate) command: String,
}

/// Everything that was measured, and where.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) runc: Figures,
    pub(crate) other: Figures,
    /// None if the handler has no VM.
    pub(crate) floor: Option<FloorFigures>,
    pub(crate) machine: Machine,
    pub(crate) load_at_end: String,
}

/// What one pod showed.
struct Sample {
    times: [Duration; STEPS.len()],
    memory_kib: [Option<u64>; PARTS.len()],
    guest_kib: Option<u64>,
    vmm: Option<Vec<String>>,
}

pub(crate) async fn run(node: &Node, options: &Options) -> Result<Measured> {
    let mut machine = Machine::look(node)?;
    let containerd = node.start_containerd(options.release).await?;
    machine.see_containerd(&containerd).await?;
    log_as_usual(node)?;
    let client = containerd.client();

    // Not counted: the first pods of a node find its caches cold.
    eprintln!("warming up");
    fs::create_dir_all("/run/podhull").context("create /run/podhull")?;
    pod_life(client, "runc").await?;
    let first = pod_life(client, &options.handler).await?;
    let floor = match &first.vmm {
        Some(command) => Some(Floor::like(command, node.programs())?),
        None => None,
    };
    if let Some(floor) = &floor {
        machine.see_vmm(floor)?;
        floor.boot().await?;
    }
    let rest = oracle::settled(&containerd, CLEAN_WITHIN).await?;

    let mut measured = Measured {
        runc: Figures::default(),
        other: Figures::default(),
        floor: floor.as_ref().map(|floor| FloorFigures {
            command: floor.shell_command(),
            ..FloorFigures::default()
        }),
        machine,
        load_at_end: String::new(),
    };
    for number in 1..=options.runs {
        eprintln!("run {number} of {}", options.runs);
        // In turn, and each first as often as second: the machine changes its pace.
        let runc_first = number % 2 == 1;
        for runc in [runc_first, !runc_first] {
            let handler = if runc { "runc" } else { &*options.handler };
            let sample = one(&containerd, &rest, handler)
                .await
                .with_context(|| format!("run {number} with {handler}"))?;
            let figures = if runc {
                &mut measured.runc
            } else {
                &mut measured.other
            };
            figures.add(&sample);
        }
        if let (Some(floor), Some(figures)) = (&floor, &mut measured.floor) {
            figures.add(
                &floor
                    .boot()
                    .await
                    .with_context(|| format!("bare boot {number}"))?,
            );
        }
    }
    measured.load_at_end = Machine::load()?;
    Ok(measured)
}

/// Test nodes log more than others do, which takes time.
pub(crate) fn log_as_usual(node: &Node) -> Result<()> {
    let config: String = podhull_config(node.programs())
        .lines()
        .filter(|line| !line.starts_with("log "))
        .flat_map(|line| [line, "\n"])
        .collect();
    fs::write("/etc/podhull/config.toml", config).context("write podhull's configuration")
}

/// One pod's life, which leaves nothing behind.
async fn one(containerd: &Containerd, rest: &Snapshot, handler: &str) -> Result<Sample> {
    let sample = pod_life(containerd.client(), handler).await?;
    oracle::assert_clean(containerd, rest, CLEAN_WITHIN).await?;
    Ok(sample)
}

async fn pod_life(client: &Client, handler: &str) -> Result<Sample> {
    let mut watch = Watch(Instant::now());
    let pod = client.pod("bench").handler(handler).run().await?;
    let run = watch.lap();
    let container = pod.container("main").idle().create().await?;
    let create = watch.lap();
    container.start().await?;
    let start = watch.lap();
    container.exec(["true"]).await?.success()?;
    let exec = watch.lap();

    let processes = pod_processes::of_pod(pod.id())?;
    let memory_kib = PARTS.map(|(part, _)| {
        let mut its = processes
            .iter()
            .filter(|process| process.part == part)
            .peekable();
        its.peek()?;
        Some(its.map(|process| process.pss_kib).sum())
    });
    let vmm = processes
        .into_iter()
        .find(|process| process.part == Part::Vmm);
    let guest_kib = match vmm {
        Some(_) => Some(used_in_guest(&container).await?),
        None => None,
    };

    watch.lap();
    container.stop(0).await?;
    pod.stop().await?;
    pod.remove().await?;
    Ok(Sample {
        times: [run, create, start, exec, watch.lap()],
        memory_kib,
        guest_kib,
        vmm: vmm.map(|process| process.arguments),
    })
}

/// In a guest, a container's /proc/meminfo is the guest's.
async fn used_in_guest(container: &Container) -> Result<u64> {
    let text = container
        .exec(["cat", "/proc/meminfo"])
        .await?
        .success()?
        .text();
    used_kib(&text).context("the guest's /proc/meminfo")
}

fn used_kib(meminfo: &str) -> Option<u64> {
    let value = |key: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse().ok()
    };
    value("MemTotal:")?.checked_sub(value("MemAvailable:")?)
}

struct Watch(Instant);

impl Watch {
    /// The time since the last lap.
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.0, now)
    }
}

impl Figures {
    fn add(&mut self, sample: &Sample) {
        for (series, time) in self.steps.iter_mut().zip(&sample.times) {
            series.push(ms(*time));
        }
        self.until_runs.push(ms(sample.times[..3].iter().sum()));
        for (series, kib) in self.memory.iter_mut().zip(sample.memory_kib) {
            if let Some(kib) = kib {
                series.push(mib(kib));
            }
        }
        self.memory_sum
            .push(mib(sample.memory_kib.iter().flatten().sum()));
        if let Some(kib) = sample.guest_kib {
            self.guest.push(mib(kib));
        }
    }
}

impl FloorFigures {
    fn add(&mut self, boot: &Boot) {
        self.first_line.push(ms(boot.first_line));
        self.end.push(ms(boot.end));
    }
}

pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a pod's memory is far below 2^52 KiB"
)]
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn used_memory_is_what_is_not_available() {
        let text = "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:    400 kB\n";
        assert_eq!(used_kib(text), Some(600));
        assert_eq!(used_kib("MemTotal: 1 kB\n"), None);
    }
}
