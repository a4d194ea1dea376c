// SPDX-License-Identifier: Apache-2.0
//! Runs cases one after the other, each between two looks at the node.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use podhull_testkit::containerd::{Cni, podhull_config};
use podhull_testkit::cri::api::{PortMapping, RemovePodSandboxRequest, StopPodSandboxRequest};
use podhull_testkit::oracle::{Snapshot, assert_clean, settled};
use podhull_testkit::{Node, Release, evidence, node};

use crate::case::{Case, Setup, Skip};
use crate::cases;
use crate::compare::{self, Records, Seen, Verdict};
use crate::context::{Context, heavy};
use crate::options::Options;
use crate::tally::{Figures, Tally};
use crate::unclosed::{self, Searched};

/// No case takes longer.
const CASE_WITHIN: Duration = Duration::from_secs(120);
/// No case of a heavy run does.
const HEAVY_WITHIN: Duration = Duration::from_secs(1800);
/// After it, everything it made is gone within this.
const CLEAN_WITHIN: Duration = Duration::from_secs(10);
/// For removing one pod that a case left.
const REMOVE_WITHIN: Duration = Duration::from_secs(45);
/// How much of each log is quoted with a failure, and of each of its lines.
const LOG_LINES: usize = 20;
const LINE: usize = 2000;

/// Runs what `options` asks for on a fresh node with `release`.
pub(crate) async fn run(options: &Options, release: Release) -> Result<Tally> {
    let node = Node::here()?;
    let setups = options.setups_of(release);
    if setups.iter().any(|setup| setup.is_podhull()) {
        node.programs().check()?;
    }
    release.check(node.programs())?;
    let containerd = node.start_containerd(release).await?;
    let mut context = Context::new(node, containerd);
    let records = if options.alone {
        None
    } else {
        Some(Records::of(release)?)
    };
    let mut tally = Tally::default();
    for setup in setups {
        let cases: Vec<_> = cases::all()
            .into_iter()
            .filter(|case| case.on.has(setup) && options.wants(setup, case))
            .collect();
        // What runc gives is found out first.
        let runc = setup.with_runc();
        let unknown: Vec<_> = match &records {
            Some(records) if setup.is_podhull() => cases
                .iter()
                .filter(|case| case.on.has(runc) && records.get(case.name).is_none())
                .copied()
                .collect(),
            _ => Vec::new(),
        };
        for (setup, cases) in [(runc, unknown), (setup, cases)] {
            if !cases.is_empty() {
                tally.push(run_setup(&mut context, setup, &cases, records.as_ref()).await?);
            }
        }
    }
    Ok(tally)
}

async fn run_setup(
    context: &mut Context,
    setup: Setup,
    cases: &[Case],
    records: Option<&Records>,
) -> Result<Figures> {
    let begin = Instant::now();
    context.begin(setup);
    let mut searched = Searched::all(&*context.containerd().await)?;
    if let Err(error) = warm_up(context).await {
        eprintln!("{}", evidence::logs(context.node().folder(), LOG_LINES));
        return Err(error.context(format!("the first pod on {setup}")));
    }
    let mut before = settled(&*context.containerd().await, CLEAN_WITHIN).await?;
    searched
        .on(&*context.containerd().await)
        .with_context(|| format!("the first pod on {setup}"))?;
    let mut figures = Figures::of(&setup.to_string());
    for case in cases {
        let started = Instant::now();
        let (result, clean, seen) = one(context, case, &before, &mut searched).await;
        let is_clean = clean.is_ok();
        let took = started.elapsed().as_secs_f64();
        let result = match (result, clean) {
            (Err(error), Err(leak)) => Err(anyhow!("{error:#}\nand then: {leak:#}")),
            (result, clean) => result.and(clean),
        };
        let result = match (result, records) {
            (Ok(()), Some(records)) => beside_runc(case, setup, &seen, records),
            (result, _) => result.map(|()| None),
        };
        report(case, setup, took, result, &mut figures)?;
        if !is_clean {
            // What this one left must not fail the next ones.
            let containerd = context.containerd().await;
            before = match settled(&containerd, CLEAN_WITHIN).await {
                Ok(now) => now,
                Err(_) => Snapshot::take(&containerd).await?,
            };
        }
    }
    figures.took(begin.elapsed());
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{setup}: {figures} in {:.0} s",
        begin.elapsed().as_secs_f64()
    )?;
    Ok(figures)
}

/// How what a passed case saw compares with what it saw with runc, if it runs with
/// both; what it saw with runc is kept.
fn beside_runc(
    case: &Case,
    setup: Setup,
    seen: &Seen,
    records: &Records,
) -> Result<Option<Verdict>> {
    if !setup.is_podhull() {
        return records.put(case.name, seen).map(|()| None);
    }
    match records.get(case.name) {
        Some(runc) if case.on.has(setup.with_runc()) => {
            compare::compare(case.name, &runc, seen).map(Some)
        }
        _ => Ok(None),
    }
}

fn report(
    case: &Case,
    setup: Setup,
    took: f64,
    result: Result<Option<Verdict>>,
    figures: &mut Figures,
) -> Result<()> {
    let mut out = io::stdout().lock();
    match result {
        Ok(verdict) => {
            figures.pass(verdict);
            writeln!(out, "test {} {setup} ... ok ({took:.2}s)", case.name)?;
        }
        Err(error) if error.is::<Skip>() => {
            figures.skip();
            writeln!(out, "SKIP {} {setup}: {error}", case.name)?;
        }
        Err(error) => {
            let text = format!("{error:#}");
            figures.fail(&format!("{} {setup}", case.name), &text);
            writeln!(
                out,
                "test {} {setup} ... FAILED ({took:.2}s)\n{}",
                case.name,
                indent(&text)
            )?;
        }
    }
    Ok(())
}

/// A pod's life, so that containerd and CNI have made what stays: the bridge,
/// their folders, their chains.
async fn warm_up(context: &Context) -> Result<()> {
    let mapping = PortMapping {
        container_port: 80,
        host_port: 18080,
        ..PortMapping::default()
    };
    let pod = context
        .pod("warm-up")
        .edit(|config| config.port_mappings = vec![mapping])
        .run()
        .await?;
    context.container(&pod, "main").idle().start().await?;
    remove_everything(context).await
}

/// The case's result, whether the node is as it was at `before` and nothing was
/// dropped unclosed, and what the case saw.
async fn one(
    context: &mut Context,
    case: &Case,
    before: &Snapshot,
    searched: &mut Searched,
) -> (Result<()>, Result<()>, Seen) {
    if let Err(error) = context.begin_case(case.name, before.clone()) {
        return (Err(error), Ok(()), Seen::new());
    }
    let within = if heavy() { HEAVY_WITHIN } else { CASE_WITHIN };
    let run = compare::watch(tokio::time::timeout(within, (case.run)(context)));
    let (result, seen) = run.await;
    let result = result.unwrap_or_else(|_| Err(anyhow!("still runs after {within:?}")));
    // While its pods are still there.
    let result = result.and(unclosed::counted().await);
    let result = result.map_err(|error| {
        if error.is::<Skip>() {
            error
        } else {
            quoting_logs(context, &error)
        }
    });
    let clean = match restore(context).await {
        Ok(()) => assert_clean(&*context.containerd().await, before, CLEAN_WITHIN).await,
        Err(error) => Err(error.context("afterwards")),
    };
    // The shims have ended, and what they said is written.
    let clean = clean.and(searched.on(&*context.containerd().await));
    let clean = clean.map_err(|error| quoting_logs(context, &error));
    (result, clean, seen)
}

/// The error, and what the programs under test wrote last.
fn quoting_logs(context: &Context, error: &anyhow::Error) -> anyhow::Error {
    let logs = evidence::logs(context.node().folder(), LOG_LINES);
    anyhow!("{error:#}\n{logs}")
}

/// Makes good what a case did to the node, and removes its pods and files.
async fn restore(context: &Context) -> Result<()> {
    let config = podhull_config(context.node().programs());
    fs::write("/etc/podhull/config.toml", config).context("restore podhull's configuration")?;
    {
        let mut containerd = context.containerd_mut().await;
        if containerd.pid().is_none() {
            containerd.start_again().await?;
        }
    }
    let removed = remove_everything(context).await;
    let cni = context.containerd().await.use_cni(Cni::default()).await;
    removed.and(cni).and(node::empty(context.folder()))
}

/// Removes every pod. What fails at first is tried once more, so that the next
/// case does not find it, and is an error all the same.
pub(crate) async fn remove_everything(context: &Context) -> Result<()> {
    let mut first = Ok(());
    for _ in 0..2 {
        for id in context.client().pod_ids(None).await? {
            let removed = tokio::time::timeout(REMOVE_WITHIN, remove(context, &id)).await;
            let removed =
                removed.unwrap_or_else(|_| Err(anyhow!("not removed within {REMOVE_WITHIN:?}")));
            first = first.and(removed.with_context(|| format!("remove pod {id}")));
        }
    }
    node::empty(Path::new("/var/log/pods"))?;
    first
}

/// Stops and removes a pod of which only the id is known.
pub(crate) async fn remove(context: &Context, id: &str) -> Result<()> {
    let mut runtime = context.client().runtime();
    let request = StopPodSandboxRequest {
        pod_sandbox_id: id.into(),
    };
    runtime
        .stop_pod_sandbox(request)
        .await
        .context("StopPodSandbox")?;
    let request = RemovePodSandboxRequest {
        pod_sandbox_id: id.into(),
    };
    runtime
        .remove_pod_sandbox(request)
        .await
        .context("RemovePodSandbox")?;
    let left = context.client().pod_ids(None).await?;
    ensure!(
        !left.iter().any(|other| other == id),
        "the removed pod is still listed"
    );
    Ok(())
}

fn indent(text: &str) -> String {
    let lines = text
        .lines()
        .map(|line| line.chars().take(LINE).collect::<String>());
    let lines: Vec<_> = lines.map(|line| format!("    {line}")).collect();
    lines.join("\n")
}
