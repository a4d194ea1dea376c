// SPDX-License-Identifier: Apache-2.0
//! What a running sandbox listens to: the agent's events, its heartbeat, and
//! the death of its VM.

mod events;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use podhull_agent_client::Client;
use podhull_api::agent;
use podhull_types::{Deadline, ExitStatus};
use podhull_vmm::Vm;
use tokio::time::Instant;

use crate::sandbox::Sandbox;
use crate::spec::SandboxEvent;

/// Starts the watchers. They hold the sandbox weakly, so that it can be dropped.
pub(crate) async fn start(sandbox: &Arc<Sandbox>) {
    if let Some(vm) = vm_of(sandbox).await {
        spawn(sandbox, watch_vm(Arc::downgrade(sandbox), vm));
    }
    // The last event that was handled: the agent keeps those after it.
    let seen = Arc::new(AtomicU64::new(0));
    spawn(
        sandbox,
        events::watch(Arc::downgrade(sandbox), Arc::clone(&seen)),
    );
    spawn(sandbox, watch_heartbeat(Arc::downgrade(sandbox), seen));
}

/// The VM, unless the sandbox is being stopped.
async fn vm_of(sandbox: &Sandbox) -> Option<Arc<dyn Vm>> {
    let parts = sandbox.parts.lock().await;
    parts.as_ref().and_then(|parts| parts.vm.clone())
}

fn spawn(sandbox: &Sandbox, watcher: impl Future<Output = ()> + Send + 'static) {
    let stop = sandbox.stop_watching.clone();
    sandbox.tasks.spawn(async move {
        // `None`: the sandbox is being stopped.
        let _ = stop.run_until_cancelled(watcher).await;
    });
}

async fn watch_vm(sandbox: Weak<Sandbox>, vm: Arc<dyn Vm>) {
    let mut died = vm.died();
    let reason = match died.wait_for(Option::is_some).await.as_deref() {
        Ok(Some(death)) => death.to_string(),
        _ => "its supervisor ended".to_owned(),
    };
    if let Some(sandbox) = sandbox.upgrade() {
        declare_dead(&sandbox, reason);
    }
}

/// The VM is gone: tells everybody who waits, then releases everything.
fn declare_dead(sandbox: &Arc<Sandbox>, reason: String) {
    if pass_verdict(sandbox, &reason) {
        bury(sandbox, reason);
    }
}

/// Calls that are under way fail with `reason` from now on. False if the sandbox
/// was dead already.
fn pass_verdict(sandbox: &Sandbox, reason: &str) -> bool {
    let first = sandbox.death.set(reason.to_owned()).is_ok();
    if first {
        tracing::error!(sandbox = %sandbox.spec.id, %reason, "the VM ended by itself");
        sandbox.cut_calls.cancel();
    }
    first
}

/// The end of a sandbox whose VM ended.
fn bury(sandbox: &Arc<Sandbox>, reason: String) {
    sandbox
        .runtime
        .metrics
        .vm_exits
        .with_label_values(&["died"])
        .inc();
    for process in sandbox.all_processes() {
        process.exited(ExitStatus::vm_gone());
    }
    sandbox.events.send(SandboxEvent::Died { reason });
    sandbox.stop_in_background();
}

async fn watch_heartbeat(sandbox: Weak<Sandbox>, seen: Arc<AtomicU64>) {
    let (interval, dead_after) = match sandbox.upgrade() {
        Some(sandbox) => {
            let config = &sandbox.runtime.config;
            let seconds = Duration::from_secs;
            (
                seconds(config.heartbeat_seconds),
                seconds(config.dead_after_seconds),
            )
        }
        None => return,
    };
    let mut ticks = tokio::time::interval(interval);
    let mut answered = Instant::now();
    loop {
        ticks.tick().await;
        let Some(sandbox) = sandbox.upgrade() else {
            return;
        };
        let by = Deadline::after(interval);
        let acknowledged_sequence = seen.load(Ordering::Acquire);
        let ping = async |mut client: Client| {
            client
                .ping(agent::PingRequest {
                    acknowledged_sequence,
                })
                .await
        };
        let pong = sandbox.ask("Ping", by, ping).await;
        let alive = pong.is_ok();
        if let Ok(pong) = pong {
            answered = Instant::now();
            sandbox.note_counts(pong.counts);
            sandbox.note_held(pong.held);
        }
        let suspect = !alive;
        let changed = sandbox
            .suspect
            .send_if_modified(|was| std::mem::replace(was, suspect) != suspect);
        if changed {
            tracing::warn!(sandbox = %sandbox.spec.id, suspect, "heartbeat");
        }
        if answered.elapsed() >= dead_after {
            let reason = format!(
                "the guest was silent for {} s",
                answered.elapsed().as_secs()
            );
            // First: ending the VM takes time, and what it ends with is no reason.
            if !pass_verdict(&sandbox, &reason) {
                return;
            }
            // Whoever waits for the guest's bytes sees their end only once it has ended.
            if let Some(vm) = vm_of(&sandbox).await {
                let report = vm.stop(Deadline::after(Duration::ZERO)).await;
                tracing::debug!(?report, "ended the silent VM");
            }
            bury(&sandbox, reason);
            return;
        }
    }
}

#[cfg(test)]
mod tests;
