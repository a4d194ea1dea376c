// SPDX-License-Identifier: Apache-2.0
//! The same contract over AF_VSOCK itself, where the kernel loops it back
//! (module vsock_loopback). What needs a guest is a case of the CRI suite.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test"
)]

use std::future::pending;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use podhull_transport::{
    Closing, GuestAddress, GuestSession, HostSession, LeaseSet, SessionError, SessionTarget,
    TransportError, VsockListener, VsockTransport, open_session, receive_session, reset,
};
use podhull_types::{Cid, Deadline, Token, VsockPort};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use loopback::{LOCAL, connected, dial, lease, soon, with_loopback};
use storm::Storm;

#[path = "vsock/burst.rs"]
mod burst;
#[path = "shared/loopback.rs"]
mod loopback;
#[path = "shared/storm.rs"]
mod storm;

/// No VM of the machine under test has this one.
const ABSENT: Cid = Cid(0x7ffe_dead);

fn token() -> Token {
    Token::from_bytes([3; Token::LEN])
}

/// A session, and the VM that it is of.
async fn session(leases: &LeaseSet) -> (HostSession, GuestSession) {
    let (host, guest) = connected(leases).await;
    let (token, target) = (token(), SessionTarget::Forward { port: 80 });
    let receive = async {
        let incoming = receive_session(guest, &token, soon()).await.unwrap();
        incoming.accept(soon()).await.unwrap()
    };
    let (host, guest) = tokio::join!(open_session(host, &token, &target, soon()), receive);
    (host.unwrap(), guest)
}

async fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connect = TcpStream::connect(listener.local_addr().unwrap());
    let (connected, accepted) = tokio::join!(connect, listener.accept());
    (connected.unwrap(), accepted.unwrap().0)
}

/// A word each way.
async fn talk(one: &VsockTransport, other: &VsockTransport) {
    let (mut ours, mut theirs) = (one.io().unwrap(), other.io().unwrap());
    let mut word = [0; 5];
    ours.write_all(b"there").await.unwrap();
    theirs.read_exact(&mut word).await.unwrap();
    assert_eq!(&word, b"there");
    theirs.write_all(b"back!").await.unwrap();
    ours.read_exact(&mut word).await.unwrap();
    assert_eq!(&word, b"back!");
}

#[test]
fn l1_descriptor_and_lease_go_together() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let (one, other) = connected(&leases).await;
        assert_eq!(leases.held().len(), 2);
        assert!(one.close(soon()).await.is_clean());
        assert_eq!(leases.held().len(), 1);
        assert_eq!(other.io().unwrap().read(&mut [0]).await.unwrap(), 0);
        assert!(other.close(soon()).await.is_clean());
        assert!(leases.held().is_empty());
    });
}

#[test]
fn l1_a_view_keeps_descriptor_and_vm_after_close() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let (one, other) = connected(&leases).await;
        let mut view = one.io().unwrap();
        let report = one.close(Deadline::after(Duration::from_millis(20))).await;
        assert!(!report.is_clean(), "{report}");
        assert_eq!(leases.held().len(), 2, "the VM is still held");
        let error = view.write_all(b"x").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
        let mut io = other.io().unwrap();
        let early = timeout(Duration::from_millis(100), io.read(&mut [0])).await;
        assert!(early.is_err(), "ended with a view left: {early:?}");
        drop(view);
        assert_eq!(io.read(&mut [0]).await.unwrap(), 0, "closed with the view");
        drop(io);
        assert!(other.close(soon()).await.is_clean());
        assert!(leases.held().is_empty());
    });
}

/// Whoever goes first: what is left has its descriptor, and its number is
/// nobody else's.
#[test]
fn l1_each_copy_is_valid_when_the_others_have_gone() {
    with_loopback(async {
        let storm = Storm::new();
        let leases = LeaseSet::new("vm");
        for round in 0..20 {
            let (original, other) = connected(&leases).await;
            let mut copies: Vec<_> = (0..3).map(|_| original.try_dup().unwrap()).collect();
            copies.insert(round % 4, original);
            while let Some(next) = copies.pop() {
                talk(&next, &other).await;
                assert_eq!(leases.held().len(), copies.len() + 2);
                assert!(next.close(soon()).await.is_clean());
                for copy in &copies {
                    talk(copy, &other).await;
                }
            }
            assert_eq!(other.io().unwrap().read(&mut [0]).await.unwrap(), 0);
            assert!(other.close(soon()).await.is_clean());
            assert!(leases.held().is_empty());
        }
        storm.end();
    });
}

/// Unlike other sockets', these are made by a crate of its own.
#[test]
fn l2_descriptors_are_not_inherited_by_children() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let listener = VsockListener::bind_vsock(None, LOCAL, leases.clone()).unwrap();
        let (dialled, accepted) = connected(&leases).await;
        let copies = [dialled.try_dup().unwrap(), accepted.try_dup().unwrap()];
        let listing = std::process::Command::new("ls")
            .args(["-l", "/proc/self/fd"])
            .output()
            .unwrap();
        let listing = String::from_utf8(listing.stdout).unwrap();
        assert!(listing.contains("pipe:"), "{listing}");
        assert!(!listing.contains("socket:"), "{listing}");
        for transport in copies.into_iter().chain([dialled, accepted]) {
            assert!(transport.close(soon()).await.is_clean());
        }
        assert!(listener.close().is_clean());
    });
}

#[test]
fn l3_the_peers_end_is_read_and_closing_after_it_is_clean() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let (one, other) = connected(&leases).await;
        other.io().unwrap().write_all(b"last").await.unwrap();
        assert!(other.close(soon()).await.is_clean());
        let mut received = Vec::new();
        let mut io = one.io().unwrap();
        io.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, b"last");
        let error = io.write_all(b"late").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
        drop(io);
        assert!(one.close(soon()).await.is_clean());
        assert!(leases.held().is_empty());
    });
}

#[test]
fn l7_a_dialled_and_an_accepted_connection_carry_large_writes_both_ways() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let (one, other) = connected(&leases).await;
        let bytes: Vec<u8> = (0..1_u32 << 20).flat_map(u32::to_le_bytes).collect();
        let exchange = async |transport: &VsockTransport| {
            let (mut read, mut write) = tokio::io::split(transport.io().unwrap());
            let mut back = vec![0; bytes.len()];
            let (sent, received) =
                tokio::join!(write.write_all(&bytes), read.read_exact(&mut back));
            sent.unwrap();
            received.unwrap();
            assert!(back == bytes, "the bytes differ");
        };
        tokio::join!(exchange(&one), exchange(&other));
        assert!(one.close(soon()).await.is_clean());
        assert!(other.close(soon()).await.is_clean());
        assert!(leases.held().is_empty());
    });
}

#[test]
fn l7_a_host_reaches_itself_as_the_host_and_as_local() {
    if !Path::new("/dev/vhost-vsock").exists() {
        println!("SKIP: this machine has no guests over AF_VSOCK");
        return;
    }
    with_loopback(async {
        assert_eq!(vsock::get_local_cid().unwrap(), Cid::HOST.0);
        for cid in [LOCAL, Cid::HOST] {
            let leases = LeaseSet::new("vm");
            // Whichever it dials, it comes as local.
            let listener = VsockListener::bind_vsock(None, LOCAL, leases.clone()).unwrap();
            let address = GuestAddress::Vsock { cid };
            let dialled = address.dial(listener.port(), lease(&leases), soon());
            let (dialled, accepted) = tokio::join!(dialled, listener.accept());
            let (dialled, accepted) = (dialled.unwrap(), accepted.unwrap());
            dialled.io().unwrap().write_all(b"x").await.unwrap();
            assert_eq!(accepted.io().unwrap().read_u8().await.unwrap(), b'x');
            for transport in [dialled, accepted] {
                assert!(transport.close(soon()).await.is_clean());
            }
            assert!(listener.close().is_clean());
        }
    });
}

#[test]
fn l3_close_wakes_a_blocked_reader_and_a_blocked_writer() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let (one, other) = connected(&leases).await;
        let (mut reads, mut writes) = (one.io().unwrap(), other.io().unwrap());
        let writer = tokio::spawn(async move { writes.write_all(&vec![0; 64 << 20]).await });
        // It is under way, and nobody reads on.
        reads.read_exact(&mut vec![0; 1 << 20]).await.unwrap();
        assert!(other.close(soon()).await.is_clean());
        assert!(writer.await.unwrap().is_err());
        // What was under way comes, and then the end of it.
        reads.read_to_end(&mut Vec::new()).await.unwrap();
        drop(reads);
        assert!(one.close(soon()).await.is_clean());

        let (one, other) = connected(&leases).await;
        let mut reads = one.io().unwrap();
        let (blocked, begun) = tokio::sync::oneshot::channel();
        let reader = tokio::spawn(async move {
            blocked.send(()).unwrap();
            reads.read(&mut [0]).await
        });
        begun.await.unwrap();
        assert!(one.close(soon()).await.is_clean());
        let error = reader.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
        assert!(other.close(soon()).await.is_clean());
        assert!(leases.held().is_empty());
    });
}

#[test]
fn l5_a_connection_that_nobody_used_for_a_while_is_usable() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let (one, other) = connected(&leases).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        one.io().unwrap().write_all(b"x").await.unwrap();
        assert_eq!(other.io().unwrap().read_u8().await.unwrap(), b'x');
        assert!(one.close(soon()).await.is_clean());
        assert!(other.close(soon()).await.is_clean());
    });
}

#[test]
fn l5_a_port_without_a_listener_and_an_absent_vm_are_errors_at_once() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let began = Instant::now();
        let closed = dial(&leases, VsockPort(0x7fff_0001)).await.unwrap_err();
        assert!(matches!(closed, TransportError::Dial { .. }), "{closed}");
        let gone = GuestAddress::Vsock { cid: ABSENT };
        let absent = gone.dial(VsockPort::SESSIONS, lease(&leases), soon()).await;
        let absent = absent.unwrap_err();
        let TransportError::Dial { source, .. } = &absent else {
            panic_with(&absent)
        };
        assert_eq!(source.raw_os_error(), Some(libc::ENODEV), "{source}");
        assert!(began.elapsed() < Duration::from_secs(5));
        assert!(leases.held().is_empty(), "a failed dial keeps its lease");
    });
}

fn panic_with(error: &TransportError) -> ! {
    unreachable!("{error:?}")
}

#[test]
fn l7_a_peer_of_another_vm_is_refused_and_the_listener_goes_on() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let listener = VsockListener::bind_vsock(None, Cid(77), leases.clone()).unwrap();
        let stranger = dial(&leases, listener.port()).await.unwrap();
        let refused = async {
            let mut io = stranger.io().unwrap();
            io.read(&mut [0]).await
        };
        tokio::select! {
            accepted = listener.accept() => unreachable!("{accepted:?}"),
            read = refused => assert!(matches!(read, Ok(0) | Err(_)), "{read:?}"),
        }
        assert!(stranger.close(soon()).await.is_clean());
        assert!(listener.close().is_clean());
    });
}

#[test]
fn l10_a_stopping_vm_takes_no_connection() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let listener = VsockListener::bind_vsock(None, LOCAL, leases.clone()).unwrap();
        let dialling = lease(&leases);
        leases.close();
        let address = GuestAddress::Vsock { cid: LOCAL };
        let (dialled, accepted) = tokio::join!(
            address.dial(listener.port(), dialling, soon()),
            listener.accept()
        );
        assert!(matches!(
            accepted.unwrap_err(),
            TransportError::Closing(Closing { .. })
        ));
        if let Ok(transport) = dialled {
            assert!(transport.close(soon()).await.is_clean());
        }
        assert!(leases.held().is_empty());
    });
}

#[test]
fn a_session_ends_with_its_exit_code_and_the_rest_of_its_bytes() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let (host, guest) = connected(&leases).await;
        let token = token();
        let target = SessionTarget::Forward { port: 80 };
        let serve = async {
            let incoming = receive_session(guest, &token, soon()).await.unwrap();
            let mut session = incoming.accept(soon()).await.unwrap();
            let mut asked = Vec::new();
            session.input.read_to_end(&mut asked).await.unwrap();
            session.output.write_all(&asked).await.unwrap();
            session.output.shutdown().await.unwrap();
            session.error.shutdown().await.unwrap();
            session.handle.send_exit(7);
            session.handle.closed().await;
            assert!(session.handle.close(soon()).await.is_clean());
        };
        let ask = async {
            let mut session = open_session(host, &token, &target, soon()).await.unwrap();
            let bytes = vec![b'z'; 3 << 20];
            let (mut input, mut output) = (session.input, session.output);
            let send = async {
                input.write_all(&bytes).await.unwrap();
                input.shutdown().await.unwrap();
            };
            let mut back = Vec::new();
            let (read, ()) = tokio::join!(output.read_to_end(&mut back), send);
            assert_eq!(read.unwrap(), bytes.len());
            session.error.read_to_end(&mut Vec::new()).await.unwrap();
            assert_eq!(session.handle.exit().await.unwrap(), 7);
            assert!(session.handle.close(soon()).await.is_clean());
        };
        tokio::join!(serve, ask);
        assert!(leases.held().is_empty());
    });
}

#[test]
fn l8_a_forwarded_connection_half_closes_and_is_reset() {
    with_loopback(async {
        let bytes: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
        for cut in [false, true] {
            let leases = LeaseSet::new("vm");
            let (host, guest) = session(&leases).await;
            let ((mut client, local), (mut server, to_server)) = tokio::join!(tcp(), tcp());
            let relays = async {
                tokio::join!(
                    host.relay_until(local, pending(), pending()),
                    guest.relay(to_server, pending())
                )
            };
            let talk = async {
                let ask = async {
                    client.write_all(&bytes).await.unwrap();
                    client.shutdown().await.unwrap();
                };
                let mut asked = Vec::new();
                let (read, ()) = tokio::join!(server.read_to_end(&mut asked), ask);
                read.unwrap();
                assert!(asked == bytes, "the question differs");
                if cut {
                    reset(server);
                    let error = client.read_u8().await.unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
                    return;
                }
                let answer = async {
                    server.write_all(&bytes).await.unwrap();
                    server.shutdown().await.unwrap();
                };
                let mut answered = Vec::new();
                let (read, ()) = tokio::join!(client.read_to_end(&mut answered), answer);
                read.unwrap();
                assert!(answered == bytes, "the answer differs");
            };
            let ((host, guest), ()) = tokio::join!(relays, talk);
            assert!(host.closed.is_clean() && guest.closed.is_clean());
            assert_eq!((host.cut.is_some(), guest.cut.is_some()), (cut, cut));
            assert!(leases.held().is_empty());
        }
    });
}

#[test]
fn l9_close_ends_every_waiter_and_then_the_transport() {
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let (mut host, guest) = session(&leases).await;
        let mut output = host.output;
        let reader = tokio::spawn(async move { output.read(&mut [0; 16]).await });
        let writer = tokio::spawn(async move { host.input.write_all(&vec![0; 8 << 20]).await });
        let report = host.handle.close(soon()).await;
        assert!(report.is_clean(), "{report}");
        let steps: Vec<_> = report.steps().map(|(step, _)| step).collect();
        assert_eq!(steps, ["session", "transport"], "the streams first");
        let ended = reader.await.unwrap().unwrap_err();
        assert_eq!(ended.kind(), ErrorKind::ConnectionReset);
        let cut = writer.await.unwrap().unwrap_err();
        assert_eq!(cut.kind(), ErrorKind::BrokenPipe);
        assert!(guest.handle.close(soon()).await.is_clean());
        assert!(leases.held().is_empty());
    });
}

/// Bytes by hand: a frame's kind, stream, two zeros, the length.
#[test]
fn bad_input_ends_its_own_session_and_no_other() {
    const HELLO: u8 = 1;
    const ACCEPT: u8 = 2;
    const DATA: u8 = 4;
    with_loopback(async {
        let leases = LeaseSet::new("vm");
        let (mut good, mut good_guest) = session(&leases).await;
        let greeting = |token: u8| {
            let payload = [&[1, 0][..], &[token; Token::LEN], &[2, 80, 0]].concat();
            let length = u32::try_from(payload.len()).unwrap().to_le_bytes();
            [&[HELLO, 0, 0, 0][..], &length, &payload].concat()
        };
        for (what, bytes) in [
            ("a wrong token", greeting(4)),
            ("no greeting", vec![DATA, 1, 0, 0, 1, 0, 0, 0, b'x']),
            ("another protocol", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
            ("an endless frame", vec![HELLO, 0, 0, 0, 255, 255, 255, 255]),
        ] {
            let (bad, guest) = connected(&leases).await;
            bad.io().unwrap().write_all(&bytes).await.unwrap();
            let received = receive_session(guest, &token(), soon()).await;
            assert!(received.is_err(), "{what} gets a session");
            let mut said = Vec::new();
            // An end, or a reset: what was not read is gone.
            drop(bad.io().unwrap().read_to_end(&mut said).await);
            assert_eq!(said, [], "{what} gets an answer");
            assert!(bad.close(soon()).await.is_clean());
        }
        // A guest that breaks the rules once it has a session: bytes of no stream.
        let (host, bad) = connected(&leases).await;
        let accept = [ACCEPT, 0, 0, 0, 0, 0, 0, 0];
        let breach = [DATA, 9, 0, 0, 1, 0, 0, 0, b'x'];
        let mut io = bad.io().unwrap();
        io.write_all(&[&accept[..], &breach].concat())
            .await
            .unwrap();
        let target = SessionTarget::Forward { port: 80 };
        let mut host = open_session(host, &token(), &target, soon()).await.unwrap();
        assert!(host.output.read(&mut [0]).await.is_err());
        let lost = host.handle.exit().await.unwrap_err();
        assert!(matches!(lost, SessionError::Protocol { .. }), "{lost:?}");
        drop((io, host.handle.close(soon()).await));
        assert!(bad.close(soon()).await.is_clean());

        good.input.write_all(b"still").await.unwrap();
        let mut word = [0; 5];
        good_guest.input.read_exact(&mut word).await.unwrap();
        assert_eq!(&word, b"still");
        assert!(good.handle.close(soon()).await.is_clean());
        assert!(good_guest.handle.close(soon()).await.is_clean());
        assert!(leases.held().is_empty());
    });
}
