// SPDX-License-Identifier: Apache-2.0
//! Connections of containerd that tell when they are gone.
//!
//! Go's ttrpc client may drop an answer that comes together with the end of its
//! connection. So the shim, when it is told to end, lets containerd hang up first.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use ttrpc::r#async::transport::Listener;

/// One connection, counted while it exists.
struct Connection {
    stream: UnixStream,
    _counted: TaskTrackerToken,
}

/// Accepts from `listener`; every connection is counted by `open`. A failed
/// accept ends nothing.
pub(crate) fn accept(listener: UnixListener, open: TaskTracker) -> Listener {
    Listener::new(Accepted { listener, open })
}

struct Accepted {
    listener: UnixListener,
    open: TaskTracker,
}

impl futures::Stream for Accepted {
    type Item = io::Result<Connection>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let accepted = ready!(self.listener.poll_accept(cx));
        Poll::Ready(Some(accepted.map(|(stream, _)| Connection {
            stream,
            _counted: self.open.token(),
        })))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
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
        let mut server = Server::new().add_listener(accept(listener, open.clone()));
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
