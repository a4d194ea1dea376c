// SPDX-License-Identifier: Apache-2.0
//! Handing a terminal's other end from a helper to the agent.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use podhull_types::Deadline;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::net::UnixListener;

use crate::error::GuestError;
use crate::init::RUN;

/// Time to pick up a terminal that was sent already.
pub(crate) const ARRIVED: Duration = Duration::from_secs(5);

/// Sends `master` over `socket`; the helper's side.
pub(crate) fn send(socket: &UnixStream, master: &impl AsFd) -> Result<(), GuestError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [master.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    let name = [IoSlice::new(b"terminal")];
    sendmsg(socket, &name, &mut ancillary, SendFlags::NOSIGNAL)
        .map(drop)
        .map_err(GuestError::system("send the terminal"))
}

fn receive(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 128];
    let mut buffers = [IoSliceMut::new(&mut name)];
    recvmsg(
        socket,
        &mut buffers,
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message
            && let Some(master) = descriptors.next()
        {
            return Ok(master);
        }
    }
    Err(io::Error::other("no descriptor came"))
}

/// Where one terminal is to arrive; the agent's side.
#[derive(Debug)]
pub(crate) struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    /// Listens under a name of its own, which is short: with two ids in it, a
    /// socket's path would be too long for the kernel.
    pub(crate) fn bind() -> Result<Self, GuestError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(RUN).join(format!("console-{number}"));
        let listener = UnixListener::bind(&path).map_err(GuestError::file("listen at", &path))?;
        Ok(Self { listener, path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the terminal.
    pub(crate) async fn receive(&self, by: Deadline) -> Result<OwnedFd, GuestError> {
        let receiving = async {
            let (stream, _) = self.listener.accept().await?;
            stream.readable().await?;
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            receive(&stream)
        };
        by.run(receiving)
            .await
            .map_err(|_| GuestError::Deadline("receive the terminal"))?
            .map_err(GuestError::system("receive the terminal"))
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "console socket not removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_descriptor_survives_its_journey() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        send(&ours, &writer).unwrap();
        drop(writer);
        let received = receive(&theirs).unwrap();
        std::fs::File::from(received).write_all(b"hello").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }
}
