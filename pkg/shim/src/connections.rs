// SPDX-License-Identifier: Apache-2.0
//! Connections of containerd that tell when they are gone.
//!
//! Go's ttrpc client may drop an answer that comes together with the end of its
//! connection. So the shim, when it is told to end, lets containerd hang up first.
//!
//! A connection whose first request is for the Streaming service is served by
//! [`Streams`]: containerd makes one for each stream. All others are ttrpc's.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use nix::sys::socket::{setsockopt, sockopt};
use prost::bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use ttrpc::r#async::transport::Listener;
use ttrpc::proto::{GenMessage, MESSAGE_LENGTH_MAX, MessageHeader};

use crate::streaming::{Streams, frames};

/// Least buffer for output that containerd has not read, see [`Connection::keep_little`].
const LITTLE: usize = 16 * 1024;

/// One connection, counted while it exists.
#[derive(Debug)]
pub(crate) struct Connection {
    /// Read already, and to be read again.
    ahead: Bytes,
    stream: UnixStream,
    _counted: TaskTrackerToken,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream, counted: TaskTrackerToken) -> Self {
        Self {
            ahead: Bytes::new(),
            stream,
            _counted: counted,
        }
    }

    /// Gives it a small buffer: what stands in it when containerd dies is lost.
    pub(crate) fn keep_little(&self) -> nix::Result<()> {
        setsockopt(&self.stream, sockopt::SndBuf, &LITTLE)
    }
}

/// Gives a connection to `streams` if its first frame is a request for that
/// service, and back otherwise; `None` also if it ends before that.
pub(crate) async fn route(mut connection: Connection, streams: Arc<Streams>) -> Option<Connection> {
    let header = match MessageHeader::read_from(&mut connection).await {
        Ok(header) => header,
        Err(error) => {
            tracing::debug!(%error, "a connection without a request");
            return None;
        }
    };
    let length = usize::try_from(header.length).ok();
    let mut payload = vec![
        0;
        length
            .filter(|length| *length <= MESSAGE_LENGTH_MAX)
            .unwrap_or(0)
    ];
    if let Err(error) = connection.read_exact(&mut payload).await {
        tracing::debug!(%error, "a connection without a whole request");
        return None;
    }
    let frame = GenMessage { header, payload };
    if let Some(request) = frames::opening(&frame) {
        streams.serve(connection, header.stream_id, request);
        return None;
    }
    let mut ahead = Vec::<u8>::from(header);
    ahead.extend_from_slice(&frame.payload);
    connection.ahead = ahead.into();
    Some(connection)
}

/// Accepts from `listener`; every connection is counted by `open`. A failed
/// accept ends nothing.
pub(crate) fn accept(listener: UnixListener, open: TaskTracker, streams: Arc<Streams>) -> Listener {
    Listener::new(Accepted {
        listener,
        open,
        streams,
        routed: FuturesUnordered::new(),
    })
}

struct Accepted {
    listener: UnixListener,
    open: TaskTracker,
    streams: Arc<Streams>,
    /// Connections whose first request is awaited.
    routed: FuturesUnordered<BoxFuture<'static, Option<Connection>>>,
}

impl futures::Stream for Accepted {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            while let Poll::Ready(accepted) = this.listener.poll_accept(cx) {
                let stream = match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => return Poll::Ready(Some(Err(error))),
                };
                let connection = Connection::new(stream, this.open.token());
                let routed = route(connection, Arc::clone(&this.streams));
                this.routed.push(Box::pin(routed));
            }
            match this.routed.poll_next_unpin(cx) {
                Poll::Ready(Some(Some(connection))) => return Poll::Ready(Some(Ok(connection))),
                Poll::Ready(Some(None)) => {}
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.ahead.is_empty() {
            let count = self.ahead.len().min(buf.remaining());
            buf.put_slice(&self.ahead.split_to(count));
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use podhull_types::Deadline;
    use ttrpc::r#async::{Client, Server};

    use super::*;

    #[tokio::test]
    async fn the_last_connections_end_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let open = TaskTracker::new();
        let listener = UnixListener::bind(&path).unwrap();
        let mut server = Server::new().add_listener(accept(
            listener,
            open.clone(),
            Arc::clone(&crate::fixture::shim(folder.path()).streams),
        ));
        server.start().await.unwrap();
        let client = Client::connect(&format!("unix://{}", path.display())).await;
        let client = client.unwrap();
        let by = Deadline::after(Duration::from_secs(10));
        by.run(async {
            while open.is_empty() {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
        open.close();
        drop(client);
        by.run(open.wait()).await.unwrap();
        server.shutdown().await.unwrap();
    }
}
