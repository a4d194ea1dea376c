// SPDX-License-Identifier: Apache-2.0
//! Between containerd's FIFOs and a process's session.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Buf as _;
use podhull_telemetry::Metrics;
use podhull_transport::{CloseReport, HostSession, StreamReader, StreamWriter};
use podhull_types::{Deadline, ProcessRef};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::error::SandboxError;
use crate::gauges::OpenSession;
use crate::spec::Stdio;

/// Time for the last frame of a session whose streams have ended.
const CLOSE: Duration = Duration::from_secs(2);
/// Time for a reader to read what stands in its FIFO at the end.
const READ: Duration = Duration::from_secs(1);
/// Longest pause between two looks at that.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);
/// Time for relays that were given up: what they wait for is cut, and closing has
/// its own time.
const GIVEN_UP: Duration = Duration::from_secs(5);

/// The host's ends of a process's FIFOs.
#[derive(Debug)]
pub(crate) struct Fifos {
    stdin: Option<pipe::Receiver>,
    stdin_end: Option<StdinEnd>,
    stdout: Option<pipe::Sender>,
    stderr: Option<pipe::Sender>,
}

/// What is to be done for stdin to end.
#[derive(Debug)]
enum StdinEnd {
    /// The writing end is of our own: who writes may go and come back.
    Kept(pipe::Sender),
    /// It ends with its last writer.
    Passing(PathBuf),
}

impl StdinEnd {
    fn close(self) {
        match self {
            Self::Kept(writer) => drop(writer),
            // For a FIFO that nobody has opened for writing, a writer comes and goes.
            Self::Passing(path) => match pipe::OpenOptions::new().open_sender(&path) {
                Ok(writer) => drop(writer),
                Err(error) => tracing::debug!(%error, "stdin has ended already"),
            },
        }
    }
}

impl Fifos {
    /// Opens the FIFOs as runc's shim does, so that neither an absent nor a
    /// restarted containerd is seen as an end: the output's with a reading end
    /// of our own, stdin's with a writing end that CloseIO gives up. An exec's
    /// stdin ends with its client, as containerd does not always say so: one
    /// whose client was cut off would wait for input for good.
    pub(crate) fn open(stdio: &Stdio, process: &ProcessRef) -> Result<Self, SandboxError> {
        let output = |path: &Path, stream| {
            pipe::OpenOptions::new()
                .read_write(true)
                .open_sender(path)
                .map_err(|source| SandboxError::Fifo {
                    stream,
                    path: path.into(),
                    source,
                })
        };
        let stdin = stdio.stdin.as_deref().map(|path| {
            let open = || {
                let receiver = pipe::OpenOptions::new().open_receiver(path)?;
                let end = match process.exec {
                    Some(_) => StdinEnd::Passing(path.into()),
                    None => StdinEnd::Kept(pipe::OpenOptions::new().open_sender(path)?),
                };
                Ok((receiver, end))
            };
            let failed = |source| SandboxError::Fifo {
                stream: "stdin",
                path: path.into(),
                source,
            };
            open().map_err(failed)
        });
        let (stdin, stdin_end) = stdin.transpose()?.unzip();
        Ok(Self {
            stdin,
            stdin_end,
            stdout: stdio
                .stdout
                .as_deref()
                .map(|path| output(path, "stdout"))
                .transpose()?,
            stderr: stdio
                .stderr
                .as_deref()
                .map(|path| output(path, "stderr"))
                .transpose()?,
        })
    }
}

/// What became of a process's output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IoReport {
    /// All of it reached the FIFOs.
    pub(crate) complete: bool,
    pub(crate) closed: CloseReport,
}

/// The relays of all processes of a sandbox, whoever waits for each.
#[derive(Debug, Default)]
pub(crate) struct Relays {
    running: TaskTracker,
    cut: CancellationToken,
}

impl Relays {
    /// Waits for all of them; at the deadline what is left is cut, and counted.
    /// There are no others afterwards.
    pub(crate) async fn end(&self, by: Deadline) -> Cut {
        self.running.close();
        if by.run(self.running.wait()).await.is_ok() {
            return Cut::default();
        }
        let cut = self.running.len();
        self.cut.cancel();
        let ended = Deadline::after(GIVEN_UP).run(self.running.wait()).await;
        let left = ended.map_or_else(|_| self.running.len(), |()| 0);
        Cut { cut, left }
    }
}

/// What a teardown had to cut of one kind of connection.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    /// How many.
    pub(crate) cut: usize,
    /// Those of them that did not end even then.
    pub(crate) left: usize,
}

/// The running relays of one process. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct ProcessIo {
    stdin_end: Mutex<Option<StdinEnd>>,
    /// Gone once all output has been read by whoever reads it, or was given up.
    delivered: watch::Receiver<()>,
    give_up: CancellationToken,
    relays: JoinHandle<IoReport>,
}

impl ProcessIo {
    /// Starts relaying between `fifos` and `session`, as one of `all`.
    pub(crate) fn start(
        mut fifos: Fifos,
        session: HostSession,
        metrics: &Metrics,
        all: &Relays,
    ) -> Self {
        let give_up = all.cut.child_token();
        let stdin_end = Mutex::new(fifos.stdin_end.take());
        let (undelivered, delivered) = watch::channel(());
        let metrics = metrics.clone();
        let relays = relay(fifos, session, give_up.clone(), metrics, undelivered);
        let relays = all.running.spawn(relays);
        Self {
            stdin_end,
            delivered,
            give_up,
            relays,
        }
    }

    /// Lets stdin end once containerd's side has ended too.
    pub(crate) fn close_stdin(&self) {
        let end = self
            .stdin_end
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(end) = end {
            end.close();
        }
    }

    /// Resolves once all output has been read, or will not be.
    pub(crate) fn delivered(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut delivered = self.delivered.clone();
        async move { while delivered.changed().await.is_ok() {} }
    }

    /// Waits until all output is delivered, however slow its reader is; at the
    /// deadline the rest is dropped, and the report says so.
    pub(crate) async fn finish(mut self, by: Deadline) -> IoReport {
        let done = match by.run(&mut self.relays).await {
            Ok(done) => done,
            Err(_) => {
                self.give_up.cancel();
                match Deadline::after(GIVEN_UP).run(&mut self.relays).await {
                    Ok(done) => done,
                    Err(_) => {
                        self.relays.abort();
                        (&mut self.relays).await
                    }
                }
            }
        };
        done.unwrap_or_else(|error| {
            tracing::error!(%error, "stdio relay died");
            IoReport {
                complete: false,
                closed: CloseReport::default(),
            }
        })
    }
}

impl Drop for ProcessIo {
    fn drop(&mut self) {
        self.give_up.cancel();
    }
}

async fn relay(
    fifos: Fifos,
    session: HostSession,
    give_up: CancellationToken,
    metrics: Metrics,
    undelivered: watch::Sender<()>,
) -> IoReport {
    let HostSession {
        input,
        output,
        error,
        handle,
    } = session;
    let open = OpenSession::count(&metrics, "stdio");
    // Ends with this relay, whatever ends that.
    let stdin = AbortOnDropHandle::new(tokio::spawn(copy_input(fifos.stdin, input)));
    let outputs = async {
        tokio::join!(
            copy_output(output, fifos.stdout, "stdout", &metrics, &give_up),
            copy_output(error, fifos.stderr, "stderr", &metrics, &give_up)
        )
    };
    let (stdout, stderr) = outputs.await;
    drop(undelivered);
    let complete = stdout.is_ok() && stderr.is_ok();
    for (stream, result) in [("stdout", stdout), ("stderr", stderr)] {
        if let Err(error) = result {
            tracing::warn!(stream, %error, "output cut");
        }
    }
    // A process that writes no more may still read.
    tokio::select! {
        exit = handle.exit() => tracing::debug!(?exit, "the process has ended"),
        () = give_up.cancelled() => {}
    }
    stdin.abort();
    // Its FIFO is closed once it has ended.
    if let Err(error) = stdin.await
        && !error.is_cancelled()
    {
        tracing::error!(%error, "stdin's relay died");
    }
    drop(open);
    let closed = handle.close(Deadline::after(CLOSE)).await;
    IoReport { complete, closed }
}

/// Copies stdin until its FIFO ends or the process reads no more.
async fn copy_input(fifo: Option<pipe::Receiver>, mut input: StreamWriter) {
    if let Some(mut fifo) = fifo {
        loop {
            match input.send_from(&mut fifo).await {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    tracing::debug!(%error, "the process reads no more stdin");
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "stdin lost");
                    return;
                }
            }
        }
    }
    input.finish();
}

/// Copies one output stream; without a FIFO its bytes are read and forgotten.
/// What has arrived and is not delivered before `give_up` is dropped and counted.
async fn copy_output(
    mut from: StreamReader,
    mut fifo: Option<pipe::Sender>,
    stream: &'static str,
    metrics: &Metrics,
    give_up: &CancellationToken,
) -> io::Result<()> {
    let bytes = metrics.session_bytes.with_label_values(&["stdio", stream]);
    let drop_rest = |rest: usize| {
        let dropped = metrics.dropped_bytes.with_label_values(&[stream]);
        dropped.inc_by(rest as u64);
    };
    loop {
        let chunk = give_up.run_until_cancelled(from.chunk()).await;
        let chunk = match chunk.unwrap_or_else(|| Err(given_up())) {
            Ok(Some(chunk)) => chunk,
            Ok(None) => {
                if let Some(fifo) = &fifo {
                    let read = has_been_read(fifo);
                    give_up.run_until_cancelled(read).await;
                }
                return Ok(());
            }
            Err(error) => {
                drop_rest(from.arrived());
                return Err(error);
            }
        };
        let count = chunk.len() as u64;
        let mut rest = chunk;
        while let Some(fifo) = fifo.as_mut()
            && !rest.is_empty()
        {
            let written = give_up.run_until_cancelled(fifo.write(&rest)).await;
            match written.unwrap_or_else(|| Err(given_up())) {
                Ok(written) => rest.advance(written),
                Err(error) => {
                    drop_rest(rest.len() + from.arrived());
                    return Err(error);
                }
            }
        }
        bytes.inc_by(count);
    }
}

/// Waits until a FIFO is empty, at most [`READ`]: containerd 1.6.20 closes the
/// reading end as soon as it hears of an exit, whatever is still in it. Nothing
/// tells when it is empty, so it is looked at again.
async fn has_been_read(fifo: &pipe::Sender) {
    let by = Deadline::after(READ);
    let mut pause = Duration::from_millis(1);
    while !by.passed() && rustix::io::ioctl_fionread(fifo).is_ok_and(|left| left > 0) {
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}

fn given_up() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "its reader was given up")
}

#[cfg(test)]
mod relay_tests;

#[cfg(test)]
mod tests {
    use podhull_types::{ContainerId, ExecId};
    use tokio::io::AsyncReadExt;

    use super::*;

    struct Stdin {
        _folder: tempfile::TempDir,
        path: PathBuf,
        fifo: pipe::Receiver,
        end: Option<StdinEnd>,
    }

    fn stdin_of(exec: bool) -> Stdin {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stdin");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut process = ProcessRef::init(ContainerId::new("c1").unwrap());
        process.exec = exec.then(|| ExecId::new("e1").unwrap());
        let stdio = Stdio {
            stdin: Some(path.clone()),
            ..Stdio::default()
        };
        let mut fifos = Fifos::open(&stdio, &process).unwrap();
        Stdin {
            _folder: folder,
            path,
            fifo: fifos.stdin.take().unwrap(),
            end: fifos.stdin_end.take(),
        }
    }

    impl Stdin {
        async fn written(&mut self, text: &str) {
            let mut writer = pipe::OpenOptions::new().open_sender(&self.path).unwrap();
            writer.write_all(text.as_bytes()).await.unwrap();
            let mut read = vec![0; text.len()];
            self.fifo.read_exact(&mut read).await.unwrap();
            assert_eq!(read, text.as_bytes());
        }

        async fn has_ended(&mut self) -> bool {
            let soon = Deadline::after(Duration::from_millis(200));
            let read = soon.run(self.fifo.read_u8()).await;
            read.is_ok_and(|read| read.is_err())
        }
    }

    #[tokio::test]
    async fn stdin_of_an_init_process_outlives_its_writers() {
        let mut stdin = stdin_of(false);
        assert!(!stdin.has_ended().await);
        stdin.written("one").await;
        assert!(!stdin.has_ended().await);
        stdin.written("two").await;
        stdin.end.take().unwrap().close();
        assert!(stdin.has_ended().await);
    }

    #[tokio::test]
    async fn stdin_of_an_exec_ends_with_its_client() {
        let mut stdin = stdin_of(true);
        assert!(!stdin.has_ended().await, "its client is yet to come");
        stdin.written("one").await;
        assert!(stdin.has_ended().await);
    }

    #[tokio::test]
    async fn stdin_of_an_exec_that_nobody_opened_can_be_closed() {
        let mut stdin = stdin_of(true);
        stdin.end.take().unwrap().close();
        assert!(stdin.has_ended().await);
    }
}
