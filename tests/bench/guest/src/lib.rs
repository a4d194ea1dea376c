// SPDX-License-Identifier: Apache-2.0
//! What both sides of the floor of `make bench-sessions` know: a connection, or
//! a session, carries one order, then the bytes that it asks for.

use std::io;

use podhull_types::VsockPort;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Where the guest takes connections without a session around them.
pub const RAW: VsockPort = VsockPort(2000);
/// What is copied at a time, as by the relays of shim and agent.
const BUFFER: usize = 64 * 1024;
const SEND: u8 = b's';
const RECEIVE: u8 = b'r';
/// What a guest that received everything says.
const DONE: u8 = b'.';

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From the guest to the host.
    Out,
    /// From the host to the guest.
    In,
}

/// The host's side: moves `count` bytes; they have arrived when it returns.
///
/// # Errors
/// What the connection says, or that it ended too early.
pub async fn order(
    mut read: impl AsyncRead + Unpin,
    mut write: impl AsyncWrite + Unpin,
    way: Way,
    count: u64,
) -> io::Result<()> {
    let kind = if way == Way::Out { SEND } else { RECEIVE };
    write.write_u8(kind).await?;
    write.write_u64(count).await?;
    write.flush().await?;
    match way {
        Way::Out => receive(&mut read, count).await,
        Way::In => {
            send(&mut write, count).await?;
            let answer = read.read_u8().await?;
            let whole = answer == DONE;
            whole
                .then_some(())
                .ok_or_else(|| io::Error::other("the guest did not receive everything"))
        }
    }
}

/// The guest's side: does what it is told; the end instead of an order is fine.
///
/// # Errors
/// As [`order`].
pub async fn obey(
    mut read: impl AsyncRead + Unpin,
    mut write: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let kind = match read.read_u8().await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
        kind => kind?,
    };
    let count = read.read_u64().await?;
    if kind == SEND {
        send(&mut write, count).await?;
    } else {
        receive(&mut read, count).await?;
        write.write_u8(DONE).await?;
    }
    write.shutdown().await
}

async fn send(write: &mut (impl AsyncWrite + Unpin), count: u64) -> io::Result<()> {
    let block = vec![b'z'; BUFFER];
    let mut left = count;
    while left > 0 {
        let size = usize::try_from(left).unwrap_or(BUFFER).min(BUFFER);
        write.write_all(&block[..size]).await?;
        left -= size as u64;
    }
    write.flush().await
}

async fn receive(read: &mut (impl AsyncRead + Unpin), count: u64) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut left = count;
    while left > 0 {
        let size = read.read(&mut buffer).await?;
        if size == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left = left.saturating_sub(size as u64);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_order_is_obeyed_either_way() {
        for way in [Way::Out, Way::In] {
            let (host, guest) = tokio::io::duplex(1000);
            let (host_reads, host_writes) = tokio::io::split(host);
            let (guest_reads, guest_writes) = tokio::io::split(guest);
            let (ordered, obeyed) = tokio::join!(
                order(host_reads, host_writes, way, 1_000_000),
                obey(guest_reads, guest_writes)
            );
            ordered.unwrap();
            obeyed.unwrap();
        }
    }
}
