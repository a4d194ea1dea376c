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
use tonic::transport::Endpoint;
use tonic::{Response, Status};

use crate::error::AgentError;
use crate::executor::OwnExecutor;
use crate::line::Line;

/// Largest message the agent may send; its bytes are not to be trusted.
const MAX_MESSAGE: usize = 4 << 20;
/// What aborting gRPC's tasks may take of a close whose deadline has passed.
const ABORT_GRACE: Duration = Duration::from_millis(500);

/// A client of an [`AgentChannel`]; keeping one keeps nothing else.
pub type Client = AgentClient<Line>;

/// The gRPC channel to an agent, and the transport under it.
///
/// Close it with [`close`](Self::close). Dropping it ends its tasks and drops
/// the transport, which is counted. Fields are dropped in closing order.
///
/// Whoever has the channel has its transport, and cannot keep one of the two:
/// ```
/// # async fn f(connected: podhull_agent_client::Connected, by: podhull_types::Deadline) {
/// let channel = connected.channel;
/// assert!(channel.close(by).await.is_clean());
/// # }
/// ```
/// ```compile_fail,E0616
/// # async fn f(connected: podhull_agent_client::Connected, by: podhull_types::Deadline) {
/// let transport = connected.channel.transport;
/// # }
/// ```
/// ```compile_fail,E0382
/// # async fn f(connected: podhull_agent_client::Connected, by: podhull_types::Deadline) {
/// let channel = connected.channel;
/// assert!(channel.close(by).await.is_clean());
/// assert!(channel.client().is_ok());
/// # }
/// ```
#[derive(Debug)]
pub struct AgentChannel {
    /// Cut once closing began.
    line: Line,
    executor: OwnExecutor,
    /// `None` once closed.
    transport: Option<VsockTransport>,
}

impl AgentChannel {
    /// Speaks gRPC over `transport`, whose handshake is over. The transport is
    /// closed if that fails.
    ///
    /// # Errors
    /// [`AgentError::Setup`] if HTTP/2 cannot be set up, [`AgentError::Deadline`]
    /// if the peer takes nothing of it.
    pub async fn establish(transport: VsockTransport, by: Deadline) -> Result<Self, AgentError> {
        transport.rename_holder(Holder::new(HolderKind::Control, "agent channel"));
        let executor = OwnExecutor::default();
        let connecting = Self::connect(&transport, executor.clone());
        let connected = by.run(connecting).await;
        match connected.unwrap_or(Err(AgentError::Deadline { method: "HTTP/2" })) {
            Ok(line) => Ok(Self {
                line,
                executor,
                transport: Some(transport),
            }),
            Err(error) => {
                executor.cancel();
                let last = Deadline::after(ABORT_GRACE).max(by);
                let report = transport.close(last).await;
                tracing::debug!(%report, "closed the transport of a failed channel");
                Err(error)
            }
        }
    }

    async fn connect(
        transport: &VsockTransport,
        executor: OwnExecutor,
    ) -> Result<Line, AgentError> {
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
        Ok(Line::new(channel))
    }

    /// A client for a call that lasts, as an event stream does. It may be kept:
    /// its calls fail once the channel closes.
    ///
    /// # Errors
    /// [`AgentError::Closing`] once [`close`](Self::close) began.
    pub fn client(&self) -> Result<Client, AgentError> {
        if self.line.is_cut() {
            return Err(AgentError::Closing);
        }
        Ok(Client::new(self.line.clone()).max_decoding_message_size(MAX_MESSAGE))
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
        F: FnOnce(Client) -> Fut,
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
        self.line.cut();
    }

    /// Shuts gRPC down, then closes the transport: also if the first fails or
    /// passes its deadline.
    pub async fn close(mut self, by: Deadline) -> CloseReport {
        self.line.cut();
        let outcome = match by.run(self.executor.joined()).await {
            Ok(()) => Outcome::Clean,
            Err(_) => Outcome::Forced("calls were still under way".into()),
        };
        self.executor.cancel();
        // Aborted tasks end at once; only then is the descriptor free.
        let last = Deadline::after(ABORT_GRACE).max(by);
        let joined = last.run(self.executor.joined()).await;
        let outcome = match joined {
            Ok(()) if self.executor.has_panicked() => {
                Outcome::Failed("a task of gRPC panicked".into())
            }
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
        self.line.cut();
        self.executor.cancel();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net;
    use std::sync::mpsc;

    use hyper::rt::Executor;
    use podhull_api::agent::PingRequest;
    use podhull_transport::{LeaseSet, Peer};
    use podhull_types::VsockPort;
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixStream;

    use super::*;

    fn after(milliseconds: u64) -> Deadline {
        Deadline::after(Duration::from_millis(milliseconds))
    }

    /// A channel whose peer takes bytes and answers none.
    async fn channel(leases: &LeaseSet) -> (AgentChannel, UnixStream) {
        let (ours, theirs) = net::UnixStream::pair().unwrap();
        let holder = Holder::new(HolderKind::Control, "test");
        let lease = leases.issue(holder).unwrap();
        let transport =
            VsockTransport::adopt(ours.into(), Peer::Guest(VsockPort::READY), lease).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let channel = AgentChannel::establish(transport, after(5000)).await;
        (channel.unwrap(), UnixStream::from_std(theirs).unwrap())
    }

    fn outcomes(report: &CloseReport) -> Vec<(&'static str, &Outcome)> {
        report.steps().collect()
    }

    #[tokio::test]
    async fn l4_grpc_shutdown_panic_still_closes_transport() {
        let leases = LeaseSet::new("vm");
        let (channel, mut peer) = channel(&leases).await;
        channel
            .executor
            .execute(Box::pin(async { panic!("on purpose") }));
        let report = channel.close(after(5000)).await;
        let failed = Outcome::Failed("a task of gRPC panicked".into());
        assert_eq!(
            outcomes(&report),
            [("grpc", &failed), ("transport", &Outcome::Clean)]
        );
        assert!(leases.held().is_empty());
        peer.read_to_end(&mut Vec::new()).await.unwrap();
    }

    /// A task that no abort can end: it never comes to an await.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn l4_grpc_shutdown_that_cannot_be_ended_still_closes_transport() {
        let leases = LeaseSet::new("vm");
        let (channel, mut peer) = channel(&leases).await;
        let (let_go, held) = mpsc::channel::<()>();
        let stuck = async move { assert!(held.recv().is_err()) };
        channel.executor.execute(Box::pin(stuck));
        let report = channel.close(after(50)).await;
        let failed = Outcome::Failed("gRPC's tasks do not end".into());
        assert_eq!(
            outcomes(&report),
            [("grpc", &failed), ("transport", &Outcome::Clean)]
        );
        assert!(leases.held().is_empty());
        peer.read_to_end(&mut Vec::new()).await.unwrap();
        drop(let_go);
    }

    #[tokio::test]
    async fn l4_a_cancelled_close_still_closes_transport() {
        let leases = LeaseSet::new("vm");
        let (channel, mut peer) = channel(&leases).await;
        // A call that is not answered keeps gRPC from ending.
        let mut client = channel.client().unwrap();
        let call = tokio::spawn(async move { client.ping(PingRequest::default()).await.map(drop) });
        tokio::task::yield_now().await;
        let closing = tokio::spawn(channel.close(after(60_000)));
        tokio::task::yield_now().await;
        closing.abort();
        assert!(closing.await.unwrap_err().is_cancelled());
        assert!(call.await.unwrap().is_err(), "the waiter is answered");
        assert_eq!(leases.drained(after(5000)).await, Ok(()));
        peer.read_to_end(&mut Vec::new()).await.unwrap();
    }

    /// Closing is done when the descriptor is closed: its number may be taken.
    #[tokio::test]
    async fn l4_nothing_holds_the_transport_once_close_returned() {
        let leases = LeaseSet::new("vm");
        for _ in 0..50 {
            let (channel, peer) = channel(&leases).await;
            drop(peer);
            let report = channel.close(after(5000)).await;
            assert!(report.is_clean(), "{report}");
            assert!(leases.held().is_empty());
        }
    }

    /// A client that somebody keeps keeps nothing else, and is not waited for.
    #[tokio::test]
    async fn l4_a_client_outlives_its_channel_without_the_transport() {
        let leases = LeaseSet::new("vm");
        let (channel, mut peer) = channel(&leases).await;
        let mut client = channel.client().unwrap();
        let mut copy = client.clone();
        let closing = after(100).run(channel.close(after(60_000))).await;
        let report = closing.expect("its clients are waited for");
        assert!(report.is_clean(), "{report}");
        assert!(leases.held().is_empty());
        for client in [&mut client, &mut copy] {
            let status = client.ping(PingRequest::default()).await.unwrap_err();
            let error = AgentError::from_status("Ping", &status);
            assert!(matches!(error, AgentError::Closing), "{error:?}");
        }
        peer.read_to_end(&mut Vec::new()).await.unwrap();
    }
}
