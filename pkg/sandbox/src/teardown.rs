// SPDX-License-Identifier: Apache-2.0
//! The end of a sandbox.
//!
//! One order, always: processes and their output, the agent's shutdown, gRPC,
//! every transport, the VM, its helpers, network, shared tree, folder. Every
//! step runs whatever the earlier ones returned, has a share of the deadline,
//! and lands in the report.

use std::sync::Arc;
use std::time::Duration;

use podhull_agent_client::{AgentChannel, words};
use podhull_api::agent;
use podhull_network::PodNetwork;
use podhull_storage::SharedTree;
use podhull_telemetry::Metrics;
use podhull_transport::{CloseReport, Outcome, VsockListener};
use podhull_types::{Deadline, ExitStatus, chain};
use podhull_vmm::Vm;
use tokio::task::JoinSet;

use crate::blocking::blocking;
use crate::rundir::RunDir;
use crate::sandbox::{Phase, Sandbox};
use crate::spec::Status;
use crate::stdio::Cut;

/// Most time for killing what runs and delivering its output.
const DRAIN: Duration = Duration::from_secs(8);
/// Time for what was cut to close its connection.
const CUT: Duration = Duration::from_secs(5);
/// Most time for the agent's own shutdown: it syncs and unmounts.
const SHUTDOWN: Duration = Duration::from_secs(5);
/// Most time for gRPC's end.
const CHANNEL: Duration = Duration::from_secs(2);
/// Least time for what must run even if the deadline has passed: stopping the
/// VM and releasing what the host holds.
const RELEASE: Duration = Duration::from_secs(5);

/// Time for unmounting what nobody uses.
const UNMOUNT: Duration = Duration::from_secs(2);

/// What a sandbox owns on the host, in the order in which it is released.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) ready: Option<VsockListener>,
    pub(crate) vm: Option<Arc<dyn Vm>>,
    pub(crate) network: Option<PodNetwork>,
    pub(crate) tree: Option<Arc<SharedTree>>,
    pub(crate) run_dir: RunDir,
    pub(crate) metrics: Metrics,
}

impl Parts {
    pub(crate) fn new(run_dir: RunDir, metrics: Metrics) -> Self {
        Self {
            ready: None,
            vm: None,
            network: None,
            tree: None,
            run_dir,
            metrics,
        }
    }
}

/// Ends `sandbox`; later callers wait for the first one.
pub(crate) async fn stop(sandbox: &Arc<Sandbox>, by: Deadline) -> CloseReport {
    sandbox.phase.send_if_modified(|phase| {
        let running = matches!(phase, Phase::Running);
        if running {
            *phase = Phase::Stopping;
        }
        running
    });
    let Some(parts) = sandbox.parts.lock().await.take() else {
        // Somebody else is at it, or was.
        let outcome = match by.run(sandbox.stopped()).await {
            Ok(_) if matches!(*sandbox.phase.borrow(), Phase::Broken) => {
                Outcome::Failed("it was cut short, and something may be left".into())
            }
            Ok(_) => return CloseReport::default(),
            Err(_) => Outcome::Forced("still under way elsewhere".into()),
        };
        return CloseReport::of("stop", outcome);
    };
    // Whoever passed the check before the phase changed gets no connection now.
    sandbox.leases.close();
    let mut ending = Ending {
        sandbox,
        phase: Phase::Broken,
    };
    let alive = sandbox.death.get().is_none();
    let mut report = CloseReport::default();
    if alive {
        report.push("processes", end_processes(sandbox, by.at_most(DRAIN)).await);
    }
    report.push("sessions", end_sessions(sandbox, by.at_most(DRAIN)).await);
    if alive {
        report.push(
            "agent",
            shut_agent_down(sandbox, by.at_most(SHUTDOWN)).await,
        );
    }
    sandbox.stop_watching.cancel();
    sandbox.cut_calls.cancel();
    let channel = sandbox.channel.write().await.take();
    count_failures(&report, &sandbox.runtime.metrics);
    report.extend(tear_down(parts, channel, by).await);
    ending.phase = Phase::Stopped(ExitStatus::vm_gone());
    report
}

/// Answers whoever waits for the end of a sandbox, also if a step on the way
/// panics.
struct Ending<'a> {
    sandbox: &'a Sandbox,
    phase: Phase,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let sandbox = self.sandbox;
        sandbox.stop_watching.cancel();
        sandbox.cut_calls.cancel();
        for process in sandbox.all_processes() {
            process.exited(ExitStatus::vm_gone());
        }
        if matches!(self.phase, Phase::Broken) {
            tracing::error!(sandbox = %sandbox.spec.id, "the teardown was cut short");
        }
        sandbox.phase.send_replace(self.phase.clone());
        sandbox.tasks.close();
    }
}

/// Kills what still runs, and waits for its end.
async fn end_processes(sandbox: &Arc<Sandbox>, by: Deadline) -> Outcome {
    let processes: Vec<_> = sandbox
        .all_processes()
        .into_iter()
        .filter(|process| !process.pause && process.state().status != Status::Stopped)
        .collect();
    let mut problem = None;
    for process in processes.iter().filter(|process| process.id.exec.is_none()) {
        let request = agent::SignalRequest {
            container_id: process.id.container.to_string(),
            exec_id: String::new(),
            signal: 9,
            all: true,
        };
        let killed = sandbox
            .ask("Signal", by, async |mut client| {
                client.signal(request).await
            })
            .await;
        if let Err(error) = killed {
            problem.get_or_insert(format!("kill {}: {}", process.id, chain(&error)));
        }
    }
    let ended = async {
        for process in &processes {
            if process.state().status != Status::Created || process.id.exec.is_none() {
                process.wait().await;
            }
        }
    };
    match (by.run(ended).await, problem) {
        (Ok(()), None) => Outcome::Clean,
        (Ok(()), Some(problem)) => Outcome::Failed(problem),
        (Err(_), problem) => Outcome::Forced(problem.unwrap_or("processes still run".into())),
    }
}

/// Delivers what the processes wrote, then ends their sessions: also those whose
/// end somebody else waits for, as a delete does.
async fn end_sessions(sandbox: &Sandbox, by: Deadline) -> Outcome {
    let mut finishing = JoinSet::new();
    for io in sandbox
        .all_processes()
        .iter()
        .filter_map(|process| process.take_io())
    {
        finishing.spawn(io.finish(by));
    }
    let (reports, streams, forwards) = tokio::join!(
        finishing.join_all(),
        sandbox.relays.end(by),
        end_forwards(sandbox, by)
    );
    let incomplete = reports.iter().filter(|report| !report.complete).count();
    let processes = incomplete.max(streams.cut);
    let said = format!(
        "cut: the output of {processes} processes, {} forwarded connections",
        forwards.cut
    );
    match (processes + forwards.cut, streams.left + forwards.left) {
        (0, 0) => Outcome::Clean,
        (_, 0) => Outcome::Forced(said),
        (_, left) => Outcome::Failed(format!("{said}; still open: {left}")),
    }
}

/// Delivers what the servers sent, and ends their connections.
async fn end_forwards(sandbox: &Sandbox, by: Deadline) -> Cut {
    sandbox.forwards.close();
    sandbox.drain_forwards.cancel();
    if by.run(sandbox.forwards.wait()).await.is_ok() {
        return Cut::default();
    }
    let cut = sandbox.forwards.len();
    sandbox.cut_forwards.cancel();
    let ended = Deadline::after(CUT).run(sandbox.forwards.wait()).await;
    let left = ended.map_or_else(|_| sandbox.forwards.len(), |()| 0);
    Cut { cut, left }
}

async fn shut_agent_down(sandbox: &Sandbox, by: Deadline) -> Outcome {
    let deadline_ms = u32::try_from(by.remaining().as_millis()).unwrap_or(u32::MAX);
    let request = agent::ShutdownRequest { deadline_ms };
    let answer = sandbox
        .ask("Shutdown", by, async |mut client| {
            client.shutdown(request).await
        })
        .await;
    if let Ok(answer) = &answer {
        sandbox.note_counts(answer.counts);
    }
    match answer {
        Ok(answer) if answer.problems.is_empty() => Outcome::Clean,
        Ok(answer) => Outcome::Failed(words(&answer.problems.join("; "))),
        Err(error) => failed(error),
    }
}

/// Releases everything that `parts` and `channel` hold: the second half of a
/// stop, and the whole of a failed boot's.
pub(crate) async fn tear_down(
    parts: Parts,
    channel: Option<AgentChannel>,
    by: Deadline,
) -> CloseReport {
    let by = by.max(Deadline::after(RELEASE));
    let mut report = CloseReport::default();
    if let Some(channel) = channel {
        report.extend(channel.close(by.at_most(CHANNEL)).await);
    }
    if let Some(ready) = parts.ready {
        report.extend(ready.close());
    }
    if let Some(vm) = parts.vm {
        let stopped = vm.stop(by).await;
        report.push("vm", outcome(stopped.is_clean(), &stopped));
    }
    if let Some(network) = parts.network {
        let detached = network.detach(by).await;
        report.push("network", detached.map_or_else(failed, |()| Outcome::Clean));
    }
    if let Some(tree) = parts.tree {
        // What is in use is waited for until then; the rest comes on top.
        let ends = Deadline::after(by.remaining() + UNMOUNT);
        let removed = blocking(ends, move || tree.teardown(by)).await;
        report.push(
            "tree",
            match removed {
                Ok(Ok(removed)) => outcome(removed.is_clean(), &removed),
                Ok(Err(error)) => failed(error),
                Err(error) => failed(error),
            },
        );
    }
    report.push(
        "folder",
        parts
            .run_dir
            .release()
            .map_or_else(failed, |()| Outcome::Clean),
    );
    count_failures(&report, &parts.metrics);
    report
}

fn count_failures(report: &CloseReport, metrics: &Metrics) {
    for (step, outcome) in report.steps() {
        if *outcome != Outcome::Clean {
            metrics.teardown_failures.with_label_values(&[step]).inc();
        }
    }
}

fn failed(error: impl std::error::Error) -> Outcome {
    Outcome::Failed(chain(&error))
}

fn outcome(clean: bool, report: &impl std::fmt::Debug) -> Outcome {
    if clean {
        Outcome::Clean
    } else {
        Outcome::Forced(format!("{report:?}"))
    }
}

#[cfg(test)]
mod order_tests;
#[cfg(test)]
mod tests;
