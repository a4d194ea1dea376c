// SPDX-License-Identifier: Apache-2.0
//! Asking the agent, and what a guest that is no more answers.

use std::time::{Duration, Instant};

use podhull_agent_client::{AgentError, Client};
use podhull_types::Deadline;

use crate::error::SandboxError;
use crate::sandbox::Sandbox;

/// How long after the connection's end the VM's may be noticed, and explained.
pub(crate) const VM_ENDS: Duration = Duration::from_secs(1);

impl Sandbox {
    /// Deadline of one call to the agent.
    pub(crate) fn call_deadline(&self) -> Deadline {
        Deadline::after(self.runtime.config.call_timeout(self.emulated))
    }

    /// Makes one call to the agent.
    pub(crate) async fn ask<T, F, Fut>(
        &self,
        method: &'static str,
        by: Deadline,
        call: F,
    ) -> Result<T, SandboxError>
    where
        F: FnOnce(Client) -> Fut,
        Fut: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let began = Instant::now();
        let asked = async {
            let channel = self.channel.read().await;
            let Some(channel) = channel.as_ref() else {
                return Err(self.stopping());
            };
            Ok(channel.call(method, by, call).await?)
        };
        let result = self.unless_cut(by, asked).await;
        let label = if result.is_ok() { "ok" } else { "error" };
        self.runtime
            .metrics
            .agent_calls
            .with_label_values(&[method, label])
            .observe(began.elapsed().as_secs_f64());
        result
    }

    /// What the guest answers. Neither a teardown nor the verdict that it is dead
    /// waits for what is under way; what fails because the VM ended says why the
    /// VM ended, if that is known by the deadline.
    pub(crate) async fn unless_cut<T>(
        &self,
        by: Deadline,
        answer: impl Future<Output = Result<T, SandboxError>>,
    ) -> Result<T, SandboxError> {
        let answer = self.cut_calls.run_until_cancelled(answer).await;
        let answer = answer.unwrap_or_else(|| Err(self.stopping()));
        let gone = matches!(answer, Err(SandboxError::Agent(AgentError::VmGone { .. })));
        // A teardown asks without need to know.
        if gone && !self.is_gone() {
            let verdict = by.at_most(VM_ENDS).run(self.cut_calls.cancelled()).await;
            tracing::debug!(?verdict, "the connection to the guest ended");
        }
        answer.map_err(|error| match self.death.get() {
            Some(reason) => SandboxError::VmDied {
                id: self.spec.id.clone(),
                reason: reason.clone(),
            },
            None => error,
        })
    }
}
