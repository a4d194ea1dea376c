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
/// How the kernel's word of its end begins (Linux' kernel/panic.c).
const PANIC: &str = "Kernel panic - not syncing";
/// Characters quoted of it.
const PANIC_CHARS: usize = 256;

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
        // Ends with the last writer, and `open` tells it.
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

    /// The last lines, as text that is safe to print, and the one that says why the
    /// guest's kernel has panicked.
    pub(crate) fn tail(&self) -> String {
        let bytes: Vec<u8> = {
            let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
            ring.iter().copied().collect()
        };
        let (before, end) = bytes.split_at(bytes.len().saturating_sub(TAIL_BYTES));
        quote(
            &String::from_utf8_lossy(before),
            &String::from_utf8_lossy(end),
        )
    }
}

/// Of `end` the last lines. A panic's reason is further up: registers and the
/// call trace follow it.
fn quote(before: &str, end: &str) -> String {
    let mut last: Vec<String> = lines(end).collect();
    let older: Vec<String> = last
        .drain(..last.len().saturating_sub(TAIL_LINES))
        .collect();
    let panic = lines(before)
        .chain(older)
        .filter(|line| line.contains(PANIC))
        .last();
    let panic = panic.map(|line| line.chars().take(PANIC_CHARS).collect());
    let quoted: Vec<String> = panic.into_iter().chain(last).collect();
    quoted.join(" | ")
}

/// The guest writes what it likes: no control character gets into an error.
fn lines(text: &str) -> impl Iterator<Item = String> {
    text.lines()
        .map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>())
        .filter(|line| !line.trim().is_empty())
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
        let tail = quote("", &text);
        assert!(tail.ends_with("line 19 | [0m"), "{tail}");
        assert!(!tail.contains("line 9 "), "{tail}");
        assert!(!tail.contains('\x1b') && !tail.contains('\n'));
    }

    #[test]
    fn a_panics_reason_is_quoted_before_the_last_lines() {
        let reason = format!("[    0.4] {PANIC}: no root\n");
        let trace: String = (0..20).map(|n| format!("frame {n}\n")).collect();
        for (before, end) in [
            (&*reason, &*trace),
            ("", &(reason.clone() + &trace)),
            (&("more\n".repeat(99) + &reason), &trace),
        ] {
            let quoted = quote(before, end);
            let expected = "[    0.4] Kernel panic - not syncing: no root | frame 8 | ";
            assert!(quoted.starts_with(expected), "{quoted}");
            assert!(quoted.ends_with(" | frame 19"), "{quoted}");
        }
        assert_eq!(quote("", &reason), reason.trim_end(), "once");
        let endless = PANIC.to_owned() + &"x".repeat(10_000);
        assert!(quote(&endless, "end").len() < 300);
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
