// SPDX-License-Identifier: Apache-2.0
//! Where log lines go: containerd's FIFO, if there is one, and a capped file.

use std::fs::{File, OpenOptions};
use std::io::{self, Stderr, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tracing::{Level, Metadata};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::writer::{EitherWriter, Tee};

/// Libraries whose debug lines drown ours; a filter that names them has the last
/// word.
const QUIET: &str = "h2=info,hyper=info,hyper_util=info,tower=info,netlink_proto=info";
/// Bytes of a log file before it is replaced; one older file is kept.
const FILE_CAP: u64 = 1 << 20;

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is malformed.
    #[error("log filter {filter:?}")]
    Filter {
        /// The filter.
        filter: String,
        /// What is wrong with it.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// The log file cannot be opened.
    #[error("open log file {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The process logs already.
    #[error("logging is set up already")]
    Twice,
}

/// Sets up logging for the whole process, once.
///
/// `fifo` is the FIFO `log` of containerd's bundle: written without blocking, so
/// that neither a full pipe nor an absent containerd stops the process. `file`
/// is a file of our own, capped.
///
/// # Errors
/// [`LogError`] if the filter or the file cannot be used. An absent FIFO is no
/// error: containerd 1.x and tests may have none.
pub fn init(filter: &str, fifo: Option<&Path>, file: Option<&Path>) -> Result<(), LogError> {
    let file = file.map(CappedFile::open).transpose()?;
    start(filter, fifo.and_then(open_fifo), file, false)
}

/// Sets up logging for a short process that works beside, or after, the one that
/// `file` is the log of: its lines are added if the file is there, which is not
/// made. With `warns`, warnings go to standard error as well.
///
/// # Errors
/// [`LogError`] if the filter cannot be used.
pub fn init_beside(filter: &str, file: &Path, warns: bool) -> Result<(), LogError> {
    start(filter, None, CappedFile::existing(file), warns)
}

fn start(
    filter: &str,
    fifo: Option<File>,
    file: Option<CappedFile>,
    warns: bool,
) -> Result<(), LogError> {
    let env =
        EnvFilter::try_new(format!("{QUIET},{filter}")).map_err(|source| LogError::Filter {
            filter: filter.to_owned(),
            source,
        })?;
    let sinks = Sinks(Arc::new(Inner {
        fifo,
        file: file.map(Mutex::new),
        warns,
        dropped: AtomicU64::new(0),
    }));
    tracing_subscriber::fmt()
        .with_env_filter(env)
        .with_ansi(false)
        .with_writer(sinks)
        .try_init()
        .map_err(|_| LogError::Twice)
}

/// Puts panics into the log; nobody reads standard error.
pub fn panics() {
    std::panic::set_hook(Box::new(|info| tracing::error!(%info, "panic")));
}

fn open_fifo(path: &Path) -> Option<File> {
    // Opening for reading too: the open succeeds before containerd reads, and
    // containerd's death does not turn writes into errors.
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)
        .ok()
}

#[derive(Debug)]
struct CappedFile {
    path: PathBuf,
    file: File,
    written: u64,
    cap: u64,
}

impl CappedFile {
    fn open(path: &Path) -> Result<Self, LogError> {
        let failed = |source| LogError::File {
            path: path.into(),
            source,
        };
        let file = create(path).map_err(failed)?;
        let written = file.metadata().map_err(failed)?.len();
        Ok(Self {
            path: path.into(),
            file,
            written,
            cap: FILE_CAP,
        })
    }

    /// Another process's, which sees to its cap.
    fn existing(path: &Path) -> Option<Self> {
        let file = OpenOptions::new().append(true).open(path).ok()?;
        Some(Self {
            path: path.into(),
            file,
            written: 0,
            cap: u64::MAX,
        })
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        let length = line.len() as u64;
        if self.written + length > self.cap {
            std::fs::rename(&self.path, self.path.with_extension("1"))?;
            self.file = create(&self.path)?;
            self.written = 0;
        }
        self.file.write_all(line)?;
        self.written += length;
        Ok(())
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

#[derive(Debug)]
struct Inner {
    fifo: Option<File>,
    file: Option<Mutex<CappedFile>>,
    /// Warnings go to standard error, too.
    warns: bool,
    dropped: AtomicU64,
}

/// Writes each line to all places; what one cannot take is dropped there.
#[derive(Debug, Clone)]
struct Sinks(Arc<Inner>);

impl<'a> MakeWriter<'a> for Sinks {
    type Writer = EitherWriter<Tee<Stderr, Self>, Self>;

    fn make_writer(&'a self) -> Self::Writer {
        EitherWriter::B(self.clone())
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Self::Writer {
        if self.0.warns && *meta.level() <= Level::WARN {
            EitherWriter::A(Tee::new(io::stderr(), self.clone()))
        } else {
            self.make_writer()
        }
    }
}

impl Write for Sinks {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let fifo = self
            .0
            .fifo
            .as_ref()
            .map_or(Ok(line.len()), |mut fifo| fifo.write(line));
        let file = self.0.file.as_ref().map_or(Ok(()), |file| {
            file.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write(line)
        });
        if fifo.is_err() || file.is_err() {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::Mode;

    use super::*;

    #[test]
    fn a_full_fifo_drops_lines_and_never_blocks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        let inner = Inner {
            fifo: open_fifo(&path),
            file: None,
            warns: false,
            dropped: AtomicU64::new(0),
        };
        let mut sinks = Sinks(Arc::new(inner));
        for _ in 0..100 {
            assert_eq!(sinks.write(&[b'x'; 4096]).unwrap(), 4096);
        }
        assert!(sinks.0.dropped.load(Ordering::Relaxed) > 0);
    }

    #[test]
    fn a_file_keeps_to_its_cap() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shim.log");
        let mut file = CappedFile::open(&path).unwrap();
        for _ in 0..600 {
            file.write(&[b'x'; 4096]).unwrap();
        }
        assert!(path.metadata().unwrap().len() <= FILE_CAP);
        assert!(path.with_extension("1").metadata().unwrap().len() <= FILE_CAP);
    }

    #[test]
    fn a_process_beside_adds_to_a_log_and_makes_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shim.log");
        assert!(CappedFile::existing(&path).is_none());
        assert!(!path.exists());
        CappedFile::open(&path).unwrap().write(b"shim\n").unwrap();
        let mut beside = CappedFile::existing(&path).unwrap();
        beside.write(b"delete\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"shim\ndelete\n");
    }
}
