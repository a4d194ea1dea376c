// SPDX-License-Identifier: Apache-2.0
//! The end of the control connection, on a socket pair.

use std::os::unix::net;

use podhull_transport::Peer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::*;

/// Serves a host that the test is.
struct Served {
    host: UnixStream,
    leases: LeaseSet,
    ended: Arc<Notify>,
    /// Gives what the close did, and whether the sessions' task was over then.
    serving: JoinHandle<(CloseReport, bool)>,
}

impl Served {
    /// `sessions` is what their task does once it is to stop.
    fn new(sessions: impl Future<Output = ()> + Send + 'static) -> Self {
        let (ours, host) = net::UnixStream::pair().unwrap();
        let leases = LeaseSet::new("guest");
        let lease = leases
            .issue(Holder::new(HolderKind::Control, "host"))
            .unwrap();
        let peer = Peer::Host(VsockPort::READY);
        let control = VsockTransport::adopt(ours.into(), peer, lease).unwrap();
        let events = Events::default();
        let containers = Containers::new(Reaper::default(), events.clone());
        let ended = Arc::new(Notify::new());
        let tally = Tally::new(leases.clone());
        let service = Service::new(containers, events, tally, Arc::clone(&ended));
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let (over, is_over) = std::sync::mpsc::channel::<()>();
        let task = async move {
            let _over = over;
            stopped.cancelled().await;
            sessions.await;
        };
        let sessions = Sessions {
            serving: tokio::spawn(task),
            stop,
        };
        let told = Arc::clone(&ended);
        let serving = tokio::spawn(async move {
            let report = serve_control(control, service, &told, sessions).await;
            let over = is_over.try_recv() == Err(std::sync::mpsc::TryRecvError::Disconnected);
            (report.unwrap(), over)
        });
        host.set_nonblocking(true).unwrap();
        Self {
            host: UnixStream::from_std(host).unwrap(),
            leases,
            ended,
            serving,
        }
    }

    async fn closed(&mut self) -> (CloseReport, bool) {
        let soon = Deadline::after(Duration::from_secs(20));
        soon.run(&mut self.serving).await.unwrap().unwrap()
    }
}

fn steps(report: &CloseReport) -> Vec<(&'static str, &Outcome)> {
    report.steps().collect()
}

const CLEAN: [(&str, &Outcome); 3] = [
    ("sessions", &Outcome::Clean),
    ("grpc", &Outcome::Clean),
    ("transport", &Outcome::Clean),
];

#[tokio::test]
async fn l3_a_host_that_is_gone_ends_sessions_server_and_transport() {
    let mut served = Served::new(async {});
    served.host.shutdown().await.unwrap();
    let (report, over) = served.closed().await;
    assert_eq!(steps(&report), CLEAN);
    assert!(over, "the sessions' task is not joined");
    assert!(served.leases.held().is_empty());
    served.host.read_to_end(&mut Vec::new()).await.unwrap();
}

/// It was answered, and says and hears nothing any more.
#[tokio::test]
async fn l3_a_host_that_stays_does_not_keep_the_transport() {
    let mut served = Served::new(async {});
    served.ended.notify_one();
    let (report, over) = served.closed().await;
    assert_eq!(steps(&report)[0], CLEAN[0]);
    assert_eq!(steps(&report)[2], CLEAN[2]);
    assert!(over, "the sessions' task is not joined");
    assert!(served.leases.held().is_empty());
    served.host.read_to_end(&mut Vec::new()).await.unwrap();
}

#[tokio::test]
async fn l3_a_session_that_does_not_end_does_not_keep_the_transport() {
    let mut served = Served::new(std::future::pending());
    served.ended.notify_one();
    let (report, _) = served.closed().await;
    let (step, outcome) = steps(&report)[0];
    assert_eq!(step, "sessions");
    assert!(matches!(outcome, Outcome::Forced(_)), "{report}");
    assert_eq!(steps(&report)[2], CLEAN[2]);
    assert!(served.leases.held().is_empty());
    served.host.read_to_end(&mut Vec::new()).await.unwrap();
}
