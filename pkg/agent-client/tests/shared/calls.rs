// SPDX-License-Identifier: Apache-2.0
//! Calls to an agent that knows no method: its answers still show a living
//! channel.

use std::time::Duration;

use podhull_agent_client::{AgentChannel, AgentError, RpcKind};
use podhull_api::agent::PingRequest;
use podhull_types::Deadline;

pub(crate) async fn ping(channel: &AgentChannel, by: Deadline) -> Result<(), AgentError> {
    let ping = channel.call("Ping", by, async |mut client| {
        client.ping(PingRequest::default()).await
    });
    ping.await.map(drop)
}

pub(crate) fn is_answer(result: &Result<(), AgentError>) -> bool {
    matches!(
        result,
        Err(AgentError::Rpc {
            kind: RpcKind::Unimplemented,
            ..
        })
    )
}

/// The channel's first call comes after `pause`, and one more; then it is closed.
pub(crate) async fn first_call_after(pause: Duration, channel: AgentChannel) {
    let soon = || Deadline::after(Duration::from_secs(20));
    tokio::time::sleep(pause).await;
    for _ in 0..2 {
        let answer = ping(&channel, soon()).await;
        assert!(is_answer(&answer), "{answer:?}");
    }
    let report = channel.close(soon()).await;
    assert!(report.is_clean(), "{report}");
}
