// SPDX-License-Identifier: Apache-2.0
//! What a shim holds while its pod lives.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use podhull_testkit::oracle::descriptors;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use crate::case::Skip;
use crate::procfs::{self, Processes, Role};

const WITHIN: Duration = Duration::from_secs(20);
/// For this long nothing is to change.
const REST: Duration = Duration::from_secs(1);

/// Its descriptors by what they lead to, its threads, and what it counts itself:
/// tasks, transports, leases, sessions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Held {
    descriptors: BTreeMap<String, usize>,
    threads: usize,
    gauges: BTreeMap<String, i64>,
}

impl Held {
    async fn by(shim: u32) -> Result<Self> {
        Ok(Self {
            descriptors: descriptors(shim)?,
            threads: procfs::status(shim, "Threads")?.parse()?,
            // Last: who reads them has a connection.
            gauges: gauges(shim).await?,
        })
    }

    fn exceeds(&self, other: &Self) -> bool {
        self.threads > other.threads
            || any_more(&self.descriptors, &other.descriptors)
            || any_more(&self.gauges, &other.gauges)
    }

    /// The least that the shim holds for a while, once that no longer changes:
    /// containerd keeps a forwarded connection for a second after its end. A
    /// heartbeat, and who reads this, come and go.
    pub(crate) async fn at_rest(shim: u32) -> Result<Self> {
        settled(async || {
            let (mut least, begin) = (Self::by(shim).await?, Instant::now());
            while begin.elapsed() < REST {
                tokio::time::sleep(Duration::from_millis(100)).await;
                least = least.or_less(&Self::by(shim).await?);
            }
            Ok(least)
        })
        .await
    }

    fn or_less(&self, other: &Self) -> Self {
        Self {
            descriptors: lesser(&self.descriptors, &other.descriptors),
            threads: self.threads.min(other.threads),
            gauges: lesser(&self.gauges, &other.gauges),
        }
    }

    /// Waits until the shim holds no more than this again.
    pub(crate) async fn again(&self, shim: u32) -> Result<()> {
        self.again_within(shim, WITHIN).await
    }

    pub(crate) async fn again_within(&self, shim: u32, within: Duration) -> Result<()> {
        let by = Instant::now() + within;
        loop {
            let now = Self::by(shim).await?;
            if !now.exceeds(self) {
                return Ok(());
            }
            ensure!(Instant::now() < by, "held: {now:#?}, before: {self:#?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// What `look` gives twice in a row.
async fn settled<T: PartialEq + Debug>(mut look: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    let by = Instant::now() + WITHIN;
    let mut last = look().await?;
    loop {
        let now = look().await?;
        if now == last {
            return Ok(now);
        }
        ensure!(
            Instant::now() < by,
            "it does not come to rest: {last:#?}, then {now:#?}"
        );
        last = now;
    }
}

/// The lesser of each count; what one of them has not is left out.
fn lesser<N: Ord + Copy>(
    one: &BTreeMap<String, N>,
    other: &BTreeMap<String, N>,
) -> BTreeMap<String, N> {
    let both = one.iter().filter_map(|(name, count)| {
        let least = *count.min(other.get(name)?);
        Some((name.clone(), least))
    });
    both.collect()
}

fn any_more<N: PartialOrd + Default>(
    now: &BTreeMap<String, N>,
    then: &BTreeMap<String, N>,
) -> bool {
    let none = N::default();
    now.iter()
        .any(|(name, count)| count > then.get(name).unwrap_or(&none))
}

/// The descriptors of each of a pod's processes, by what they lead to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OfEach(BTreeMap<&'static str, BTreeMap<String, usize>>);

impl OfEach {
    /// What they have once that no longer changes.
    pub(crate) async fn at_rest(processes: &Processes) -> Result<Self> {
        settled(async || {
            tokio::time::sleep(REST).await;
            Self::now(processes)
        })
        .await
    }

    fn now(processes: &Processes) -> Result<Self> {
        let mut counts = BTreeMap::new();
        for (name, role) in [
            ("shim", Role::Shim),
            ("VMM", Role::Vmm),
            ("file server", Role::FileServer),
            ("vsock daemon", Role::VsockDaemon),
        ] {
            match processes.pid(role) {
                Ok(pid) => drop(counts.insert(name, descriptors(pid)?)),
                Err(error) if error.is::<Skip>() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self(counts))
    }

    /// Waits until they have these again, no more and no fewer.
    pub(crate) async fn again(&self, processes: &Processes) -> Result<()> {
        let by = Instant::now() + Duration::from_secs(10);
        loop {
            let now = Self::now(processes)?;
            if now == *self {
                return Ok(());
            }
            ensure!(Instant::now() < by, "held: {now:#?}, before: {self:#?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// What the memory of a process may grow by while it does the same again and
/// again: an allocator keeps what was given back.
pub(crate) const GROWTH_KIB: i64 = 4096;

/// What the agent of a shim's guest holds: descriptors, tasks, leases, threads,
/// memory.
#[derive(Debug, Clone)]
pub(crate) struct InGuest(BTreeMap<String, i64>);

impl InGuest {
    /// As the agent says with the next heartbeat. One that is under way already tells
    /// of the moment before: who asks has seen to it that nothing goes on.
    pub(crate) async fn now(shim: u32) -> Result<Self> {
        let folder = run_folder(shim)?;
        let wanted = beats(&metrics(&folder).await?)? + 1;
        let by = Instant::now() + WITHIN;
        while beats(&metrics(&folder).await?)? < wanted {
            ensure!(Instant::now() < by, "there is no heartbeat");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // A beat is counted right before what it says is noted.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let text = metrics(&folder).await?;
        let mut held = BTreeMap::new();
        for line in text.lines() {
            if let Some(said) = line.strip_prefix("podhull_guest_holds") {
                let (what, number) = said.rsplit_once(' ').context("a metric")?;
                held.insert(what.to_owned(), number.parse().context(line.to_owned())?);
            }
        }
        ensure!(held.len() == 5, "the agent says {held:?}");
        Ok(Self(held))
    }

    /// Waits until it holds no more than this again, and hardly more memory.
    pub(crate) async fn again(&self, shim: u32) -> Result<()> {
        let mut most = self.0.clone();
        let resident = most.get_mut("{what=\"resident_kib\"}");
        *resident.context("no memory is told of")? += GROWTH_KIB;
        let by = Instant::now() + WITHIN;
        loop {
            let now = Self::now(shim).await?;
            if !any_more(&now.0, &most) {
                return Ok(());
            }
            ensure!(Instant::now() < by, "held: {now:#?}, before: {self:#?}");
        }
    }
}

/// How many heartbeats were answered.
fn beats(metrics: &str) -> Result<u64> {
    let name = "podhull_agent_rpc_duration_seconds_count{method=\"Ping\",result=\"ok\"} ";
    let mut lines = metrics.lines();
    let number = lines.find_map(|line| line.strip_prefix(name));
    number.map_or(Ok(0), |number| Ok(number.parse()?))
}

/// The run folder of a shim.
pub(crate) fn run_folder(shim: u32) -> Result<PathBuf> {
    for folder in fs::read_dir("/run/podhull").context("podhull's run folder")? {
        let folder = folder?.path();
        // Another pod's may be on its way out.
        let Ok(identity) = fs::read(folder.join("shim.json")) else {
            continue;
        };
        let identity: Value = serde_json::from_slice(&identity).context("shim.json")?;
        if identity["pid"] == shim {
            return Ok(folder);
        }
    }
    anyhow::bail!("the shim {shim} has no run folder")
}

/// The metrics of the shim that has this run folder.
pub(crate) async fn metrics(folder: &Path) -> Result<String> {
    let mut reader = UnixStream::connect(folder.join("metrics.sock")).await?;
    let request = b"GET /metrics HTTP/1.1\r\nHost: shim\r\nConnection: close\r\n\r\n";
    reader.write_all(request).await?;
    let mut text = String::new();
    let read = tokio::time::timeout(WITHIN, reader.read_to_string(&mut text));
    read.await.context("the metrics are not told")??;
    Ok(text)
}

/// What the shim's metrics say is there now.
async fn gauges(shim: u32) -> Result<BTreeMap<String, i64>> {
    let text = metrics(&run_folder(shim)?).await?;
    let (mut found, mut gauge) = (BTreeMap::new(), "");
    for line in text.lines() {
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            // An age grows with nothing else, and what the guest holds is of its last
            // heartbeat.
            let counts = kind.strip_suffix(" gauge");
            gauge = counts
                .filter(|name| !name.ends_with("_seconds") && !name.contains("_guest_"))
                .unwrap_or_default();
        } else if !gauge.is_empty() && line.starts_with(gauge) {
            let (name, value) = line.rsplit_once(' ').context("a metric")?;
            found.insert(name.to_owned(), value.parse().context(line.to_owned())?);
        }
    }
    for name in ["podhull_tasks", "podhull_transports_open"] {
        ensure!(found.contains_key(name), "no {name} among {found:?}");
    }
    Ok(found)
}
