// SPDX-License-Identifier: Apache-2.0
//! What the agent tells: the ends of processes, and kills for want of memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use podhull_agent_client::AgentError;
use podhull_api::agent::{self, event};
use podhull_types::{ContainerId, Deadline, ExecId, ExitStatus, ProcessRef};
use tonic::Streaming;

use super::declare_dead;
use crate::error::SandboxError;
use crate::process::Process;
use crate::sandbox::Sandbox;
use crate::spec::SandboxEvent;

/// How long after the connection's end the VM's own end may be noticed.
const DEATH_FOLLOWS: Duration = Duration::from_secs(5);
/// Most time by which a process's output holds up the word of its end: it may
/// be a child that writes, and goes on.
const LAST_WORDS: Duration = Duration::from_millis(1500);
/// How often in a row a stream may end without having told anything new.
const IN_VAIN: u32 = 3;

/// Follows the agent's events for as long as it answers. A stream that ends, or
/// leaves an event out, is followed by another one: the agent keeps what was not
/// seen. `seen` is the last event that was handled.
pub(super) async fn watch(sandbox: Weak<Sandbox>, seen: Arc<AtomicU64>) {
    let mut in_vain = 0;
    let reason = loop {
        let before = seen.load(Ordering::Acquire);
        let end = match subscribe(&sandbox, before).await {
            Some(Ok(stream)) => follow(&sandbox, stream, &seen).await,
            Some(Err(error)) => Some(error.to_string()),
            None => None,
        };
        // `None`: there is nobody to be told any more.
        let Some(end) = end else { return };
        in_vain = match seen.load(Ordering::Acquire) {
            now if now == before => in_vain + 1,
            _ => 0,
        };
        if in_vain == IN_VAIN || !answers(&sandbox).await {
            break end;
        }
        tracing::warn!(reason = end, "the agent's events are asked for again");
    };
    // The VM's end says more if it comes now.
    tokio::time::sleep(DEATH_FOLLOWS).await;
    if let Some(sandbox) = sandbox.upgrade() {
        declare_dead(&sandbox, format!("the agent's events were lost: {reason}"));
    }
}

async fn answers(sandbox: &Weak<Sandbox>) -> bool {
    let Some(sandbox) = sandbox.upgrade() else {
        return false;
    };
    let request = agent::PingRequest::default();
    let ping = sandbox.ask("Ping", sandbox.call_deadline(), async |mut client| {
        client.ping(request).await
    });
    ping.await.is_ok()
}

async fn subscribe(
    sandbox: &Weak<Sandbox>,
    after_sequence: u64,
) -> Option<Result<Streaming<agent::Event>, SandboxError>> {
    let sandbox = sandbox.upgrade()?;
    let request = agent::EventsRequest { after_sequence };
    let asked = sandbox.ask("Events", sandbox.call_deadline(), async |mut client| {
        client.events(request).await
    });
    Some(asked.await)
}

/// Handles events until the stream ends, and says how; `None` if the sandbox
/// did.
async fn follow(
    sandbox: &Weak<Sandbox>,
    mut stream: Streaming<agent::Event>,
    seen: &AtomicU64,
) -> Option<String> {
    loop {
        let event = match stream.message().await {
            Ok(Some(event)) => event,
            Ok(None) => return Some("the stream ended".into()),
            Err(status) => return Some(AgentError::from_status("Events", &status).to_string()),
        };
        let sandbox = sandbox.upgrade()?;
        let (before, now) = (seen.load(Ordering::Acquire), event.sequence);
        if now <= before {
            continue;
        }
        if now - before != 1 {
            return Some(format!("event {now} came after {before}"));
        }
        if let Some(kind) = event.kind {
            handle(&sandbox, kind);
        }
        seen.store(now, Ordering::Release);
    }
}

fn handle(sandbox: &Arc<Sandbox>, kind: event::Kind) {
    match kind {
        event::Kind::Exited(exited) => {
            let Some(process) = process_of(&exited.container_id, &exited.exec_id) else {
                tracing::warn!(container = %exited.container_id, "exit of a malformed id");
                return;
            };
            let exit = exited.exit.unwrap_or_default();
            match sandbox.process(&process) {
                Ok(process) => end(sandbox, process, status(&exit)),
                // Deleted before it was told.
                Err(error) => tracing::debug!(%error, "exit of a process that is forgotten"),
            }
        }
        event::Kind::Oom(oom) => match ContainerId::new(oom.container_id) {
            Ok(container) => {
                // Only of this pod, and only as often as somebody can read it: the
                // guest is not to be trusted.
                let process = sandbox.process(&ProcessRef::init(container.clone()));
                if process.is_ok_and(|process| process.may_tell_oom()) {
                    sandbox.events.send(SandboxEvent::OutOfMemory { container });
                }
            }
            Err(error) => tracing::warn!(%error, "OOM of a malformed id"),
        },
    }
}

/// Tells a process's end once its output has been read, or has had its time:
/// whoever hears of an end may stop reading. A container's end comes behind
/// those of its added processes.
fn end(sandbox: &Arc<Sandbox>, process: Arc<Process>, exit: ExitStatus) {
    // The guest is not to be trusted to tell it once.
    if !process.set_ending(exit) {
        return;
    }
    let mut before = sandbox.all_processes();
    before.retain(|other| {
        let id = &other.id;
        let added = process.id.exec.is_none() && id.exec.is_some();
        added && id.container == process.id.container && other.is_ending()
    });
    sandbox.tasks.spawn(async move {
        let ready = async {
            process.delivered().await;
            for added in before {
                added.wait().await;
            }
        };
        if Deadline::after(LAST_WORDS).run(ready).await.is_err() {
            tracing::debug!(process = %process.id, "its end is told before its output");
        }
        process.exited(exit);
    });
}

fn process_of(container: &str, exec: &str) -> Option<ProcessRef> {
    let container = ContainerId::new(container).ok()?;
    let exec = if exec.is_empty() {
        None
    } else {
        Some(ExecId::new(exec).ok()?)
    };
    Some(ProcessRef { container, exec })
}

/// The guest's word on an exit. Its clock may be wrong, so the host's counts.
fn status(exit: &agent::Exit) -> ExitStatus {
    ExitStatus {
        code: u8::try_from(exit.code).unwrap_or(u8::MAX),
        at: SystemTime::now(),
    }
}

#[cfg(test)]
mod tests;
