// SPDX-License-Identifier: Apache-2.0
//! Waiting for the guest to come up.

use std::time::Duration;

use podhull_transport::{GuestTimes, TransportError, VsockListener, metrics, welcome};
use podhull_types::{Deadline, Token};

use crate::channel::AgentChannel;
use crate::error::AgentError;

/// How long a connection may take to say READY: an agent says it at once, and
/// one that says nothing must not use up the whole deadline.
const GREETING: Duration = Duration::from_secs(3);

/// An agent that reported ready.
#[derive(Debug)]
pub struct Connected {
    /// The channel to it, with its transport.
    pub channel: AgentChannel,
    /// How long the guest's part of the boot took.
    pub times: GuestTimes,
}

/// Waits until the guest's agent dials `listener`, hands it `token` and sets up
/// the channel on that connection. A connection that is not an agent's is
/// closed, and the next one awaited. `gone` resolves when nobody can come any
/// more, as at the VM's end: what was accepted by then is closed first, which a
/// caller who drops the wait leaves to the transport's own drop.
///
/// # Errors
/// [`AgentError::NotReady`] when the deadline passes or the listener ends,
/// [`AgentError::VmGone`] after `gone`.
pub async fn wait_for_agent(
    listener: &VsockListener,
    token: &Token,
    by: Deadline,
    gone: impl Future<Output = ()>,
) -> Result<Connected, AgentError> {
    tokio::pin!(gone);
    loop {
        let accepted = tokio::select! {
            biased;
            accepted = by.run(listener.accept()) => accepted,
            () = &mut gone => return Err(AgentError::VmGone { method: "READY" }),
        };
        let transport = accepted
            .map_err(|source| TransportError::Deadline {
                what: "wait for READY",
                source,
            })
            .and_then(|accepted| accepted)
            .map_err(AgentError::NotReady)?;
        match welcome(&transport, token, by.at_most(GREETING)).await {
            Ok(times) => {
                let channel = AgentChannel::establish(transport, by).await?;
                return Ok(Connected { channel, times });
            }
            Err(error) => {
                metrics::FOREIGN_READY.inc();
                let report = transport.close(by).await;
                tracing::warn!(%error, %report, "not the agent");
                if by.passed() {
                    return Err(AgentError::NotReady(error));
                }
            }
        }
    }
}
