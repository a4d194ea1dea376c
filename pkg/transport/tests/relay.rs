// SPDX-License-Identifier: Apache-2.0
//! Row L8 of the lifetime contract: a session that carries a TCP connection, with
//! a client at the host's end and a server at the guest's.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::future::pending;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use podhull_transport::{
    GuestSession, Holder, HolderKind, HostSession, LeaseSet, Peer, RelayReport, SessionTarget,
    VsockTransport, open_session, receive_session, reset,
};
use podhull_types::{Deadline, Token, VsockPort};
use storm::Storm;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

#[path = "shared/storm.rs"]
mod storm;

const BUFFER: u32 = 64 * 1024;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| u8::try_from((i * 31 + i / 251) % 256).unwrap())
        .collect()
}

async fn session(leases: &LeaseSet) -> (HostSession, GuestSession) {
    let (host, guest) = UnixStream::pair().unwrap();
    let [host, guest] = [host, guest].map(|end| {
        let holder = Holder::new(HolderKind::Relay, "test");
        let lease = leases.issue(holder).unwrap();
        VsockTransport::adopt(end.into(), Peer::Guest(VsockPort::SESSIONS), lease).unwrap()
    });
    let token = Token::from_bytes([5; 32]);
    let target = SessionTarget::Forward { port: 80 };
    let receive = async {
        let incoming = receive_session(guest, &token, soon()).await.unwrap();
        incoming.accept(soon()).await.unwrap()
    };
    let open = open_session(host, &token, &target, soon());
    let (host, guest) = tokio::join!(open, receive);
    (host.unwrap(), guest)
}

/// A connection's two ends, with buffers too small for a test's bytes.
async fn tcp() -> (TcpStream, TcpStream) {
    let socket = || {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(BUFFER).unwrap();
        socket.set_send_buffer_size(BUFFER).unwrap();
        socket
    };
    let listening = socket();
    listening.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = listening.listen(1).unwrap();
    let connect = socket().connect(listener.local_addr().unwrap());
    let (connected, accepted) = tokio::join!(connect, listener.accept());
    (connected.unwrap(), accepted.unwrap().0)
}

struct Forward {
    leases: LeaseSet,
    client: TcpStream,
    server: TcpStream,
    host: JoinHandle<RelayReport>,
    guest: JoinHandle<RelayReport>,
    unserved: oneshot::Sender<()>,
    give_up: oneshot::Sender<()>,
}

impl Forward {
    async fn new() -> Self {
        let leases = LeaseSet::new("vm");
        let (host, guest) = session(&leases).await;
        let (client, local) = tcp().await;
        let (server, to_server) = tcp().await;
        let (give_up, given_up) = oneshot::channel::<()>();
        let (unserved, nobody_serves) = oneshot::channel::<()>();
        let nobody_serves = async move { drop(nobody_serves.await) };
        let given_up = async move { drop(given_up.await) };
        Self {
            leases,
            client,
            server,
            host: tokio::spawn(host.relay_until(local, nobody_serves, given_up)),
            guest: tokio::spawn(guest.relay(to_server, pending())),
            unserved,
            give_up,
        }
    }

    /// Both relays have ended and nothing is held any more.
    async fn ended(self) -> (RelayReport, RelayReport) {
        let host = soon().run(self.host).await.unwrap().unwrap();
        let guest = soon().run(self.guest).await.unwrap().unwrap();
        assert!(host.closed.is_clean() && guest.closed.is_clean());
        assert!(self.leases.held().is_empty());
        drop((self.unserved, self.give_up));
        (host, guest)
    }
}

/// What it reads until the end.
async fn rest(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = soon().run(stream.read_to_end(&mut bytes)).await;
    read.expect("an end in time").map(|_| bytes)
}

#[tokio::test]
async fn l8_a_client_that_ends_first_gets_the_whole_answer() {
    let mut forward = Forward::new().await;
    let (question, answer) = (pattern(700_000), pattern(900_001));
    let (client, server) = (&mut forward.client, &mut forward.server);
    let ask = async {
        client.write_all(&question).await.unwrap();
        client.shutdown().await.unwrap();
        rest(client).await.unwrap()
    };
    let serve = async {
        let asked = rest(server).await.unwrap();
        server.write_all(&answer).await.unwrap();
        server.shutdown().await.unwrap();
        asked
    };
    let (answered, asked) = tokio::join!(ask, serve);
    assert!(asked == question && answered == answer);
    let (host, guest) = forward.ended().await;
    assert!(host.cut.is_none() && guest.cut.is_none());
    assert_eq!((host.sent, host.received), (700_000, 900_001));
    assert_eq!((guest.sent, guest.received), (900_001, 700_000));
}

#[tokio::test]
async fn l8_a_server_that_ends_first_gets_the_whole_question() {
    let mut forward = Forward::new().await;
    let (question, answer) = (pattern(700_000), pattern(300_000));
    let (client, server) = (&mut forward.client, &mut forward.server);
    let ask = async {
        let answered = rest(client).await.unwrap();
        client.write_all(&question).await.unwrap();
        client.shutdown().await.unwrap();
        answered
    };
    let serve = async {
        server.write_all(&answer).await.unwrap();
        server.shutdown().await.unwrap();
        rest(server).await.unwrap()
    };
    let (answered, asked) = tokio::join!(ask, serve);
    assert!(asked == question && answered == answer);
    let (host, guest) = forward.ended().await;
    assert!(host.cut.is_none() && guest.cut.is_none());
}

#[tokio::test]
async fn l8_a_reset_by_either_side_resets_the_other() {
    for by_client in [true, false] {
        let mut forward = Forward::new().await;
        forward.client.write_all(b"a").await.unwrap();
        forward.server.write_all(b"b").await.unwrap();
        assert_eq!(forward.client.read_u8().await.unwrap(), b'b');
        assert_eq!(forward.server.read_u8().await.unwrap(), b'a');
        // Both are kept: only one of them is reset.
        let (spare, spare_end) = tcp().await;
        let mut other = if by_client {
            reset(std::mem::replace(&mut forward.client, spare));
            std::mem::replace(&mut forward.server, spare_end)
        } else {
            reset(std::mem::replace(&mut forward.server, spare));
            std::mem::replace(&mut forward.client, spare_end)
        };
        let error = rest(&mut other).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{by_client}");
        let (host, guest) = forward.ended().await;
        assert!(host.cut.is_some() && guest.cut.is_some());
    }
}

/// What `local` has sent and `remote` has not received, and what it has received and
/// nobody has read; nothing if there is no such connection on this host.
fn queues(local: SocketAddr, remote: SocketAddr) -> Option<(usize, usize)> {
    let ports = [local, remote].map(|end| format!(":{:04X}", end.port()));
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let mut rows = table
        .lines()
        .map(|row| row.split_whitespace().collect::<Vec<_>>());
    let row = rows.rfind(|row| row[1].ends_with(&ports[0]) && row[2].ends_with(&ports[1]))?;
    let queue = |text| usize::from_str_radix(text, 16).unwrap();
    let (sent, received) = row[4].split_once(':').unwrap();
    Some((queue(sent), queue(received)))
}

/// Looks until `found`: the kernel tells nobody.
async fn until(mut found: impl FnMut() -> bool) {
    let looks = async {
        while !found() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    soon().run(looks).await.unwrap();
}

/// Time in which a relay does what it can do.
const SETTLED: Duration = Duration::from_millis(200);

/// Says more and more, until the last of it stays unread where the relay would read
/// it: nobody reads at the other end. Gives what was said.
async fn say_more_than_goes_on(hasty: &mut TcpStream) -> Vec<u8> {
    const PIECE: usize = 32 * 1024;
    let ends = (hasty.local_addr().unwrap(), hasty.peer_addr().unwrap());
    let words = pattern(4 << 20);
    let mut said = 0;
    loop {
        let piece = words
            .get(said..said + PIECE)
            .expect("an end to what goes on");
        hasty.write_all(piece).await.unwrap();
        said += PIECE;
        until(|| queues(ends.0, ends.1).unwrap().0 == 0).await;
        let unread = || queues(ends.1, ends.0).unwrap().1 > 0;
        if unread() {
            tokio::time::sleep(SETTLED).await;
        }
        if unread() {
            return words[..said].to_vec();
        }
    }
}

/// One side says all it has and hangs up, while the other still sends: the first
/// one's bytes are on their way when it takes no more.
#[tokio::test]
async fn l8_what_was_said_before_hanging_up_arrives() {
    for by_server in [true, false] {
        let mut forward = Forward::new().await;
        let (spare, spare_end) = tcp().await;
        let sides = (&mut forward.client, &mut forward.server);
        let (hasty, patient) = if by_server { (sides.1, sides.0) } else { sides };
        let mut hasty = std::mem::replace(hasty, spare);
        let mut patient = std::mem::replace(patient, spare_end);
        let ends = (hasty.local_addr().unwrap(), hasty.peer_addr().unwrap());
        let said = say_more_than_goes_on(&mut hasty).await;
        drop(hasty);
        patient.write_all(b"a").await.unwrap();
        // The relay's end of the connection is reset.
        until(|| queues(ends.1, ends.0).is_none()).await;
        patient.write_all(b"b").await.unwrap();
        // One that gave up what is on its way would have done so by now.
        tokio::time::sleep(SETTLED).await;
        let heard = rest(&mut patient).await.unwrap();
        assert!(heard == said, "{} of {}", heard.len(), said.len());
        let ended = Instant::now();
        let (host, guest) = forward.ended().await;
        assert!(host.cut.is_some() && guest.cut.is_some());
        assert!(ended.elapsed() < Duration::from_secs(3), "{ended:?}");
        drop(patient);
    }
}

/// The other one may do nothing but send.
#[tokio::test]
async fn l8_who_sends_to_nobody_is_hung_up_on() {
    let mut forward = Forward::new().await;
    let (spare, spare_end) = tcp().await;
    drop(spare);
    // Reset with the question unread, behind the answer.
    forward.client.write_all(b"question").await.unwrap();
    let mut first = [0];
    forward.server.read_exact(&mut first).await.unwrap();
    forward.server.write_all(b"answer").await.unwrap();
    drop(std::mem::replace(&mut forward.server, spare_end));
    let endless = pattern(1 << 20);
    let (mut from, mut to) = forward.client.split();
    let sends = async { while to.write_all(&endless).await.is_ok() {} };
    let mut answer = [0; 6];
    let hears = async {
        from.read_exact(&mut answer).await.unwrap();
    };
    let both = async { tokio::join!(sends, hears) };
    soon().run(both).await.expect("it is hung up on");
    assert_eq!(&answer, b"answer");
    forward.ended().await;
}

#[tokio::test]
async fn l8_a_lost_guest_resets_the_client() {
    let mut forward = Forward::new().await;
    forward.client.write_all(b"a").await.unwrap();
    assert_eq!(forward.server.read_u8().await.unwrap(), b'a');
    // Its handle is dropped: no CLOSE, no end of any stream.
    forward.guest.abort();
    let error = rest(&mut forward.client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let host = soon().run(forward.host).await.unwrap().unwrap();
    assert!(host.cut.is_some());
    assert_eq!(forward.leases.drained(soon()).await, Ok(()));
}

#[tokio::test]
async fn l8_a_client_of_a_dead_server_gets_its_bytes_and_is_not_waited_for() {
    let mut forward = Forward::new().await;
    let answer = pattern(900_001);
    let (client, server) = (&mut forward.client, &mut forward.server);
    client.write_all(b"more to come").await.unwrap();
    let mut question = [0; 12];
    server.read_exact(&mut question).await.unwrap();
    let serve = async {
        server.write_all(&answer).await.unwrap();
        server.shutdown().await.unwrap();
    };
    let (received, ()) = tokio::join!(rest(client), serve);
    assert!(received.unwrap() == answer, "the answer differs");
    assert!(!forward.host.is_finished(), "the client may still send");
    let (unserved, _) = oneshot::channel();
    let told = std::mem::replace(&mut forward.unserved, unserved);
    told.send(()).unwrap();
    let (host, _) = forward.ended().await;
    assert!(host.cut.is_none(), "{:?}", host.cut);
    assert_eq!(host.received, 900_001);
}

/// As in containerization#477: a relay that writes before it reads again stands
/// still once both sides do.
#[tokio::test]
async fn l8_both_ways_blocked_is_no_deadlock() {
    const LENGTH: usize = 4 << 20;
    let mut forward = Forward::new().await;
    let bytes = pattern(LENGTH);
    let written = [AtomicUsize::new(0), AtomicUsize::new(0)];
    let (client_in, client_out) = forward.client.split();
    let (server_in, server_out) = forward.server.split();
    let write = async |mut to: tokio::net::tcp::WriteHalf<'_>, side: usize| {
        for piece in bytes.chunks(4096) {
            to.write_all(piece).await.unwrap();
            written[side].fetch_add(piece.len(), Ordering::Relaxed);
        }
        to.shutdown().await.unwrap();
    };
    // Nobody reads until neither can write any more.
    let stuck = async {
        let now = || [0, 1].map(|side: usize| written[side].load(Ordering::Relaxed));
        let mut last = now();
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            if now() == last && last.iter().all(|count| *count >= 64 * 1024) {
                return last;
            }
            last = now();
        }
    };
    let read = async |mut from: tokio::net::tcp::ReadHalf<'_>| {
        let mut received = Vec::new();
        from.read_to_end(&mut received).await.unwrap();
        received
    };
    let reads = async {
        let stuck = stuck.await;
        assert!(stuck.iter().all(|count| *count < LENGTH), "{stuck:?}");
        tokio::join!(read(client_in), read(server_in))
    };
    let all = async { tokio::join!(write(client_out, 0), write(server_out, 1), reads) };
    let ((), (), (answer, question)) = soon().run(all).await.expect("no deadlock");
    assert!(answer == bytes && question == bytes);
    let (host, guest) = forward.ended().await;
    assert!(host.cut.is_none() && guest.cut.is_none());
}

/// The relay holds the VM for as long as bytes may move, and not longer.
#[tokio::test]
async fn l8_the_relay_keeps_the_transport_and_the_vm() {
    let mut forward = Forward::new().await;
    forward.leases.close();
    let short = Deadline::after(Duration::from_millis(20));
    let held = forward.leases.drained(short).await.unwrap_err();
    assert_eq!(held.len(), 2);
    assert_eq!(held[0].holder.to_string(), "session port 80");
    // A VM that is being stopped still carries what it carried.
    forward.client.write_all(b"a").await.unwrap();
    assert_eq!(forward.server.read_u8().await.unwrap(), b'a');
    forward.client.shutdown().await.unwrap();
    forward.server.shutdown().await.unwrap();
    assert_eq!(forward.leases.drained(soon()).await, Ok(()));
    forward.ended().await;
}

/// Relays that are given up in the middle, beside threads that take every
/// descriptor number that is free.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l8_stopping_a_relay_never_closes_twice() {
    let storm = Storm::new();
    for round in 0..50 {
        let mut forward = Forward::new().await;
        let flood = pattern(100_000);
        forward.client.write_all(&flood).await.unwrap();
        if round % 2 == 0 {
            assert_eq!(forward.server.read_u8().await.unwrap(), flood[0]);
        }
        let (give_up, _) = oneshot::channel();
        std::mem::replace(&mut forward.give_up, give_up)
            .send(())
            .unwrap();
        let error = rest(&mut forward.client).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        rest(&mut forward.server).await.unwrap_err();
        let (host, guest) = forward.ended().await;
        assert_eq!(host.cut.unwrap().kind(), ErrorKind::TimedOut);
        assert!(guest.cut.is_some());
    }
    storm.end();
}

/// Both directions have ended at the guest's end, and the host never hangs up.
#[tokio::test]
async fn l8_a_guest_that_is_given_up_does_not_wait_for_the_host() {
    let leases = LeaseSet::new("vm");
    let (mut host, guest) = session(&leases).await;
    let (mut server, to_server) = tcp().await;
    let (give_up, given_up) = oneshot::channel::<()>();
    let mut relay = tokio::spawn(guest.relay(to_server, async { drop(given_up.await) }));
    host.input.shutdown().await.unwrap();
    assert!(rest(&mut server).await.unwrap().is_empty());
    server.shutdown().await.unwrap();
    // The end's frame: from here on the relay waits for the host only.
    host.output.read_to_end(&mut Vec::new()).await.unwrap();
    let early = Deadline::after(Duration::from_millis(50));
    early
        .run(&mut relay)
        .await
        .expect_err("the host is to hang up first");
    drop(give_up);
    let report = soon()
        .run(relay)
        .await
        .expect("it goes on waiting")
        .unwrap();
    assert!(report.cut.is_none(), "{report:?}");
    assert!(report.closed.is_clean(), "{report:?}");
    drop(host);
    assert_eq!(leases.drained(soon()).await, Ok(()));
}

/// One bad connection is that connection's end (containerization#867).
#[tokio::test]
async fn l8_a_connection_that_is_reset_leaves_its_neighbours() {
    let mut good = Forward::new().await;
    for _ in 0..20 {
        let bad = Forward::new().await;
        let (spare, _) = tcp().await;
        reset(bad.client);
        let bad = Forward {
            client: spare,
            ..bad
        };
        bad.ended().await;
        good.client.write_all(b"a").await.unwrap();
        assert_eq!(good.server.read_u8().await.unwrap(), b'a');
    }
    good.client.shutdown().await.unwrap();
    good.server.shutdown().await.unwrap();
    let (host, guest) = good.ended().await;
    assert!(host.cut.is_none() && guest.cut.is_none());
}
