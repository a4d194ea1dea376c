// SPDX-License-Identifier: Apache-2.0
//! A process's FIFOs and its session, with the guest's end played here.

use std::os::unix::net::UnixStream;

use podhull_transport::{
    GuestSession, Holder, HolderKind, LeaseSet, Peer, SessionTarget, VsockTransport, open_session,
    receive_session,
};
use podhull_types::{ContainerId, ExecId, Token, VsockPort};
use tokio::io::{AsyncReadExt, Interest};

use super::*;
use crate::process::Process;
use crate::spec::EventSink;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

struct Exec {
    folder: tempfile::TempDir,
    io: ProcessIo,
    /// The sandbox's.
    relays: Relays,
    guest: GuestSession,
    metrics: Metrics,
}

impl Exec {
    /// A process whose streams are these FIFOs.
    async fn with(stdin: bool, stdout: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let fifo = |name| {
            let path = folder.path().join(name);
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
            path
        };
        let stdio = Stdio {
            stdin: stdin.then(|| fifo("stdin")),
            stdout: stdout.then(|| fifo("stdout")),
            ..Stdio::default()
        };
        let container = ContainerId::new("c1").unwrap();
        let process = ProcessRef::exec(container, ExecId::new("e1").unwrap());
        let fifos = Fifos::open(&stdio, &process).unwrap();

        let leases = LeaseSet::new("vm");
        let (host, guest) = UnixStream::pair().unwrap();
        let [host, guest] = [host, guest].map(|end| {
            let holder = Holder::new(HolderKind::Session, "test");
            let lease = leases.issue(holder).unwrap();
            VsockTransport::adopt(end.into(), Peer::Guest(VsockPort::SESSIONS), lease).unwrap()
        });
        let token = Token::from_bytes([5; Token::LEN]);
        let target = SessionTarget::Process(process);
        let receive = async {
            let incoming = receive_session(guest, &token, soon()).await.unwrap();
            incoming.accept(soon()).await.unwrap()
        };
        let (host, guest) = tokio::join!(open_session(host, &token, &target, soon()), receive);
        let metrics = Metrics::new().unwrap();
        let relays = Relays::default();
        let io = ProcessIo::start(fifos, host.unwrap(), &metrics, &relays);
        Self {
            folder,
            io,
            relays,
            guest,
            metrics,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// The process has closed its outputs and ended.
async fn ends(guest: &mut GuestSession) {
    guest.output.shutdown().await.unwrap();
    guest.error.shutdown().await.unwrap();
    guest.handle.send_exit(0);
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| u8::try_from((i * 31 + i / 251) % 256).unwrap())
        .collect()
}

/// Its end came while most of what it wrote was on the way (kata#11747).
#[tokio::test]
async fn output_of_a_process_that_exits_right_after_it_is_not_cut() {
    let exec = Exec::with(false, true).await;
    let mut fifo = pipe::OpenOptions::new()
        .open_receiver(exec.path("stdout"))
        .unwrap();
    let mut guest = exec.guest;
    let sent = pattern(1 << 20);
    let process = async {
        guest.output.write_all(&sent).await.unwrap();
        ends(&mut guest).await;
        guest.handle.close(soon()).await
    };
    let read = async {
        let mut received = vec![0; sent.len()];
        fifo.read_exact(&mut received).await.unwrap();
        received
    };
    let (closed, received, report) = tokio::join!(process, read, exec.io.finish(soon()));
    assert!(received == sent);
    assert!(report.complete, "{report:?}");
    assert!(closed.is_clean(), "{closed}");
    assert_eq!(fifo.read(&mut [0]).await.unwrap(), 0, "and nothing more");
}

/// An end that comes just behind a full buffer was lost (containerd#13934).
#[tokio::test]
async fn stdin_of_a_multiple_of_32_kib_ends() {
    for size in [32 << 10, 64 << 10, 96 << 10, 128 << 10] {
        let exec = Exec::with(true, false).await;
        let mut client = pipe::OpenOptions::new()
            .open_sender(exec.path("stdin"))
            .unwrap();
        let mut guest = exec.guest;
        let sent = pattern(size);
        let write = async move {
            client.write_all(&sent).await.unwrap();
            drop(client);
            sent
        };
        let mut received = Vec::new();
        let read = soon().run(guest.input.read_to_end(&mut received));
        let (sent, read) = tokio::join!(write, read);
        assert_eq!(read.expect("its end is lost").unwrap(), size);
        assert!(received == sent, "{size}");
        ends(&mut guest).await;
        let (report, closed) = tokio::join!(exec.io.finish(soon()), guest.handle.close(soon()));
        assert!(report.complete && closed.is_clean(), "{report:?}, {closed}");
    }
}

/// What writes no more may still read: `exec >/dev/null 2>&1; cat >file`.
#[tokio::test]
async fn stdin_outlives_outputs_that_ended() {
    let exec = Exec::with(true, true).await;
    let mut stdout = pipe::OpenOptions::new()
        .open_receiver(exec.path("stdout"))
        .unwrap();
    let mut client = pipe::OpenOptions::new()
        .open_sender(exec.path("stdin"))
        .unwrap();
    let mut guest = exec.guest;
    guest.output.shutdown().await.unwrap();
    guest.error.shutdown().await.unwrap();
    let ended = soon().run(stdout.read(&mut [0])).await;
    assert_eq!(ended.expect("stdout's end is passed on").unwrap(), 0);
    client.write_all(b"late").await.unwrap();
    drop(client);
    let mut received = Vec::new();
    guest.input.read_to_end(&mut received).await.unwrap();
    assert_eq!(received, b"late");
    guest.handle.send_exit(0);
    let (report, closed) = tokio::join!(exec.io.finish(soon()), guest.handle.close(soon()));
    assert!(report.complete && closed.is_clean(), "{report:?}, {closed}");
}

/// What stands before a reader that does not read is dropped at the deadline,
/// and counted to the byte.
#[tokio::test]
async fn dropped_output_is_counted_whole() {
    let exec = Exec::with(false, true).await;
    let mut silent_reader = pipe::OpenOptions::new()
        .open_receiver(exec.path("stdout"))
        .unwrap();
    let mut guest = exec.guest;
    let sent = 200_000;
    guest.output.write_all(&pattern(sent)).await.unwrap();
    ends(&mut guest).await;
    let close = guest.handle.close(soon());
    let finish = exec.io.finish(Deadline::after(Duration::from_millis(500)));
    let (report, _) = tokio::join!(finish, close);
    assert!(!report.complete);
    let dropped = exec.metrics.dropped_bytes.with_label_values(&["stdout"]);
    let mut delivered = Vec::new();
    silent_reader.read_to_end(&mut delivered).await.unwrap();
    assert_eq!(dropped.get() + delivered.len() as u64, sent as u64);
    assert!(
        dropped.get() > 100_000,
        "most of it did not fit into a FIFO"
    );
}

/// containerd 1.6.20 stops reading once it hears of the end.
#[tokio::test]
async fn output_is_delivered_only_once_it_was_read() {
    let exec = Exec::with(false, true).await;
    let mut reader = pipe::OpenOptions::new()
        .open_receiver(exec.path("stdout"))
        .unwrap();
    let mut guest = exec.guest;
    guest.output.write_all(b"words").await.unwrap();
    ends(&mut guest).await;
    reader.readable().await.unwrap();
    let delivered = exec.io.delivered();
    tokio::pin!(delivered);
    let early = Deadline::after(READ / 2).run(&mut delivered).await;
    assert!(early.is_err(), "it stands in the FIFO");
    let mut words = [0; 5];
    reader.read_exact(&mut words).await.unwrap();
    let soon = Deadline::after(READ / 4).run(&mut delivered).await;
    assert!(soon.is_ok(), "it was read");
    let (report, _) = tokio::join!(
        exec.io.finish(self::soon()),
        guest.handle.close(self::soon())
    );
    assert!(report.complete);
}

/// A relay that does not even end when it is given up is aborted: nothing of it
/// goes on.
#[tokio::test]
async fn a_relay_that_is_aborted_takes_everything_with_it() {
    let exec = Exec::with(true, true).await;
    let client = pipe::OpenOptions::new()
        .open_sender(exec.path("stdin"))
        .unwrap();
    let open = exec.metrics.sessions.with_label_values(&["stdio"]);
    let running = async {
        while open.get() == 0 {
            tokio::task::yield_now().await;
        }
    };
    soon().run(running).await.unwrap();
    exec.io.relays.abort();
    let report = exec.io.finish(soon()).await;
    assert!(!report.complete);
    assert_eq!(open.get(), 0, "it is counted for good");
    let closed = soon().run(client.ready(Interest::ERROR)).await;
    assert!(closed.is_ok(), "somebody still reads stdin");
    let told = soon().run(exec.guest.handle.closed()).await;
    assert!(told.is_ok(), "the guest is not told");
}

/// A delete waits for a reader that does not read while the sandbox is torn down:
/// its VM is not to end under the session.
#[tokio::test]
async fn a_teardown_cuts_what_a_delete_waits_for() {
    let exec = Exec::with(false, true).await;
    let _silent_reader = pipe::OpenOptions::new()
        .open_receiver(exec.path("stdout"))
        .unwrap();
    let mut guest = exec.guest;
    guest.output.write_all(&pattern(200_000)).await.unwrap();
    ends(&mut guest).await;
    let close = guest.handle.close(soon());
    let minutes = Deadline::after(Duration::from_secs(600));
    let teardown = exec.relays.end(Deadline::after(Duration::from_millis(100)));
    let all = async { tokio::join!(exec.io.finish(minutes), teardown, close) };
    let (report, cut, _) = soon().run(all).await.unwrap();
    assert!(!report.complete);
    assert_eq!(cut, Cut { cut: 1, left: 0 });
}

/// A teardown, or a delete, has been here: nobody would end what comes after it.
#[tokio::test]
async fn streams_that_come_behind_the_end_are_given_back() {
    let exec = Exec::with(false, true).await;
    let events = EventSink::new(|_| {});
    let id = ProcessRef::init(ContainerId::new("c1").unwrap());
    let process = Process::new(id, 7, Stdio::default(), false, events);
    assert!(process.take_io().is_none());
    let late = process.attach_io(exec.io).unwrap_err();
    let (report, closed) = tokio::join!(
        late.finish(Deadline::after(Duration::ZERO)),
        exec.guest.handle.closed()
    );
    assert_eq!(closed, ());
    assert!(!report.complete);
}
