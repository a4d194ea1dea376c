// SPDX-License-Identifier: Apache-2.0
//! Who is not the shim, and talks to the agent.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use crate::case::{Skip, cases, contains, same};
use crate::context::Context;
use crate::stream::Session;

cases! {
    PODHULL_ONCE:
        stranger_without_the_token_gets_nowhere;
}

const WITHIN: Duration = Duration::from_secs(20);
/// Longer than the agent waits for a connection's first words, emulated.
const AGENT_WAITS: Duration = Duration::from_secs(60);
/// Where the agent takes sessions (`VsockPort::SESSIONS`).
const SESSIONS: u32 = 1025;
/// Frames (`pkg/transport/src/session/frame.rs`).
const HELLO: u8 = 1;
const DATA: u8 = 4;

/// The pod's socket, through which its guest is reached without vhost-vsock.
fn socket() -> Result<PathBuf> {
    let mut folders = fs::read_dir("/run/podhull").context("podhull's run folder")?;
    let folder = folders.next().context("no pod has a run folder")??.path();
    ensure!(folders.next().is_none(), "there is more than one pod");
    let socket = folder.join("vm/vsock");
    if !socket.exists() {
        return Err(Skip("the guest is reached through the kernel's vsock here".into()).into());
    }
    Ok(socket)
}

/// A connection to `port` of the guest; `None` if nobody listens there.
async fn connect(port: u32) -> Result<Option<UnixStream>> {
    let mut stream = UnixStream::connect(socket()?).await?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await?;
    let mut answer = Vec::new();
    loop {
        match stream.read_u8().await {
            Ok(b'\n') => break,
            Ok(byte) => answer.push(byte),
            Err(_) => return Ok(None),
        }
    }
    contains!(String::from_utf8_lossy(&answer), "OK ");
    Ok(Some(stream))
}

/// What the agent says to `words`, until it hangs up.
async fn answer(words: &[u8], within: Duration) -> Result<Vec<u8>> {
    let mut stream = connect(SESSIONS).await?.context("nobody takes sessions")?;
    // It may hang up before it has read all of it.
    let _ = stream.write_all(words).await;
    let mut said = Vec::new();
    let reading = async {
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
            said.extend_from_slice(&buffer[..count]);
        }
    };
    tokio::time::timeout(within, reading)
        .await
        .context("the agent does not hang up")?;
    Ok(said)
}

fn frame(kind: u8, payload: &[u8]) -> Result<Vec<u8>> {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend(u32::try_from(payload.len())?.to_le_bytes());
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// Asks for the streams of `container`'s init process, with a token of ours.
fn hello(version: u16, container: &str) -> Result<Vec<u8>> {
    let id = container.as_bytes();
    let parts = [
        &version.to_le_bytes()[..],
        &[7; 32],
        &[1, u8::try_from(id.len())?],
        id,
        &[0],
    ];
    frame(HELLO, &parts.concat())
}

async fn stranger_without_the_token_gets_nowhere(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let mut session = Session::exec(&container, &["cat"], false).await?;
    session.ask("before\n", "before\n").await?;
    let hello_then_data = [hello(1, container.id())?, frame(DATA, b"echo pwned\n")?].concat();
    for (what, words, within) in [
        ("a wrong token", hello(1, container.id())?, WITHIN),
        ("a wrong token, and bytes", hello_then_data, WITHIN),
        ("a version to come", hello(2, container.id())?, WITHIN),
        ("no HELLO", frame(DATA, b"echo pwned\n")?, WITHIN),
        (
            "another protocol",
            b"GET / HTTP/1.1\r\nHost: guest\r\n\r\n".to_vec(),
            WITHIN,
        ),
        (
            "the promise of a frame",
            vec![HELLO, 0, 0, 0, 255, 255, 255, 255],
            WITHIN,
        ),
        (
            "half of a HELLO",
            hello(1, container.id())?[..20].to_vec(),
            AGENT_WAITS,
        ),
        ("silence", Vec::new(), AGENT_WAITS),
    ] {
        let said = answer(&words, within).await.context(what)?;
        same!(said, Vec::<u8>::new(), "the agent answers {what}");
    }
    for port in [1, 22, 1024, 1026, 2000] {
        ensure!(
            connect(port).await?.is_none(),
            "the guest listens at {port}"
        );
    }
    // Whoever was there has seen nothing of it.
    session.ask("after\n", "after\n").await?;
    session.close().await?;
    container.exec(["true"]).await?.success()?;
    ensure!(pod.is_ready().await?, "the pod has ended");
    Ok(())
}
