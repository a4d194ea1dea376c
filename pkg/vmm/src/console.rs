// SPDX-License-Identifier: Apache-2.0
//! The last bytes that a child, or the guest's console, wrote.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::OFlag;
use podhull_types::Deadline;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::watch;

/// Lines quoted in an error.
const TAIL_LINES: usize = 12;
/// Bytes quoted in an error.
const TAIL_BYTES: usize = 2048;

/// A ring that a pipe is drained into; the writer is never held up.
#[derive(Debug, Clone)]
pub(crate) struct Console {
    ring: Arc<Mutex<VecDeque<u8>>>,
    /// Closed with the last writer, once everything is in the ring.
    open: watch::Receiver<()>,
}

impl Console {
    /// Makes the ring; returns the writing end for a child.
    pub(crate) fn new(capacity: usize) -> io::Result<(Self, OwnedFd)> {
        let (reading, writing) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let mut reading = pipe::Receiver::from_owned_fd(reading)?;
        let ring = Arc::new(Mutex::new(VecDeque::new()));
        let (opened, open) = watch::channel(());
        let console = Self {
            ring: Arc::clone(&ring),
            open,
        };
        // Ends with the last writer.
        tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            while let Ok(count @ 1..) = reading.read(&mut buffer).await {
                let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
                ring.extend(&buffer[..count]);
                let excess = ring.len().saturating_sub(capacity);
                ring.drain(..excess);
            }
            drop(opened);
        });
        Ok((console, writing))
    }

    /// Waits for the last writer's end, at most until `by`.
    pub(crate) async fn ended(&self, by: Deadline) {
        let mut open = self.open.clone();
        // An error means that the sender is gone: the end.
        let ended = by.run(open.changed()).await;
        tracing::trace!(?ended, "console");
    }

    /// The last lines, as text that is safe to print.
    pub(crate) fn tail(&self) -> String {
        let bytes: Vec<u8> = {
            let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
            let skip = ring.len().saturating_sub(TAIL_BYTES);
            ring.iter().skip(skip).copied().collect()
        };
        last_lines(&String::from_utf8_lossy(&bytes))
    }
}

/// The guest writes what it likes: no control character gets into an error.
fn last_lines(text: &str) -> String {
    let lines: Vec<String> = text
        .lines()
        .map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>())
        .filter(|line| !line.trim().is_empty())
        .collect();
    let skip = lines.len().saturating_sub(TAIL_LINES);
    lines[skip..].join(" | ")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn lines_are_cleaned_and_cut() {
        let text = (0..20)
            .map(|n| format!("line {n}\r\n\x1b[0m\n"))
            .collect::<String>();
        let tail = last_lines(&text);
        assert!(tail.ends_with("line 19 | [0m"), "{tail}");
        assert!(!tail.contains("line 9 "), "{tail}");
        assert!(!tail.contains('\x1b') && !tail.contains('\n'));
    }

    #[tokio::test]
    async fn the_ring_keeps_the_end() {
        let (console, writing) = Console::new(64).unwrap();
        let mut writing = std::fs::File::from(writing);
        for _ in 0..1000 {
            writing.write_all(b"0123456789\n").unwrap();
        }
        writing.write_all(b"panic: last words\n").unwrap();
        tokio::time::timeout(std::time::Duration::from_secs(5), async {
            while !console.tail().contains("last words") {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
        assert!(console.tail().len() <= 64 + 3 * 6);
    }
}
