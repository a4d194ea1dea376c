// SPDX-License-Identifier: Apache-2.0
//! The agent's life: set up, say READY, serve, end the VM.

use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use podhull_api::agent::agent_server::AgentServer;
use podhull_transport::{
    CloseReport, GuestTimes, Holder, HolderKind, LeaseSet, Outcome, TransportError, VsockListener,
    VsockTransport, announce, dial_host,
};
use podhull_types::{Cid, Deadline, Token, VsockPort};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::containers::Containers;
use crate::error::GuestError;
use crate::events::Events;
use crate::reaper::Reaper;
use crate::server::Service;
use crate::tally::Tally;
use crate::{init, network, oci, sessions};

/// Time for the host to be reached: the device is there when the kernel is.
const REACH_HOST: Duration = Duration::from_secs(30);
/// Pause between two tries: nothing tells when the host listens.
const RETRY: Duration = Duration::from_millis(10);
/// Time for the answer to Shutdown to leave before the VM ends.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// What ending the server's use of its connection may take of a close whose
/// deadline has passed.
const ABORT_GRACE: Duration = Duration::from_millis(500);
/// Largest request.
const MAX_MESSAGE: usize = 4 << 20;

/// The agent's main: a helper if the arguments say so, else PID 1.
pub fn run(mut args: impl Iterator<Item = String>) -> ExitCode {
    let _program = args.next();
    if args.next().as_deref() == Some("oci") {
        return args
            .next()
            .and_then(|name| oci::main(&name))
            .unwrap_or(ExitCode::FAILURE);
    }
    if !init::is_guest() {
        return ExitCode::from(64);
    }
    let started = since_kernel();
    match init::set_up().and_then(|()| serve(started)) {
        Ok(()) => init::power_off(),
        Err(error) => init::give_up(&error),
    }
    ExitCode::FAILURE
}

/// Time since the kernel's start.
fn since_kernel() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map(Duration::from)
        .unwrap_or_default()
}

fn start_log() {
    let console = std::fs::OpenOptions::new().write(true).open("/dev/console");
    let kmsg = || std::fs::OpenOptions::new().write(true).open("/dev/kmsg");
    let Ok(console) = console.or_else(|_| kmsg()) else {
        return;
    };
    let started = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_target(false)
        .with_max_level(tracing::Level::INFO)
        .with_writer(std::sync::Mutex::new(console))
        .try_init();
    debug_assert!(started.is_ok());
}

fn serve(started: Duration) -> Result<(), GuestError> {
    start_log();
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(GuestError::system("start the runtime"))?
        .block_on(serve_host(started))
}

async fn serve_host(started: Duration) -> Result<(), GuestError> {
    let reaper = Reaper::default();
    reaper.start()?;
    network::loopback_up().await?;
    let events = Events::default();
    let containers = Containers::new(reaper, events.clone());
    let leases = LeaseSet::new("agent");
    // Sessions can be dialled as soon as the host has heard READY.
    let listener = VsockListener::bind_vsock(Some(VsockPort::SESSIONS), Cid::HOST, leases.clone())?;
    let (control, token) = report_ready(&leases, started).await?;
    let (tally, stop) = (Tally::new(leases), CancellationToken::new());
    let serving = sessions::serve(listener, token, containers.clone(), stop.clone());
    let sessions = Sessions {
        serving: tokio::spawn(serving),
        stop,
    };
    let ended = Arc::new(Notify::new());
    let service = Service::new(containers, events, tally, Arc::clone(&ended));
    let report = serve_control(control, service, &ended, sessions).await?;
    tracing::info!(%report, "closed");
    Ok(())
}

/// The task that accepts sessions, and what ends it.
#[derive(Debug)]
struct Sessions {
    serving: JoinHandle<()>,
    stop: CancellationToken,
}

impl Sessions {
    async fn close(mut self, by: Deadline) -> CloseReport {
        self.stop.cancel();
        let outcome = match by.run(&mut self.serving).await {
            Ok(Ok(())) => Outcome::Clean,
            Ok(Err(error)) => Outcome::Failed(error.to_string()),
            Err(_) => {
                self.serving.abort();
                Outcome::Forced("a session does not end".into())
            }
        };
        CloseReport::of("sessions", outcome)
    }
}

/// Serves the host on `control` until it is gone, or has had its answer to
/// Shutdown; then ends the sessions, the server, and the transport, in this order.
async fn serve_control(
    control: VsockTransport,
    service: Service,
    ended: &Notify,
    sessions: Sessions,
) -> Result<CloseReport, GuestError> {
    let service = AgentServer::new(service).max_decoding_message_size(MAX_MESSAGE);
    let (io, lost) = Connection::new(control.io()?);
    let once = tokio_stream::once(Ok::<_, io::Error>(io));
    let incoming = futures::StreamExt::chain(once, futures::stream::pending());
    let stop = CancellationToken::new();
    let serving = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, stop.cancelled());
    tokio::pin!(serving);
    let mut served = None;
    tokio::select! {
        result = &mut serving => {
            tracing::error!(?result, "control channel ended");
            served = Some(result);
        }
        () = lost.notified() => tracing::error!("the host is gone"),
        () = ended.notified() => {
            // The host closes the channel when it has the answer.
            let left = tokio::time::timeout(LAST_WORDS, lost.notified()).await;
            tracing::info!(host_left = left.is_ok(), "shut down");
        }
    }
    let by = Deadline::after(LAST_WORDS);
    let mut report = sessions.close(by).await;
    stop.cancel();
    let served = match served {
        Some(result) => Ok(result),
        None => by.run(serving).await,
    };
    report.push(
        "grpc",
        match served {
            Ok(Ok(())) => Outcome::Clean,
            Ok(Err(error)) => Outcome::Failed(error.to_string()),
            Err(_) => Outcome::Forced("calls were still under way".into()),
        },
    );
    // What the server still has of it fails, and lets go.
    report.extend(control.close(by.max(Deadline::after(ABORT_GRACE))).await);
    Ok(report)
}

async fn report_ready(
    leases: &LeaseSet,
    started: Duration,
) -> Result<(VsockTransport, Token), GuestError> {
    let port = init::ready_port()?;
    let by = Deadline::after(REACH_HOST);
    let control = loop {
        let lease = leases.issue(Holder::new(HolderKind::Control, "host"));
        match dial_host(port, lease.map_err(TransportError::from)?, by).await {
            Ok(transport) => break transport,
            Err(error) if by.passed() => return Err(error.into()),
            Err(_) => tokio::time::sleep(RETRY).await,
        }
    };
    let times = GuestTimes {
        kernel_to_agent: started,
        agent_to_ready: since_kernel().saturating_sub(started),
    };
    let token = announce(&control, times, by).await?;
    Ok((control, token))
}

#[cfg(test)]
mod tests;

pub use connection::Connection;

mod connection {
    //! The control connection as the server's one client, which tells its end.

    use std::io;
    use std::pin::Pin;
    use std::sync::Arc;
    use std::task::{Context, Poll};

    use podhull_transport::TransportIo;
    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
    use tokio::sync::Notify;
    use tonic::transport::server::Connected;

    /// Tells when the server is done with the connection, however it ended.
    #[derive(Debug)]
    pub struct Connection {
        io: TransportIo,
        ended: Arc<Notify>,
    }

    impl Connection {
        /// Wraps `io`; the second value is told at its end.
        #[must_use]
        pub fn new(io: TransportIo) -> (Self, Arc<Notify>) {
            let ended = Arc::new(Notify::new());
            (
                Self {
                    io,
                    ended: Arc::clone(&ended),
                },
                ended,
            )
        }
    }

    impl Drop for Connection {
        fn drop(&mut self) {
            self.ended.notify_one();
        }
    }

    impl Connected for Connection {
        type ConnectInfo = ();

        fn connect_info(&self) {}
    }

    impl AsyncRead for Connection {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Connection {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.io).poll_write(cx, buf)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_shutdown(cx)
        }
    }
}
