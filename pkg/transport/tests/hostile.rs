// SPDX-License-Identifier: Apache-2.0
//! What bad input gets once a session is open: the session ends with a named
//! error, counted and logged once; the others go on.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use podhull_transport::{SessionError, open_session, receive_session};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use hostile::{
    ACCEPT, ALONE, CREDIT, DATA, EOF, ERROR, EXIT, INPUT, MAX_DATA, OUTPUT, REFUSE, STOP, Side,
    Told, WINDOW, data, frame, header, hello, process, say, soon, target, token,
};

#[path = "shared/hostile.rs"]
mod hostile;

#[tokio::test]
async fn a_bad_guest_ends_its_own_session_with_a_named_error() {
    let _alone = ALONE.lock().await;
    let mut side = Side::new().await;
    let ended = [frame(EOF, OUTPUT, &[]), frame(EOF, ERROR, &[])].concat();
    let cases: &[(&str, Vec<u8>, &str)] = &[
        (
            "too long",
            header(DATA, OUTPUT, MAX_DATA + 1),
            "frame of 65537 bytes, at most 65536 are allowed",
        ),
        (
            "endless",
            header(DATA, OUTPUT, u32::MAX as usize),
            "frame of 4294967295 bytes, at most 65536 are allowed",
        ),
        (
            "long exit",
            header(EXIT, 0, 2),
            "frame of 2 bytes, at most 1 are allowed",
        ),
        ("unknown kind", header(77, 0, 0), "unknown frame kind 77"),
        (
            "reserved bytes",
            vec![EOF, OUTPUT, 0, 1, 0, 0, 0, 0],
            "reserved bytes [00, 01] in a frame's header",
        ),
        ("kind 0", header(0, 0, 0), "unknown frame kind 0"),
        (
            "garbage",
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            "unknown frame kind 71",
        ),
        (
            "unknown stream",
            data(9, 1),
            "no stream 9 in this direction",
        ),
        ("wrong way", data(INPUT, 1), "no stream 0 in this direction"),
        (
            "credit for what it writes",
            frame(CREDIT, OUTPUT, &[1, 0, 0, 0]),
            "no stream 1 in this direction",
        ),
        (
            "stops what it writes",
            frame(STOP, ERROR, &[]),
            "no stream 2 in this direction",
        ),
        (
            "short credit",
            frame(CREDIT, INPUT, &[1]),
            "malformed CREDIT frame",
        ),
        ("empty exit", frame(EXIT, 0, &[]), "malformed EXIT frame"),
        (
            "credit overflow",
            frame(CREDIT, INPUT, &[1, 0, 0, 0]),
            "credit for stream 0 exceeds the window",
        ),
        (
            "credit overrun",
            data(OUTPUT, WINDOW + 7),
            "stream 1 overran its credit by 7 bytes",
        ),
        (
            "data after its end",
            [ended.clone(), data(OUTPUT, 1)].concat(),
            "unexpected DATA frame",
        ),
        (
            "two ends",
            [ended.clone(), frame(EOF, ERROR, &[])].concat(),
            "unexpected EOF frame",
        ),
        (
            "exit before the ends",
            frame(EXIT, 0, &[0]),
            "unexpected EXIT frame",
        ),
        (
            "two exits",
            [ended, frame(EXIT, 0, &[0]), frame(EXIT, 0, &[1])].concat(),
            "unexpected EXIT frame",
        ),
        (
            "accepts twice",
            frame(ACCEPT, 0, &[]),
            "unexpected ACCEPT frame",
        ),
        (
            "refuses late",
            frame(REFUSE, 0, b"no"),
            "unexpected REFUSE frame",
        ),
        (
            "hello from the guest",
            hello(1, 5, &process("c", "")),
            "unexpected HELLO frame",
        ),
    ];
    for (name, bytes, error) in cases {
        let (transport, mut peer) = side.bad_peer();
        let session = async {
            let bad = async {
                peer.read_exact(&mut [0; 8]).await.unwrap();
                say(&mut peer, &[frame(ACCEPT, 0, &[]), bytes.clone()].concat()).await;
                // Nor does it help to go on.
                say(&mut peer, &data(ERROR, 1)).await;
            };
            let (token, target) = (token(), target());
            let (opened, ()) = tokio::join!(open_session(transport, &token, &target, soon()), bad);
            let mut host = opened.unwrap();
            host.handle.closed().await;
            let read = host.output.read_to_end(&mut Vec::new()).await;
            let wrote = host.input.write(b"x").await.unwrap_err();
            let exit = host.handle.exit().await;
            (read, wrote, exit, host.handle.close(soon()).await)
        };
        let (told, (read, wrote, exit, closed)) = Told::by(session).await;
        assert_eq!(told, Told::breach(), "{name}");
        let expected = format!("protocol error: {error}");
        assert_eq!(wrote.to_string(), expected, "{name}");
        match exit {
            Err(error) => {
                assert_eq!(error.to_string(), expected, "{name}");
                let closed = closed.to_string();
                assert!(closed.contains(&expected), "{name}: {closed}");
            }
            // The code that came first, and all its output before it.
            Ok(code) => assert_eq!((code, *name, closed.is_clean()), (0, "two exits", true)),
        }
        let ended = ["data after its end", "two ends", "two exits"].contains(name);
        match read {
            Err(error) => assert_eq!(error.to_string(), expected, "{name}"),
            Ok(_) => assert!(ended, "{name}"),
        }
        side.goes_on(name).await;
    }
}

#[tokio::test]
async fn a_bad_host_ends_its_own_session_with_a_named_error() {
    let _alone = ALONE.lock().await;
    let mut side = Side::new().await;
    let good = hello(1, 5, &process("c1", ""));
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("hello twice", good.clone(), "unexpected HELLO frame"),
        ("exit", frame(EXIT, 0, &[0]), "unexpected EXIT frame"),
        ("stdout", data(OUTPUT, 1), "no stream 1 in this direction"),
        (
            "stdin overrun",
            data(INPUT, WINDOW + 1),
            "stream 0 overran its credit by 1 bytes",
        ),
        (
            "credit overflow",
            frame(CREDIT, ERROR, &[255; 4]),
            "credit for stream 2 exceeds the window",
        ),
    ];
    for (name, bytes, error) in cases {
        let (transport, mut peer) = side.bad_peer();
        let session = async {
            say(&mut peer, &good).await;
            let incoming = receive_session(transport, &token(), soon()).await.unwrap();
            let mut guest = incoming.accept(soon()).await.unwrap();
            say(&mut peer, bytes).await;
            guest.handle.closed().await;
            let wrote = guest.output.write(b"x").await.unwrap_err();
            (wrote, guest.handle.close(soon()).await)
        };
        let (told, (wrote, closed)) = Told::by(session).await;
        assert_eq!(told, Told::breach(), "{name}");
        let expected = format!("protocol error: {error}");
        assert_eq!(wrote.to_string(), expected, "{name}");
        let closed = closed.to_string();
        assert!(closed.contains(&expected), "{name}: {closed}");
        side.goes_on(name).await;
    }
}

/// A connection that ends within a frame is lost, not a breach of the protocol.
#[tokio::test]
async fn half_a_frame_is_a_lost_connection() {
    let _alone = ALONE.lock().await;
    let mut side = Side::new().await;
    let (transport, mut peer) = side.bad_peer();
    let half = [
        frame(ACCEPT, 0, &[]),
        header(DATA, OUTPUT, 100),
        vec![0; 50],
    ]
    .concat();
    say(&mut peer, &half).await;
    peer.shutdown().await.unwrap();
    let (token, target) = (token(), target());
    let lost = async {
        let host = open_session(transport, &token, &target, soon())
            .await
            .unwrap();
        let exit = host.handle.exit().await;
        assert!(host.handle.close(soon()).await.steps().count() > 0);
        exit
    };
    let (told, lost) = Told::by(lost).await;
    assert_eq!(told, Told::default());
    assert!(matches!(lost, Err(SessionError::Lost(_))), "{lost:?}");
    side.goes_on("half").await;
}
