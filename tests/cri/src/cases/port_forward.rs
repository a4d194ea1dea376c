// SPDX-License-Identifier: Apache-2.0
//! Ports of a pod's loopback, as `kubectl port-forward` reaches them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use futures::future::try_join_all;
use nix::sys::socket::{setsockopt, sockopt};
use podhull_testkit::oracle::descriptors;
use podhull_testkit::pod_netns;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::case::{cases, contains, same};
use crate::context::Context;
use crate::peer::{SIZE, Spdy, WebSocket, echoes, is_reset, numbers, rest, serve, sum};
use crate::procfs::{Processes, Role};

cases! {
    ALL:
        forward_reaches_servers_wherever_they_listen,
        forward_to_a_closed_port_fails_at_once;
    ALL_TWICE:
        forward_of_a_hundred_connections_is_whole,
        forward_of_a_thousand_connections_in_a_row_does_not_end,
        forward_half_closed_goes_on_to_the_end,
        forward_half_closed_through_containerd_is_as_with_runc,
        forward_reset_reaches_the_other_side,
        forward_ends_with_its_pod;
    // runc's pods have no listener of their own.
    PODHULL_TWICE:
        forward_to_the_listeners_own_port_does_not_loop;
}

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
const WITHIN: Duration = Duration::from_secs(20);
/// A refusal is told by a client at once; containerd waits a second for the
/// client's own end once the server's side has failed.
const AT_ONCE: Duration = Duration::from_secs(1);
const CONTAINERD_WAITS: Duration = Duration::from_secs(1);

async fn forward_reaches_servers_wherever_they_listen(t: &Context) -> Result<()> {
    const PORTS: [u16; 4] = [8001, 8002, 8003, 8004];
    let pod = t.ready_pod().await?;
    let servers = [
        "echo=0.0.0.0:8001",
        "echo=127.0.0.1:8002",
        "echo=[::]:8003",
        "echo=[::1]:8004",
    ];
    serve(t, &pod, "server", &servers).await?;
    for port in PORTS {
        let spdy = Spdy::forward(t, &pod, port).await?;
        let over = async {
            echoes(&mut spdy.connect().await?, b"over SPDY").await?;
            echoes(&mut spdy.connect().await?, &numbers(100_000)).await
        };
        over.await
            .with_context(|| format!("port {port} over SPDY"))?;
        let said = spdy.end().await?;
        same!(said, "", "what the client says of port {port}");
    }
    // All of them over one connection, then the same again.
    for round in 0..2 {
        let mut socket = WebSocket::forward(t, &pod, &PORTS).await?;
        let texts: Vec<_> = PORTS
            .iter()
            .map(|port| format!("{port} over a WebSocket, {round}"))
            .collect();
        for (index, text) in (0..).zip(&texts) {
            socket.send(index, text.as_bytes()).await?;
        }
        let whole = socket
            .until(|ports| {
                ports
                    .iter()
                    .zip(&texts)
                    .all(|(port, text)| port.data.len() >= text.len())
            })
            .await?;
        ensure!(whole, "ended with {socket:?}");
        for (index, text) in texts.iter().enumerate() {
            let port = socket.port(index)?;
            same!(String::from_utf8_lossy(&port.data), *text);
            same!(String::from_utf8_lossy(&port.error), "");
        }
    }
    Ok(())
}

async fn forward_to_a_closed_port_fails_at_once(t: &Context) -> Result<()> {
    const CLOSED: u16 = 9;
    let pod = t.ready_pod().await?;
    serve(t, &pod, "server", &["echo=127.0.0.1:8001"]).await?;
    let namespace = pod_netns::open()?;
    for address in [V4, V6] {
        let begin = Instant::now();
        // Where the server is in the namespace, it is refused before.
        if let Ok(mut stream) = pod_netns::connect(&namespace, address, CLOSED).await {
            ensure!(t.is_podhull(), "something listens at {address}");
            is_reset(&mut stream).await?;
        }
        let took = begin.elapsed();
        ensure!(took < AT_ONCE, "{address} failed only after {took:?}");
    }

    let spdy = Spdy::forward(t, &pod, CLOSED).await?;
    let begin = Instant::now();
    let mut stream = spdy.connect().await?;
    let came = rest(&mut stream).await.unwrap_or_default();
    same!(came.len(), 0, "bytes from a closed port");
    let took = begin.elapsed();
    ensure!(
        took < AT_ONCE + CONTAINERD_WAITS,
        "failed only after {took:?}"
    );
    let said = spdy.end().await?;
    contains!(&said, &format!("error forwarding port {CLOSED}"));
    ensure!(said.contains("refused") || said.contains("reset"), "{said}");

    let begin = Instant::now();
    let mut socket = WebSocket::forward(t, &pod, &[CLOSED, 8001]).await?;
    let told = socket
        .until(|ports| ports.first().is_some_and(|port| !port.error.is_empty()))
        .await?;
    let took = begin.elapsed();
    ensure!(told, "ended without an error: {socket:?}");
    ensure!(
        took < AT_ONCE + CONTAINERD_WAITS,
        "told only after {took:?}"
    );
    let said = String::from_utf8_lossy(&socket.port(0)?.error).into_owned();
    ensure!(said.contains("refused") || said.contains("reset"), "{said}");
    // The others of the same WebSocket, and new ones, are not affected.
    socket.send(1, b"still here").await?;
    let back = socket
        .until(|ports| ports.get(1).is_some_and(|port| port.data == b"still here"))
        .await?;
    ensure!(back, "{socket:?}");
    echoes(
        &mut pod_netns::connect(&namespace, V4, 8001).await?,
        b"and here",
    )
    .await
}

async fn forward_of_a_hundred_connections_is_whole(t: &Context) -> Result<()> {
    const EACH: usize = 64 << 10;
    let pod = t.ready_pod().await?;
    serve(t, &pod, "server", &["echo=127.0.0.1:8001"]).await?;
    let spdy = Spdy::forward(t, &pod, 8001).await?;
    // All are open before the first byte is sent.
    let mut streams = Vec::new();
    for _ in 0..100 {
        streams.push(spdy.connect().await?);
    }
    let bytes = numbers(EACH + 100 * 4);
    let bytes = &bytes;
    let echoing = streams
        .iter_mut()
        .enumerate()
        .map(|(index, stream)| async move {
            let own = &bytes[4 * index..4 * index + EACH];
            echoes(stream, own)
                .await
                .with_context(|| format!("connection {index}"))
        });
    try_join_all(echoing).await?;
    drop(streams);
    same!(spdy.end().await?, "", "what the client says");
    Ok(())
}

/// The vsock daemon numbers a pod's connections, and once met a number of ours.
async fn forward_of_a_thousand_connections_in_a_row_does_not_end(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    serve(t, &pod, "server", &["echo=127.0.0.1:8001"]).await?;
    let namespace = pod_netns::open()?;
    for number in 0..1100 {
        let mut stream = pod_netns::connect(&namespace, V4, 8001).await?;
        echoes(&mut stream, b"hello")
            .await
            .with_context(|| format!("connection {number}"))?;
    }
    Ok(())
}

/// Sends everything, ends its side, and checks the server's answer.
async fn sinks(mut stream: TcpStream, bytes: &[u8]) -> Result<()> {
    stream.write_all(bytes).await?;
    stream.shutdown().await?;
    let answer = rest(&mut stream).await?;
    same!(
        String::from_utf8_lossy(&answer).trim().to_owned(),
        sum(bytes)
    );
    Ok(())
}

async fn forward_half_closed_goes_on_to_the_end(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let servers = [
        "echo=127.0.0.1:8001",
        "sink=127.0.0.1:8002",
        "sink=[::1]:8003",
        "source=127.0.0.1:8004",
        "half=127.0.0.1:8005",
        "late=127.0.0.1:8006",
    ];
    let server = serve(t, &pod, "server", &servers).await?;
    let namespace = pod_netns::open()?;
    let bytes = numbers(SIZE + 3);

    sinks(pod_netns::connect(&namespace, V4, 8002).await?, &bytes)
        .await
        .context("sink")?;
    sinks(pod_netns::connect(&namespace, V6, 8003).await?, &bytes)
        .await
        .context("sink over IPv6")?;
    sinks(pod_netns::connect(&namespace, V4, 8002).await?, b"")
        .await
        .context("sink of nothing")?;

    let mut stream = pod_netns::connect(&namespace, V4, 8004).await?;
    ensure!(
        rest(&mut stream).await? == numbers(SIZE),
        "the source's bytes differ"
    );

    // The server ends first, the client goes on.
    let mut stream = pod_netns::connect(&namespace, V4, 8005).await?;
    ensure!(
        rest(&mut stream).await? == numbers(SIZE),
        "the half's bytes differ"
    );
    stream.write_all(&bytes).await?;
    stream.shutdown().await?;
    server
        .wrote(&format!("half end {}", sum(&bytes)), WITHIN)
        .await?;

    // A server that does not read holds up nobody else.
    let much = numbers(8 << 20);
    let slow = async {
        let stream = pod_netns::connect(&namespace, V4, 8006).await?;
        sinks(stream, &much).await.context("late")
    };
    let others = async {
        let begin = Instant::now();
        echoes(&mut pod_netns::connect(&namespace, V4, 8001).await?, &bytes).await?;
        anyhow::Ok(begin.elapsed())
    };
    let ((), took) = tokio::try_join!(slow, others)?;
    ensure!(took < Duration::from_secs(2), "held up for {took:?}");
    Ok(())
}

async fn forward_half_closed_through_containerd_is_as_with_runc(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let servers = [
        "sink=127.0.0.1:8001",
        "source=127.0.0.1:8002",
        "half=127.0.0.1:8003",
    ];
    let server = serve(t, &pod, "server", &servers).await?;
    let bytes = numbers(100_000);

    let spdy = Spdy::forward(t, &pod, 8002).await?;
    ensure!(
        rest(&mut spdy.connect().await?).await? == numbers(SIZE),
        "the source's bytes differ"
    );
    same!(spdy.end().await?, "", "what the client says of a source");

    // containerd does not pass a client's end on: it closes a second later, and
    // the answer finds nobody.
    let spdy = Spdy::forward(t, &pod, 8001).await?;
    let mut stream = spdy.connect().await?;
    stream.write_all(&bytes).await?;
    stream.shutdown().await?;
    let answer = rest(&mut stream).await.unwrap_or_default();
    same!(String::from_utf8_lossy(&answer), "");
    server
        .wrote(&format!("sink end {}", sum(&bytes)), WITHIN)
        .await?;
    spdy.end().await?;

    let spdy = Spdy::forward(t, &pod, 8003).await?;
    let mut stream = spdy.connect().await?;
    ensure!(
        rest(&mut stream).await? == numbers(SIZE),
        "the half's bytes differ"
    );
    server
        .wrote(&format!("half end {}", sum(b"")), WITHIN)
        .await?;
    spdy.end().await?;
    Ok(())
}

async fn forward_reset_reaches_the_other_side(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let servers = ["reset=127.0.0.1:8001", "echo=127.0.0.1:8002"];
    let server = serve(t, &pod, "server", &servers).await?;
    let namespace = pod_netns::open()?;

    let mut stream = pod_netns::connect(&namespace, V4, 8001).await?;
    stream.write_all(b"x").await?;
    is_reset(&mut stream)
        .await
        .context("a server that resets")?;

    let mut stream = pod_netns::connect(&namespace, V4, 8002).await?;
    echoes(&mut stream, b"some").await?;
    let at_once = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&stream, sockopt::Linger, &at_once)?;
    drop(stream);
    server
        .wrote(&format!("echo reset {}", sum(b"some")), WITHIN)
        .await
        .context("a client that resets")?;

    let spdy = Spdy::forward(t, &pod, 8001).await?;
    let mut stream = spdy.connect().await?;
    stream.write_all(b"x").await?;
    let came = rest(&mut stream).await.unwrap_or_default();
    same!(came.len(), 0, "bytes from a server that resets");
    contains!(spdy.end().await?, "reset");
    Ok(())
}

async fn forward_ends_with_its_pod(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    serve(
        t,
        &pod,
        "server",
        &["echo=127.0.0.1:8001", "sink=127.0.0.1:8002"],
    )
    .await?;
    let namespace = pod_netns::open()?;
    let spdy = Spdy::forward(t, &pod, 8001).await?;
    let (mut idle, mut busy) = (spdy.connect().await?, spdy.connect().await?);
    let mut near = pod_netns::connect(&namespace, V4, 8002).await?;
    echoes(&mut idle, b"some").await?;
    near.write_all(b"some").await?;
    let moving = async {
        let bytes = numbers(100_000);
        while echoes(&mut busy, &bytes).await.is_ok() {}
        Instant::now()
    };
    let begin = Instant::now();
    let stopping = async {
        pod.stop().await?;
        anyhow::Ok(Instant::now())
    };
    let (stopped, moved) = tokio::join!(stopping, moving);
    let (stop, moved) = (stopped? - begin, moved - begin);
    ensure!(stop < Duration::from_secs(7), "stopping took {stop:?}");
    ensure!(
        moved < stop + CONTAINERD_WAITS + AT_ONCE,
        "stopped in {stop:?}, the client's end came after {moved:?}"
    );
    for stream in [&mut idle, &mut near] {
        // An end or a reset: but not silence.
        let mut byte = [0];
        let read = tokio::io::AsyncReadExt::read(stream, &mut byte);
        let read = tokio::time::timeout(AT_ONCE + CONTAINERD_WAITS, read).await;
        let read = read.context("an open connection hears nothing")?;
        ensure!(!matches!(read, Ok(1)), "bytes after the end");
    }
    spdy.end().await?;
    // The namespace lives as long as this descriptor: what was made in it is seen.
    let (rules, listeners) = pod_netns::inside(&namespace, || {
        let output = std::process::Command::new("nft")
            .args(["list", "ruleset"])
            .output()?;
        let rules = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok((rules, listeners()?))
    })
    .await?;
    ensure!(!rules.contains("podhull"), "left: {rules}");
    same!(listeners, Vec::<u16>::new(), "listeners that are left");
    Ok(())
}

/// The ports at which something listens on IPv4, in this thread's namespace.
fn listeners() -> Result<Vec<u16>> {
    const LISTEN: &str = "0A";
    let text = std::fs::read_to_string("/proc/thread-self/net/tcp")?;
    let lines = text.lines().skip(1).map(|line| line.split_whitespace());
    let mut ports = Vec::new();
    for mut fields in lines {
        let (local, state) = (
            fields.nth(1).context("local")?,
            fields.nth(1).context("state")?,
        );
        if state == LISTEN {
            let (_, port) = local.split_once(':').context("port")?;
            ports.push(u16::from_str_radix(port, 16)?);
        }
    }
    Ok(ports)
}

async fn forward_to_the_listeners_own_port_does_not_loop(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let namespace = pod_netns::open()?;
    let ports = pod_netns::inside(&namespace, listeners).await?;
    let [port] = ports[..] else {
        bail!("not one listener: {ports:?}")
    };
    for address in [V4, V6] {
        let begin = Instant::now();
        is_reset(&mut pod_netns::connect(&namespace, address, port).await?).await?;
        let took = begin.elapsed();
        ensure!(took < AT_ONCE, "{address} failed only after {took:?}");
    }
    // It is the guest's port of this number that is meant.
    serve(t, &pod, "server", &[&format!("echo=127.0.0.1:{port}")]).await?;
    let shim = Processes::of(pod.id())?.pid(Role::Shim)?;
    let before = descriptors(shim)?;
    echoes(
        &mut pod_netns::connect(&namespace, V4, port).await?,
        b"some",
    )
    .await?;
    let by = Instant::now() + WITHIN;
    loop {
        let now = descriptors(shim)?;
        let sockets = |of: &std::collections::BTreeMap<String, usize>| of.get("socket:").copied();
        if sockets(&now) <= sockets(&before) {
            return Ok(());
        }
        ensure!(
            Instant::now() < by,
            "descriptors: {now:#?}, before: {before:#?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
