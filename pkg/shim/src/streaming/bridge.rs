// SPDX-License-Identifier: Apache-2.0
//! Between a FIFO of the shim's and whichever stream containerd has open for it.

use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use prost::bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::StreamError;
use super::frames::{Sent, Stream};

/// Most bytes of output in one message. What stands in the connection when
/// containerd dies is lost: with the connection's buffer (see `connections`)
/// this keeps it little.
const CHUNK: usize = 16 * 1024;
/// How much of stdin may be on its way.
pub(super) const WINDOW: u32 = 64 * 1024;

/// The newest stream that containerd opened for one id. A new one takes the
/// place of the one before: containerd was restarted.
#[derive(Debug)]
pub(super) struct Offers {
    newest: Mutex<Option<Stream>>,
    changed: Notify,
    /// Whether there is a stream, here or taken.
    open: watch::Sender<bool>,
}

impl Offers {
    pub(super) fn new() -> Self {
        Self {
            newest: Mutex::new(None),
            changed: Notify::new(),
            open: watch::Sender::new(false),
        }
    }

    fn newest(&self) -> MutexGuard<'_, Option<Stream>> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn put(&self, stream: Stream) {
        let mut newest = self.newest();
        *newest = Some(stream);
        self.open.send_replace(true);
        self.changed.notify_one();
    }

    /// Takes a stream back whose client is gone, unless it was taken.
    /// False if there is another.
    pub(super) fn withdraw(&self, reader: &CancellationToken) -> bool {
        let mut newest = self.newest();
        let is_it = newest
            .as_ref()
            .is_none_or(|stream| stream.reader == *reader);
        if is_it {
            *newest = None;
            self.open.send_replace(false);
        }
        is_it
    }

    /// Drops what nobody took.
    pub(super) fn clear(&self) {
        *self.newest() = None;
    }

    /// The next stream. Of its callers, only one at a time may wait.
    async fn next(&self) -> Stream {
        loop {
            if let Some(stream) = self.newest().take() {
                return stream;
            }
            self.changed.notified().await;
        }
    }

    /// Resolves once there is a stream after the one that was taken.
    async fn replaced(&self) {
        while self.newest().is_none() {
            self.changed.notified().await;
        }
    }

    /// Tells that the stream that was taken is gone.
    pub(super) fn lost(&self) {
        let newest = self.newest();
        self.open.send_replace(newest.is_some());
    }

    /// Resolves once no stream is open.
    pub(super) async fn closed(&self) {
        let mut open = self.open.subscribe();
        // The sender lives in `self`, so the wait cannot fail.
        let closed = open.wait_for(|open| !open).await;
        debug_assert!(closed.is_ok());
    }
}

/// How a client's part in an output ended.
#[derive(Debug, PartialEq, Eq)]
enum Left {
    /// It has all of the output and its end.
    Whole,
    /// It went, or another came: what it was not sent is still there.
    Early,
}

/// Serves an output to whoever has a stream open for it, until it is dropped.
/// What cannot be sent stays in the FIFO, which then makes its process wait.
pub(super) async fn output(mut fifo: pipe::Receiver, offers: &Offers) {
    let mut output = Output {
        rest: BytesMut::new(),
        ended: false,
    };
    loop {
        let mut stream = offers.next().await;
        let sent = async {
            let left = output.send(&mut fifo, &mut stream).await?;
            if left == Left::Whole {
                hang_up(&mut stream).await;
            }
            Ok::<_, StreamError>(left)
        };
        let left = tokio::select! {
            left = sent => left,
            () = offers.replaced() => Ok(Left::Early),
        };
        match left {
            Ok(left) => tracing::debug!(?left, "an output's stream is gone"),
            Err(error) => tracing::warn!(%error, "an output's stream is given up"),
        }
        drop(stream);
        offers.lost();
    }
}

struct Output {
    /// Read from the FIFO and not sent yet.
    rest: BytesMut,
    /// The FIFO has no more.
    ended: bool,
}

impl Output {
    /// Sends what the client has room for. Cancel safe: what was sent whole is
    /// gone from `rest`.
    async fn send(
        &mut self,
        fifo: &mut pipe::Receiver,
        stream: &mut Stream,
    ) -> Result<Left, StreamError> {
        let mut window: u64 = 0;
        loop {
            if self.rest.is_empty() && self.ended {
                return Ok(match stream.end().await {
                    Ok(()) => Left::Whole,
                    Err(_) => Left::Early,
                });
            }
            self.rest.reserve(CHUNK.saturating_sub(self.rest.len()));
            tokio::select! {
                biased;
                sent = stream.sent.recv() => match sent {
                    Some(Sent::Window(more)) => window += u64::from(more),
                    Some(Sent::Data(_)) => return Err(StreamError::Unexpected("data".into())),
                    None => return Ok(Left::Early),
                },
                read = fifo.read_buf(&mut self.rest), if self.rest.is_empty() && window > 0 => {
                    self.ended = read.map_err(StreamError::Fifo)? == 0;
                }
                () = std::future::ready(()), if !self.rest.is_empty() && window > 0 => {
                    let most = usize::try_from(window).unwrap_or(CHUNK).min(CHUNK);
                    let count = self.rest.len().min(most);
                    if let Err(error) = stream.data(&self.rest[..count]).await {
                        tracing::debug!(%error, "output not sent");
                        return Ok(Left::Early);
                    }
                    self.rest.advance(count);
                    window -= count as u64;
                }
            }
        }
    }
}

/// Writes what clients send into the FIFO at `path`, until it is dropped. With
/// each client's end our writing end is closed: the sandbox knows what that
/// means. A client is told that nothing more is read once nobody reads the FIFO,
/// or the process has `ended`.
pub(super) async fn input(path: &Path, offers: &Offers, ended: &CancellationToken) {
    loop {
        let mut stream = offers.next().await;
        let fed = async {
            let fifo = pipe::OpenOptions::new()
                .open_sender(path)
                .map_err(StreamError::Fifo)?;
            feed(fifo, &mut stream, offers).await
        };
        let fed = ended.run_until_cancelled(fed).await;
        match fed.unwrap_or_else(|| Err(StreamError::Fifo(Errno::EPIPE.into()))) {
            Ok(()) => tracing::debug!("stdin's client has ended"),
            Err(StreamError::Fifo(error)) if is_unread(&error) => {
                tracing::debug!(%error, "the process reads no more");
                if stream.end().await.is_ok() {
                    tokio::select! {
                        () = hang_up(&mut stream) => {}
                        () = offers.replaced() => {}
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "stdin's stream is given up"),
        }
        drop(stream);
        offers.lost();
    }
}

/// Resolves once the client has hung up. Its connection must not end before it
/// has read the end of its stream: it could miss that, and what came before.
async fn hang_up(stream: &mut Stream) {
    while stream.sent.recv().await.is_some() {}
}

/// Whether a FIFO has no reader.
fn is_unread(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe || error.raw_os_error() == Some(Errno::ENXIO as i32)
}

async fn feed(
    mut fifo: pipe::Sender,
    stream: &mut Stream,
    offers: &Offers,
) -> Result<(), StreamError> {
    let mut granted: u32 = 0;
    let mut replaced = false;
    loop {
        // A client that is gone is noticed by what it does not send.
        if granted <= WINDOW / 2 && !replaced {
            let more = WINDOW - granted;
            match stream.window(more).await {
                Ok(()) => granted += more,
                Err(error) => tracing::debug!(%error, "stdin's window not told"),
            }
        }
        let sent = tokio::select! {
            biased;
            sent = stream.sent.recv() => sent,
            // What came before is written first.
            () = offers.replaced(), if !replaced => {
                replaced = true;
                stream.sent.close();
                continue;
            }
        };
        let data = match sent {
            Some(Sent::Data(data)) => data,
            Some(Sent::Window(_)) => return Err(StreamError::Unexpected("window".into())),
            None => return Ok(()),
        };
        let count = u32::try_from(data.len())
            .ok()
            .filter(|count| *count <= granted);
        granted -= count.ok_or(StreamError::Overrun(data.len()))?;
        fifo.write_all(&data).await.map_err(StreamError::Fifo)?;
    }
}
