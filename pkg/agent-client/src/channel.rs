// SPDX-License-Identifier: Apache-2.0
//! gRPC over one transport.

use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use podhull_api::agent::agent_client::AgentClient;
use podhull_transport::{CloseReport, Holder, HolderKind, Outcome, VsockTransport};
use podhull_types::Deadline;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::error::AgentError;
use crate::executor::OwnExecutor;

/// Largest message the agent may send; its bytes are not to be trusted.
const MAX_MESSAGE: usize = 4 << 20;
/// What aborting gRPC's tasks may take of a close whose deadline has passed.
const ABORT_GRACE: Duration = Duration::from_millis(500);

/// The gRPC channel to an agent, and the transport under it.
///
/// Close it with [`close`](Self::close). Dropping it ends its tasks and drops
/// the transport, which is counted. Fields are dropped in closing order.
#[derive(Debug)]
pub struct AgentChannel {
    /// `None` once closing began.
    client: Mutex<Option<AgentClient<Channel>>>,
    executor: OwnExecutor,
    /// `None` once closed.
    transport: Option<VsockTransport>,
}

impl AgentChannel {
    /// Speaks gRPC over `transport`, whose handshake is over. The transport is
    /// closed if that fails.
    ///
    /// # Errors
    /// [`AgentError::Setup`] if HTTP/2 cannot be set up.
    pub async fn establish(transport: VsockTransport, by: Deadline) -> Result<Self, AgentError> {
        transport.rename_holder(Holder::new(HolderKind::Control, "agent channel"));
        let executor = OwnExecutor::default();
        match Self::connect(&transport, executor.clone()).await {
            Ok(client) => Ok(Self {
                client: Mutex::new(Some(client)),
                executor,
                transport: Some(transport),
            }),
            Err(error) => {
                executor.cancel();
                let report = transport.close(by).await;
                tracing::debug!(%report, "closed the transport of a failed channel");
                Err(error)
            }
        }
    }

    async fn connect(
        transport: &VsockTransport,
        executor: OwnExecutor,
    ) -> Result<AgentClient<Channel>, AgentError> {
        // tonic connects again when a connection is lost. There is only this
        // one: a second try means that the VM is gone.
        let once = Arc::new(Mutex::new(Some(TokioIo::new(transport.io()?))));
        let connector = tower::service_fn(move |_| {
            let io = once.lock().unwrap_or_else(PoisonError::into_inner).take();
            async move { io.ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "VM gone")) }
        });
        let channel = Endpoint::from_static("http://agent")
            .executor(executor)
            .connect_with_connector(connector)
            .await
            .map_err(AgentError::Setup)?;
        Ok(AgentClient::new(channel).max_decoding_message_size(MAX_MESSAGE))
    }

    /// A client for a call that lasts, as an event stream does. It fails once
    /// the channel closes.
    ///
    /// # Errors
    /// [`AgentError::Closing`] once [`close`](Self::close) began.
    pub fn client(&self) -> Result<AgentClient<Channel>, AgentError> {
        let client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        client.clone().ok_or(AgentError::Closing)
    }

    /// Makes one call. `method` names it in errors.
    ///
    /// # Errors
    /// The agent's answer, [`AgentError::VmGone`], or [`AgentError::Deadline`].
    pub async fn call<T, F, Fut>(
        &self,
        method: &'static str,
        by: Deadline,
        call: F,
    ) -> Result<T, AgentError>
    where
        F: FnOnce(AgentClient<Channel>) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let client = self.client()?;
        by.run(call(client))
            .await
            .map_err(|_| AgentError::Deadline { method })?
            .map(Response::into_inner)
            .map_err(|status| AgentError::from_status(method, &status))
    }

    /// Refuses new calls from now on; those under way go on.
    pub fn refuse_calls(&self) {
        self.client
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    /// Shuts gRPC down, then closes the transport: also if the first fails or
    /// passes its deadline.
    pub async fn close(mut self, by: Deadline) -> CloseReport {
        self.refuse_calls();
        let outcome = match by.run(self.executor.joined()).await {
            Ok(()) => Outcome::Clean,
            Err(_) => Outcome::Forced("calls were still under way".into()),
        };
        self.executor.cancel();
        // Aborted tasks end at once; only then is the descriptor free.
        let last = Deadline::after(ABORT_GRACE).max(by);
        let joined = last.run(self.executor.joined()).await;
        let outcome = match joined {
            Ok(()) => outcome,
            Err(_) => Outcome::Failed("gRPC's tasks do not end".into()),
        };
        let mut report = CloseReport::of("grpc", outcome);
        if let Some(transport) = self.transport.take() {
            report.extend(transport.close(last).await);
        }
        report
    }
}

impl Drop for AgentChannel {
    fn drop(&mut self) {
        self.executor.cancel();
    }
}
