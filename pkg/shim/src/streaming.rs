// SPDX-License-Identifier: Apache-2.0
//! The Streaming service: with `io_type = "streaming"` containerd 2.x gives a
//! process's stdin, stdout and stderr not as FIFOs but as streams that it opens
//! at the shim's own socket, `ttrpc+unix://SOCKET?streaming_id=ID`.
//!
//! It opens them before it tells of the process, and again when it was
//! restarted. So a stream of any well-formed id is taken, and waits, as long as
//! its client does, for a process that claims the id. Each claimed id has a FIFO
//! of ours, which is what the sandbox knows; `bridge` passes bytes between it
//! and the newest stream.
//!
//! containerd asks for a task's state before it deletes it, and then gives up
//! reading what it has not read from its streams, unlike from FIFOs. So the state
//! of a process that has ended is told once its outputs' streams were read to
//! their ends, or after [`LAST_WORDS`].

use std::collections::HashMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use podhull_sandbox::{RunDir, SandboxError, Stdio};
use podhull_types::{Deadline, IdError, ProcessRef};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

mod address;
#[cfg(test)]
mod bench;
mod bridge;
pub(crate) mod frames;
#[cfg(test)]
mod tests;

use address::{Kind, StreamId, Target};
use bridge::Offers;
use frames::Stream;

use crate::connections::Connection;
use crate::error::ShimError;
use crate::status::stream_status;

/// Time for a client to say which stream it wants, and to hang up when it is
/// told that it does not get it.
const OPENING: Duration = Duration::from_secs(10);
/// Time for the streams of a process that has ended to be read to their ends.
/// containerd waits 2 s for a state; what is on its way then is lost.
const LAST_WORDS: Duration = Duration::from_millis(1700);
/// Most messages of a client that wait: more stay in its connection.
const WAITING: usize = 16;

/// A stream cannot be opened, or goes no further.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error("the client went before its stream was open")]
    Gone,
    #[error("no method {0:?}")]
    Method(String),
    #[error("streaming_id: {0}")]
    Id(#[from] IdError),
    #[error("a message of type {0:?} has no place here")]
    Unexpected(String),
    #[error("a window cannot change by {0}")]
    Window(i32),
    #[error("{0} bytes are more than the window had room for")]
    Overrun(usize),
    #[error("a message cannot be decoded")]
    Garbled(#[from] prost::DecodeError),
    #[error("a frame of type {0} has no place here")]
    Frame(u8),
    #[error("a frame cannot be read: {0}")]
    Ttrpc(ttrpc::Error),
    #[error("the stream's FIFO")]
    Fifo(#[source] io::Error),
}

/// The URIs of a process's streams, as containerd gave them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Uris {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// One id that a process claimed.
#[derive(Debug)]
struct Claimed {
    id: StreamId,
    fifo: PathBuf,
    offers: Arc<Offers>,
}

#[derive(Debug)]
struct Process {
    uris: Uris,
    streams: Vec<Claimed>,
    /// Cancelled once it has ended.
    ended: CancellationToken,
    /// Cancelled to end what serves its streams.
    cut: CancellationToken,
}

impl Process {
    /// Resolves once no output has a stream: a client that has read the end
    /// hangs up.
    async fn outputs_closed(&self) {
        for stream in &self.streams {
            if stream.id.kind != Kind::Stdin {
                stream.offers.closed().await;
            }
        }
    }
}

#[derive(Debug)]
struct Slot {
    offers: Arc<Offers>,
    claimed: bool,
}

#[derive(Debug, Default)]
struct State {
    slots: HashMap<StreamId, Slot>,
    processes: HashMap<ProcessRef, Arc<Process>>,
}

/// The streams of one shim.
#[derive(Debug)]
pub(crate) struct Streams {
    socket: PathBuf,
    folder: PathBuf,
    state: Mutex<State>,
    tasks: TaskTracker,
    ending: CancellationToken,
}

impl Streams {
    pub(crate) fn new(run_dir: &RunDir) -> Arc<Self> {
        Arc::new(Self {
            socket: run_dir.socket(),
            folder: run_dir.streams(),
            state: Mutex::default(),
            tasks: TaskTracker::new(),
            ending: CancellationToken::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn process(&self, id: &ProcessRef) -> Option<Arc<Process>> {
        self.state().processes.get(id).map(Arc::clone)
    }

    /// Serves a connection whose first frame, number `number`, is `request` for
    /// this service.
    pub(crate) fn serve(
        self: &Arc<Self>,
        connection: Connection,
        number: u32,
        request: ttrpc::Request,
    ) {
        let streams = Arc::clone(self);
        let ending = self.ending.clone();
        let served = async move { streams.open(connection, number, request).await };
        self.tasks.spawn(ending.run_until_cancelled_owned(served));
    }

    async fn open(&self, mut connection: Connection, number: u32, request: ttrpc::Request) {
        let by = Deadline::after(OPENING);
        let first = by
            .run(frames::first(&mut connection, number, request))
            .await;
        let first = first.unwrap_or(Err(StreamError::Gone));
        let id = first
            .and_then(frames::init)
            .and_then(|id| Ok(StreamId::parse(&id)?));
        let id = match id {
            Ok(id) => id,
            Err(error) => {
                tracing::warn!(%error, "a stream is refused");
                let told = frames::refuse(&mut connection, number, stream_status(&error));
                let told = by.run(told).await;
                // Together with the connection's end the answer could be missed.
                let left = by.run(frames::read(&mut connection, number)).await;
                tracing::debug!(?told, left = left.is_ok(), "and was told so");
                return;
            }
        };
        if let Err(error) = connection.keep_little() {
            tracing::warn!(%error, "the buffer of a stream's connection stays large");
        }
        let (reader, writer) = tokio::io::split(connection);
        let (to, sent) = mpsc::channel(WAITING);
        let reading = self.ending.child_token();
        let mut stream = Stream {
            number,
            writer,
            sent,
            reader: reading.clone(),
        };
        if let Err(error) = stream.acknowledge().await {
            tracing::debug!(stream = %id, %error, "the client went");
            return;
        }
        tracing::debug!(stream = %id, "open");
        self.offer(&id, stream);
        let received = frames::receive(id.kind, number, reader, to);
        match reading.run_until_cancelled(received).await {
            Some(Err(error)) => tracing::warn!(stream = %id, %error, "given up"),
            ended => tracing::debug!(stream = %id, by_client = ended.is_some(), "ended"),
        }
        self.withdraw(&id, &reading);
    }

    fn offer(&self, id: &StreamId, stream: Stream) {
        let mut state = self.state();
        let slot = state.slots.entry(id.clone()).or_insert_with(|| Slot {
            offers: Arc::new(Offers::new()),
            claimed: false,
        });
        slot.offers.put(stream);
    }

    /// Forgets a stream that nobody claimed and whose client is gone.
    fn withdraw(&self, id: &StreamId, reader: &CancellationToken) {
        let mut state = self.state();
        let unclaimed = state.slots.get(id).filter(|slot| !slot.claimed);
        if unclaimed.is_some_and(|slot| slot.offers.withdraw(reader)) {
            state.slots.remove(id);
        }
    }

    /// Takes the streams that `uris` name for `process`, and makes their FIFOs.
    /// A terminal has no standard error of its own.
    ///
    /// # Errors
    /// If a URI is no FIFO's and no stream's of ours, or the process has claimed
    /// streams already.
    pub(crate) fn claim(
        self: &Arc<Self>,
        process: &ProcessRef,
        uris: Uris,
        terminal: bool,
    ) -> Result<Claim, ShimError> {
        let mut stdio = Stdio {
            terminal,
            ..Stdio::default()
        };
        let mut ids = Vec::new();
        for kind in Kind::ALL {
            let (uri, path) = match kind {
                Kind::Stdin => (&uris.stdin, &mut stdio.stdin),
                Kind::Stdout => (&uris.stdout, &mut stdio.stdout),
                Kind::Stderr => (&uris.stderr, &mut stdio.stderr),
            };
            let target = address::parse(kind, uri, &self.socket)
                .map_err(|reason| SandboxError::refused(kind.name(), reason))?;
            match target {
                _ if kind == Kind::Stderr && terminal => {}
                Target::None => {}
                Target::Fifo(fifo) => *path = Some(fifo),
                Target::Stream(id) => {
                    *path = Some(self.folder.join(id.to_string()));
                    ids.push(id);
                }
            }
        }
        let mut claim = Claim {
            streams: Arc::clone(self),
            process: None,
            stdio,
            outputs: Vec::new(),
        };
        if ids.is_empty() {
            return Ok(claim);
        }
        let claimed = self.enter(process, uris, ids)?;
        claim.process = Some((process.clone(), Arc::clone(&claimed)));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)
            .map_err(ShimError::file("create folder", &self.folder))?;
        for stream in &claimed.streams {
            mkfifo(&stream.fifo, Mode::S_IRUSR | Mode::S_IWUSR)
                .map_err(|errno| ShimError::file("make FIFO", &stream.fifo)(errno.into()))?;
            if stream.id.kind != Kind::Stdin {
                // Before the sandbox opens it: what is in a FIFO goes with the
                // last who has it open.
                let fifo = pipe::OpenOptions::new()
                    .open_receiver(&stream.fifo)
                    .map_err(ShimError::file("open FIFO", &stream.fifo))?;
                claim.outputs.push((fifo, Arc::clone(&stream.offers)));
            }
        }
        Ok(claim)
    }

    fn enter(
        &self,
        process: &ProcessRef,
        uris: Uris,
        ids: Vec<StreamId>,
    ) -> Result<Arc<Process>, ShimError> {
        let mut state = self.state();
        let taken = |id| state.slots.get(id).is_some_and(|slot: &Slot| slot.claimed);
        if state.processes.contains_key(process) || ids.iter().any(taken) {
            return Err(SandboxError::ProcessExists(process.clone()).into());
        }
        let claim = |id: StreamId| {
            let slot = state.slots.entry(id.clone()).or_insert_with(|| Slot {
                offers: Arc::new(Offers::new()),
                claimed: false,
            });
            slot.claimed = true;
            Claimed {
                fifo: self.folder.join(id.to_string()),
                offers: Arc::clone(&slot.offers),
                id,
            }
        };
        let entered = Arc::new(Process {
            uris,
            streams: ids.into_iter().map(claim).collect(),
            ended: CancellationToken::new(),
            cut: self.ending.child_token(),
        });
        state
            .processes
            .insert(process.clone(), Arc::clone(&entered));
        Ok(entered)
    }

    /// The URIs that containerd gave for a process's streams; `None` if they are
    /// FIFOs.
    pub(crate) fn uris(&self, process: &ProcessRef) -> Option<Uris> {
        self.process(process).map(|process| process.uris.clone())
    }

    /// Tells those who write to a process's stdin that it has ended.
    pub(crate) fn ended(&self, process: &ProcessRef) {
        if let Some(process) = self.process(process) {
            process.ended.cancel();
        }
    }

    /// Resolves once the streams of a process's outputs were read to their ends,
    /// at most [`LAST_WORDS`] later.
    pub(crate) async fn read(&self, id: &ProcessRef) {
        if let Some(process) = self.process(id) {
            let read = process.outputs_closed();
            if Deadline::after(LAST_WORDS).run(read).await.is_err() {
                tracing::warn!(process = %id, "its output was not read in time, and is cut");
            }
        }
    }

    /// Ends the streams of a process that was deleted, and of those that were
    /// added to it. Clients have until `by` to read what is left.
    pub(crate) async fn finish(&self, id: &ProcessRef, by: Deadline) {
        let of = |other: &ProcessRef| {
            other == id || (id.exec.is_none() && other.container == id.container)
        };
        let deleted: Vec<_> = self
            .state()
            .processes
            .iter()
            .filter(|(other, _)| of(other))
            .map(|(other, process)| (other.clone(), Arc::clone(process)))
            .collect();
        for (id, process) in deleted {
            process.ended.cancel();
            if by.run(process.outputs_closed()).await.is_err() {
                tracing::warn!(process = %id, "streams are cut before they were read");
            }
            self.release(&id, &process);
        }
    }

    fn release(&self, id: &ProcessRef, process: &Process) {
        process.cut.cancel();
        let mut state = self.state();
        state.processes.remove(id);
        for stream in &process.streams {
            state.slots.remove(&stream.id);
            stream.offers.clear();
            if let Err(error) = fs::remove_file(&stream.fifo)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(fifo = %stream.fifo.display(), %error, "FIFO not removed");
            }
        }
    }

    /// Ends everything, for the end of the process. What has ended may be read
    /// until `by`.
    pub(crate) async fn end(&self, by: Deadline) {
        let processes: Vec<_> = self.state().processes.values().map(Arc::clone).collect();
        let read = async {
            for process in processes.iter().filter(|one| one.ended.is_cancelled()) {
                process.outputs_closed().await;
            }
        };
        let read = by.at_most(LAST_WORDS).run(read).await;
        tracing::debug!(read = read.is_ok(), "streams");
        self.ending.cancel();
        self.tasks.close();
        if by.run(self.tasks.wait()).await.is_err() {
            tracing::error!("streams do not end");
        }
    }
}

/// What a process that is being made has claimed. Dropped before
/// [`start`](Self::start), it leaves nothing.
#[derive(Debug)]
pub(crate) struct Claim {
    streams: Arc<Streams>,
    /// `None` if it has no streams of ours, or they were started.
    process: Option<(ProcessRef, Arc<Process>)>,
    stdio: Stdio,
    outputs: Vec<(pipe::Receiver, Arc<Offers>)>,
}

impl Claim {
    /// What the sandbox is to know.
    pub(crate) fn stdio(&self) -> Stdio {
        self.stdio.clone()
    }

    /// Begins to serve the streams of a process that was made.
    pub(crate) fn start(mut self) {
        let Some((_, process)) = self.process.take() else {
            return;
        };
        let tasks = &self.streams.tasks;
        for (fifo, offers) in std::mem::take(&mut self.outputs) {
            let cut = process.cut.clone();
            let output = async move { bridge::output(fifo, &offers).await };
            tasks.spawn(cut.run_until_cancelled_owned(output));
        }
        for stream in &process.streams {
            if stream.id.kind == Kind::Stdin {
                let (cut, ended) = (process.cut.clone(), process.ended.clone());
                let (fifo, offers) = (stream.fifo.clone(), Arc::clone(&stream.offers));
                let input = async move { bridge::input(&fifo, &offers, &ended).await };
                tasks.spawn(cut.run_until_cancelled_owned(input));
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some((id, process)) = self.process.take() {
            self.streams.release(&id, &process);
        }
    }
}
