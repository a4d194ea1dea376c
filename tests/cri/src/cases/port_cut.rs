// SPDX-License-Identifier: Apache-2.0
//! Forwarded connections that are reset with bytes on their way.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use podhull_testkit::pod_netns;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::case::{cases, same};
use crate::context::Context;
use crate::peer::{ANSWER, SIZE, Spdy, numbers, rest, rest_to_reset, serve, sum};

cases! {
    ALL_TWICE:
        forward_answered_before_all_was_asked_is_whole,
        forward_reset_with_bytes_on_their_way_cuts_only_those;
}

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const WITHIN: Duration = Duration::from_secs(20);

/// Reads what has come so far, and makes the server go on.
async fn read_some(stream: &mut TcpStream, count: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; count];
    let read = tokio::time::timeout(WITHIN, stream.read_exact(&mut bytes)).await;
    read.context("the server's bytes do not come")??;
    stream.write_all(b"x").await?;
    Ok(bytes)
}

async fn forward_reset_with_bytes_on_their_way_cuts_only_those(t: &Context) -> Result<()> {
    const SOME: usize = 100_000;
    let pod = t.ready_pod().await?;
    let servers = ["cut=127.0.0.1:8001", "late=127.0.0.1:8002"];
    let server = serve(t, &pod, "server", &servers).await?;
    let namespace = pod_netns::open()?;

    // The server resets: what has arrived is whole, then the client sees a reset.
    let mut stream = pod_netns::connect(&namespace, V4, 8001).await?;
    let mut came = read_some(&mut stream, SOME).await?;
    came.extend(
        rest_to_reset(&mut stream)
            .await
            .context("a server that resets")?,
    );
    ensure!(
        numbers(SIZE).starts_with(&came),
        "the server's bytes differ"
    );

    // containerd has no reset for its client, but an end.
    let spdy = Spdy::forward(t, &pod, 8001).await?;
    let mut stream = spdy.connect().await?;
    let mut came = read_some(&mut stream, SOME).await?;
    // Bytes that came before an error are not told apart from none.
    came.extend(rest(&mut stream).await.unwrap_or_default());
    ensure!(
        numbers(SIZE).starts_with(&came),
        "the server's bytes differ over SPDY"
    );
    spdy.end().await?;

    // The client resets, and the server has not begun to read.
    let bytes = numbers(2 * SOME);
    let mut stream = pod_netns::connect(&namespace, V4, 8002).await?;
    stream.write_all(&bytes).await?;
    let at_once = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&stream, sockopt::Linger, &at_once)?;
    drop(stream);
    let log = server.wrote("late reset ", WITHIN).await?.text();
    let line = log
        .lines()
        .find_map(|line| line.strip_prefix("late reset "));
    let line = line.context("no line of the server")?;
    let (count, _) = line.split_once(' ').context("no count")?;
    let count: usize = count.parse().context(line.to_owned())?;
    let seen = bytes.get(..count).context("more than was sent")?;
    same!(line, sum(seen), "what the server saw");
    Ok(())
}

/// As a web server does that refuses what is too large for it.
async fn forward_answered_before_all_was_asked_is_whole(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    serve(t, &pod, "server", &["early=127.0.0.1:8001"]).await?;
    let namespace = pod_netns::open()?;
    for round in 0..10 {
        let mut near = pod_netns::connect(&namespace, V4, 8001).await?;
        let came = answer(&mut near).await;
        let came = came.with_context(|| format!("{round}"))?;
        ensure!(came == numbers(ANSWER), "another answer");
        let asks = async { while near.write_all(b"more").await.is_ok() {} };
        tokio::time::timeout(WITHIN, asks)
            .await
            .context("who asks on is not hung up on")?;
        let spdy = Spdy::forward(t, &pod, 8001).await?;
        let came = answer(&mut spdy.connect().await?).await;
        let came = came.with_context(|| format!("{round} over SPDY"))?;
        ensure!(came == numbers(ANSWER), "another answer over SPDY");
        spdy.end().await?;
    }
    Ok(())
}

/// What is answered to more than the server reads. It is no more than containerd's
/// SPDY takes at once: with more it keeps the connection of a client that has gone.
async fn answer(stream: &mut TcpStream) -> Result<Vec<u8>> {
    const QUESTION: usize = 60_000;
    stream.write_all(&numbers(QUESTION)).await?;
    let mut bytes = vec![0; ANSWER];
    let read = tokio::time::timeout(WITHIN, stream.read_exact(&mut bytes)).await;
    let read = read.context("the answer does not come")?;
    read.context("the answer is cut")?;
    Ok(bytes)
}
