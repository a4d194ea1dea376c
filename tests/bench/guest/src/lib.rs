// SPDX-License-Identifier: Apache-2.0
//! What both sides of the floor of `make bench-sessions` know: a connection, or
//! a session, carries one order, then the bytes that it asks for. They come out
//! of a pipe and go into one, as those of a process do.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::thread;

use podhull_transport::{StreamReader, StreamWriter, TransportIo};
use podhull_types::VsockPort;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf};
use tokio::net::unix::pipe;

/// Where the guest takes connections without a session around them.
pub const RAW: VsockPort = VsockPort(2000);
/// What is copied at a time.
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

/// Where bytes are sent.
pub trait Sink: AsyncWrite + Unpin {
    /// Passes on what one read of `from` gives; 0 at its end.
    ///
    /// # Errors
    /// Those of either side.
    fn pass_from(
        &mut self,
        from: &mut pipe::Receiver,
    ) -> impl Future<Output = io::Result<usize>> + Send;
}

/// Where bytes come from.
pub trait Source: AsyncRead + Unpin {
    /// Passes on one piece of what comes; 0 at the end.
    ///
    /// # Errors
    /// Those of either side.
    fn pass_to(&mut self, to: &mut pipe::Sender) -> impl Future<Output = io::Result<usize>> + Send;
}

impl Sink for StreamWriter {
    async fn pass_from(&mut self, from: &mut pipe::Receiver) -> io::Result<usize> {
        self.send_from(from).await
    }
}

impl Source for StreamReader {
    async fn pass_to(&mut self, to: &mut pipe::Sender) -> io::Result<usize> {
        let chunk = self.chunk().await?.unwrap_or_default();
        to.write_all(&chunk).await?;
        Ok(chunk.len())
    }
}

/// One direction of a connection without a session: what a plain copier does.
#[derive(Debug)]
pub struct Raw<T> {
    half: T,
    buffer: Vec<u8>,
}

impl<T> Raw<T> {
    /// Wraps `half`.
    pub fn new(half: T) -> Self {
        Self {
            half,
            buffer: vec![0; BUFFER],
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Raw<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.half).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Raw<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.half).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.half).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.half).poll_shutdown(cx)
    }
}

impl Sink for Raw<WriteHalf<TransportIo>> {
    async fn pass_from(&mut self, from: &mut pipe::Receiver) -> io::Result<usize> {
        let count = from.read(&mut self.buffer).await?;
        self.half.write_all(&self.buffer[..count]).await?;
        Ok(count)
    }
}

impl Source for Raw<ReadHalf<TransportIo>> {
    async fn pass_to(&mut self, to: &mut pipe::Sender) -> io::Result<usize> {
        let count = self.half.read(&mut self.buffer).await?;
        to.write_all(&self.buffer[..count]).await?;
        Ok(count)
    }
}

/// The host's side: moves `count` bytes; they have arrived when it returns.
///
/// # Errors
/// What the connection says, or that it ended too early.
pub async fn order(
    read: &mut impl Source,
    write: &mut impl Sink,
    way: Way,
    count: u64,
) -> io::Result<()> {
    let kind = if way == Way::Out { SEND } else { RECEIVE };
    write.write_u8(kind).await?;
    write.write_u64(count).await?;
    write.flush().await?;
    match way {
        Way::Out => receive(read, count).await,
        Way::In => {
            send(write, count).await?;
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
pub async fn obey(read: &mut impl Source, write: &mut impl Sink) -> io::Result<()> {
    let kind = match read.read_u8().await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
        kind => kind?,
    };
    let count = read.read_u64().await?;
    if kind == SEND {
        send(write, count).await?;
    } else {
        receive(read, count).await?;
        write.write_u8(DONE).await?;
    }
    write.shutdown().await
}

async fn send(write: &mut impl Sink, count: u64) -> io::Result<()> {
    let (reader, mut writer) = io::pipe()?;
    let mut process = pipe::Receiver::from_owned_fd(OwnedFd::from(reader))?;
    // Ends by itself: it has written everything, or nobody reads any more.
    thread::spawn(move || {
        let block = [b'z'; BUFFER];
        let mut left = count;
        while left > 0 {
            let size = usize::try_from(left).unwrap_or(BUFFER).min(BUFFER);
            if io::Write::write_all(&mut writer, &block[..size]).is_err() {
                return;
            }
            left -= size as u64;
        }
    });
    while write.pass_from(&mut process).await? > 0 {}
    write.flush().await
}

async fn receive(read: &mut impl Source, count: u64) -> io::Result<()> {
    let (mut reader, writer) = io::pipe()?;
    let mut process = pipe::Sender::from_owned_fd(OwnedFd::from(writer))?;
    // Ends with the writer.
    thread::spawn(move || {
        let mut block = vec![0; BUFFER];
        while io::Read::read(&mut reader, &mut block).is_ok_and(|count| count > 0) {}
    });
    let mut left = count;
    while left > 0 {
        match read.pass_to(&mut process).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            size => left = left.saturating_sub(size as u64),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use podhull_transport::{Holder, HolderKind, LeaseSet, Peer, VsockTransport};

    use super::*;

    #[tokio::test]
    async fn an_order_is_obeyed_either_way() {
        let leases = LeaseSet::new("vm");
        let adopt = |end: std::os::unix::net::UnixStream| {
            let lease = leases
                .issue(Holder::new(HolderKind::Other, "test"))
                .unwrap();
            VsockTransport::adopt(end.into(), Peer::Guest(RAW), lease).unwrap()
        };
        for way in [Way::Out, Way::In] {
            let (host, guest) = std::os::unix::net::UnixStream::pair().unwrap();
            let (host, guest) = (adopt(host), adopt(guest));
            let halves = |end: &VsockTransport| {
                let (read, write) = tokio::io::split(end.io().unwrap());
                (Raw::new(read), Raw::new(write))
            };
            let (mut host, mut guest) = (halves(&host), halves(&guest));
            let (ordered, obeyed) = tokio::join!(
                order(&mut host.0, &mut host.1, way, 1_000_000),
                obey(&mut guest.0, &mut guest.1)
            );
            ordered.unwrap();
            obeyed.unwrap();
        }
    }
}
