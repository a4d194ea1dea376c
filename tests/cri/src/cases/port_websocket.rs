// SPDX-License-Identifier: Apache-2.0
//! Ports that are forwarded over WebSockets, as `kubectl` does since 1.31 and
//! browsers must. A port of one has no end of its own: what ends is all of it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;

use crate::case::{cases, contains, same};
use crate::context::Context;
use crate::peer::{SIZE, WebSocket, numbers, serve, sum};

cases! {
    ALL_TWICE:
        forward_of_many_ports_over_one_websocket,
        forward_of_a_hundred_connections_over_websockets_is_whole,
        forward_ended_over_a_websocket_is_as_with_runc,
        forward_reset_over_a_websocket_is_told;
}

const WITHIN: Duration = Duration::from_secs(20);

async fn forward_of_many_ports_over_one_websocket(t: &Context) -> Result<()> {
    const PORTS: [u16; 9] = [8001, 8002, 8003, 8004, 8005, 8006, 8007, 8008, 8009];
    let pod = t.ready_pod().await?;
    let servers = PORTS.map(|port| format!("echo=127.0.0.1:{port}"));
    serve(t, &pod, "server", &servers.each_ref().map(String::as_str)).await?;
    let mut socket = WebSocket::forward(t, &pod, &PORTS).await?;
    // Each has its own bytes, all of them at once.
    let all = numbers(20_000 + 4 * PORTS.len());
    let own = |index: usize| &all[4 * index..4 * index + 20_000];
    for index in 0..PORTS.len() {
        socket.send(u8::try_from(index)?, own(index)).await?;
    }
    let whole = socket
        .until(|ports| ports.iter().all(|port| port.data.len() >= 20_000))
        .await?;
    ensure!(whole, "ended early");
    for index in 0..PORTS.len() {
        let port = socket.port(index)?;
        ensure!(port.data == own(index), "the bytes of port {index} differ");
        same!(String::from_utf8_lossy(&port.error), "");
    }
    Ok(())
}

/// Ten WebSockets with ten connections each, all of them open before the first
/// byte is sent.
async fn forward_of_a_hundred_connections_over_websockets_is_whole(t: &Context) -> Result<()> {
    const EACH: usize = 20_000;
    let pod = t.ready_pod().await?;
    serve(t, &pod, "server", &["echo=127.0.0.1:8001"]).await?;
    let mut sockets = Vec::new();
    for _ in 0..10 {
        sockets.push(WebSocket::forward(t, &pod, &[8001; 10]).await?);
    }
    let bytes = numbers(EACH + 100 * 4);
    let bytes = &bytes;
    let echoing = (0..).zip(&mut sockets).map(|(number, socket)| async move {
        let own = |index: usize| {
            let from = 4 * (10 * number + index);
            &bytes[from..from + EACH]
        };
        for index in 0..10_u8 {
            socket.send(index, own(index.into())).await?;
        }
        let whole = socket
            .until(|ports| ports.iter().all(|port| port.data.len() >= EACH))
            .await?;
        ensure!(whole, "WebSocket {number} ended early");
        for index in 0..10 {
            let port = socket.port(index)?;
            ensure!(port.data == own(index), "connection {index} of {number}");
            same!(String::from_utf8_lossy(&port.error), "");
        }
        anyhow::Ok(())
    });
    try_join_all(echoing).await?;
    for socket in sockets {
        socket.close().await?;
    }
    Ok(())
}

async fn forward_ended_over_a_websocket_is_as_with_runc(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let servers = [
        "sink=127.0.0.1:8001",
        "source=127.0.0.1:8002",
        "half=127.0.0.1:8003",
        "echo=127.0.0.1:8004",
    ];
    let server = serve(t, &pod, "server", &servers).await?;
    let bytes = numbers(100_000);
    let came = |data: &[u8]| data.len() >= SIZE;

    // A server's end is no error, and not the end of the others.
    let mut socket = WebSocket::forward(t, &pod, &[8002, 8003, 8004]).await?;
    let whole = socket
        .until(|ports| ports[..2].iter().all(|port| came(&port.data)))
        .await?;
    ensure!(whole, "ended early");
    for index in 0..2 {
        let port = socket.port(index)?;
        ensure!(port.data == numbers(SIZE), "the bytes of {index} differ");
    }
    // containerd closes a second after it.
    for line in ["source end", &format!("half end {}", sum(b""))] {
        server.wrote(line, WITHIN).await?;
    }
    socket.send(2, b"still here").await?;
    let back = socket.until(|ports| ports[2].data == b"still here").await?;
    ensure!(back, "the other port has ended, too");
    for index in 0..3 {
        same!(String::from_utf8_lossy(&socket.port(index)?.error), "");
    }
    socket.close().await?;

    // The client's end is the server's, with all that was sent before.
    let mut socket = WebSocket::forward(t, &pod, &[8001]).await?;
    socket.send(0, &bytes).await?;
    socket.close().await?;
    let line = format!("sink end {}", sum(&bytes));
    server.wrote(&line, WITHIN).await?;
    Ok(())
}

async fn forward_reset_over_a_websocket_is_told(t: &Context) -> Result<()> {
    const SOME: usize = 100_000;
    let pod = t.ready_pod().await?;
    let servers = [
        "reset=127.0.0.1:8001",
        "cut=127.0.0.1:8002",
        "echo=127.0.0.1:8003",
    ];
    serve(t, &pod, "server", &servers).await?;
    let mut socket = WebSocket::forward(t, &pod, &[8001, 8002, 8003]).await?;

    socket.send(0, b"x").await?;
    let told = socket.until(|ports| !ports[0].error.is_empty()).await?;
    ensure!(told, "ended without an error: {socket:?}");
    same!(
        socket.port(0)?.data.len(),
        0,
        "bytes from a server that resets"
    );
    contains!(String::from_utf8_lossy(&socket.port(0)?.error), "reset");

    // With bytes on their way: those that come are the first.
    let some = socket.until(|ports| ports[1].data.len() >= SOME).await?;
    ensure!(some, "ended early");
    socket.send(1, b"x").await?;
    let told = socket.until(|ports| !ports[1].error.is_empty()).await?;
    ensure!(told, "ended without an error");
    let port = socket.port(1)?;
    ensure!(
        numbers(SIZE).starts_with(&port.data),
        "the server's bytes differ"
    );
    contains!(String::from_utf8_lossy(&port.error), "reset");

    // The third has seen nothing of it.
    socket.send(2, b"still here").await?;
    let back = socket.until(|ports| ports[2].data == b"still here").await?;
    ensure!(back, "the other port has ended, too");
    socket.close().await.context("close")
}
