// SPDX-License-Identifier: Apache-2.0
//! What bad input gets before there is a session: none, and a named error, counted
//! and logged once; the others go on.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use podhull_transport::{open_session, receive_session};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use hostile::{
    ACCEPT, ALONE, HELLO, INPUT, OUTPUT, REFUSE, Side, Told, data, frame, header, hello, process,
    say, soon, target, token,
};

#[path = "shared/hostile.rs"]
mod hostile;

#[tokio::test]
async fn a_bad_greeting_gets_no_session_and_no_answer() {
    let _alone = ALONE.lock().await;
    let mut side = Side::new().await;
    let good = hello(1, 5, &process("c1", "e1"));
    let malformed = "protocol error: malformed HELLO frame";
    let cases: &[(&str, Vec<u8>, &str)] = &[
        (
            "wrong token",
            hello(1, 6, &process("c1", "e1")),
            "wrong token",
        ),
        (
            "other version",
            hello(2, 5, &process("c1", "e1")),
            "protocol error: protocol version 2, expected 1",
        ),
        (
            "a path for an id",
            hello(1, 5, &process("../c1", "")),
            "protocol error: container id \"../c1\" may only have letters, digits and single . _ - inside",
        ),
        (
            "no id",
            hello(1, 5, &process("", "")),
            "protocol error: container id is empty",
        ),
        (
            "a long id",
            hello(1, 5, &process(&"x".repeat(77), "")),
            "protocol error: container id is 77 bytes long, at most 76 are allowed",
        ),
        ("id not of text", hello(1, 5, &[1, 1, 0xff, 0]), malformed),
        ("unknown target", hello(1, 5, &[3, 0, 0]), malformed),
        ("half a port", hello(1, 5, &[2, 80]), malformed),
        ("more than a port", hello(1, 5, &[2, 80, 0, 0]), malformed),
        ("no target", hello(1, 5, &[]), malformed),
        ("empty", frame(HELLO, 0, &[]), malformed),
        (
            "too long",
            header(HELLO, 0, 1025),
            "protocol error: frame of 1025 bytes, at most 1024 are allowed",
        ),
        (
            "data first",
            data(INPUT, 1),
            "protocol error: unexpected DATA frame",
        ),
        (
            "garbage",
            b"SSH-2.0-x\r\n".to_vec(),
            "protocol error: unknown frame kind 83",
        ),
        (
            "cut",
            good[..good.len() - 1].to_vec(),
            "connection lost: ended in the handshake",
        ),
        ("silent", vec![], "connection lost: ended in the handshake"),
    ];
    for (name, bytes, error) in cases {
        let (transport, mut peer) = side.bad_peer();
        let lost = error.starts_with("connection lost");
        let session = async {
            say(&mut peer, bytes).await;
            if lost {
                peer.shutdown().await.unwrap();
            }
            receive_session(transport, &token(), soon()).await.map(drop)
        };
        let (told, refused) = Told::by(session).await;
        let expected = Told {
            token: u64::from(*error == "wrong token"),
            greeting: u64::from(error.starts_with("protocol error")),
            silence: u64::from(lost),
            warned: 1,
            ..Told::default()
        };
        assert_eq!(told, expected, "{name}");
        let refused = refused.unwrap_err();
        assert_eq!(refused.to_string(), *error, "{name}");
        let mut answer = Vec::new();
        peer.read_to_end(&mut answer).await.ok();
        assert!(answer.is_empty(), "{name}: learns nothing");
        side.goes_on(name).await;
    }
}

#[tokio::test]
async fn a_bad_answer_is_no_session() {
    let _alone = ALONE.lock().await;
    let mut side = Side::new().await;
    for (name, bytes, error) in [
        (
            "data",
            data(OUTPUT, 1),
            "protocol error: unexpected DATA frame",
        ),
        (
            "hello",
            hello(1, 5, &process("c1", "")),
            "protocol error: unexpected HELLO frame",
        ),
        (
            "long accept",
            header(ACCEPT, 0, 1),
            "protocol error: frame of 1 bytes, at most 0 are allowed",
        ),
    ] {
        let (transport, mut peer) = side.bad_peer();
        say(&mut peer, &bytes).await;
        let (token, target) = (token(), target());
        let opened = open_session(transport, &token, &target, soon());
        let (told, failed) = Told::by(opened).await;
        assert_eq!(told, Told::breach(), "{name}");
        let failed = failed.map(drop).unwrap_err();
        assert_eq!(failed.to_string(), error, "{name}");
        side.goes_on(name).await;
    }
}

/// As of a session id that does not exist: only the guest knows which do.
#[tokio::test]
async fn a_refused_session_is_counted_and_told_once_and_cannot_forge_a_line() {
    let _alone = ALONE.lock().await;
    let mut side = Side::new().await;
    let (transport, mut peer) = side.bad_peer();
    say(&mut peer, &frame(REFUSE, 0, b"no c1\n WARN forged")).await;
    let (token, target) = (token(), target());
    let opened = open_session(transport, &token, &target, soon());
    let (told, refused) = Told::by(opened).await;
    let expected = Told {
        refused: 1,
        warned: 1,
        ..Told::default()
    };
    assert_eq!(told, expected);
    let refused = refused.map(drop).unwrap_err().to_string();
    assert_eq!(refused, r#"session refused: "no c1\n WARN forged""#);
    side.goes_on("refused").await;
}
