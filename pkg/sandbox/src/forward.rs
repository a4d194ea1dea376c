// SPDX-License-Identifier: Apache-2.0
//! Forwarded ports: what the host connects to in the pod's loopback, carried to
//! the guest's.

use std::sync::Arc;

use podhull_network::LoopbackListener;
use podhull_transport::{SessionTarget, reset};
use tokio::net::TcpStream;

use crate::error::SandboxError;
use crate::gauges::OpenSession;
use crate::sandbox::{Phase, Sandbox};

const KIND: &str = "forward";

/// Accepts connections until the sandbox is being stopped. One that fails ends
/// only itself.
pub(crate) fn start(sandbox: &Arc<Sandbox>, listener: LoopbackListener) {
    let sandbox = Arc::clone(sandbox);
    sandbox.tasks.clone().spawn(async move {
        let mut phase = sandbox.phase.subscribe();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = phase.wait_for(|phase| !matches!(phase, Phase::Running)) => return,
            };
            match accepted {
                Ok((stream, port)) => {
                    let connection = forward(Arc::clone(&sandbox), stream, port);
                    sandbox.forwards.spawn(connection);
                }
                Err(error) => {
                    tracing::error!(sandbox = %sandbox.spec.id, %error, "no more ports are forwarded");
                    return;
                }
            }
        }
    });
}

/// One connection, from the accept to its end. Where the guest has no server,
/// or none is to be asked any more, the client sees a reset at once: the
/// redirect has accepted already.
async fn forward(sandbox: Arc<Sandbox>, stream: TcpStream, port: u16) {
    let target = SessionTarget::Forward { port };
    let dialled = match sandbox.check_usable() {
        Ok(()) => {
            let dial = sandbox.dial_session(&target);
            let dialled = sandbox.cut_forwards.run_until_cancelled(dial).await;
            dialled.unwrap_or_else(|| Err(SandboxError::Stopping(sandbox.spec.id.clone())))
        }
        Err(error) => Err(error),
    };
    let session = match dialled {
        Ok(session) => session,
        // Told where it was dialled.
        Err(SandboxError::Session(_)) => return reset(stream),
        Err(error) => {
            tracing::info!(sandbox = %sandbox.spec.id, port, %error, "port not forwarded");
            return reset(stream);
        }
    };
    let metrics = &sandbox.runtime.metrics;
    let open = OpenSession::count(metrics, KIND);
    let report = session
        .relay_until(
            stream,
            sandbox.drain_forwards.cancelled(),
            sandbox.cut_forwards.cancelled(),
        )
        .await;
    drop(open);
    for (direction, bytes) in [("input", report.sent), ("output", report.received)] {
        metrics
            .session_bytes
            .with_label_values(&[KIND, direction])
            .inc_by(bytes);
    }
    tracing::debug!(sandbox = %sandbox.spec.id, port, ?report, "forwarded connection ended");
}
