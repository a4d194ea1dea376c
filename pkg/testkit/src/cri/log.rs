// SPDX-License-Identifier: Apache-2.0
//! Container logs as containerd writes them for the kubelet:
//! `2026-01-02T03:04:05.678901234Z stdout F text`.

use anyhow::{Context, Result, bail};

/// What a container wrote, stream by stream.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Log {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Log {
    /// Reads a log file's content.
    ///
    /// # Errors
    /// If a line has not the format.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut log = Self::default();
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            let line = line.strip_suffix(b"\n").unwrap_or(line);
            let mut fields = line.splitn(4, |byte| *byte == b' ');
            let (_time, stream, tag) = (fields.next(), fields.next(), fields.next());
            let text = fields
                .next()
                .with_context(|| format!("log line {}", line.escape_ascii()))?;
            let stream = match stream {
                Some(b"stdout") => &mut log.stdout,
                Some(b"stderr") => &mut log.stderr,
                _ => bail!("unknown stream in log line {}", line.escape_ascii()),
            };
            stream.extend_from_slice(text);
            // P marks a part of a line that goes on in the next record.
            if tag == Some(b"F") {
                stream.push(b'\n');
            }
        }
        Ok(log)
    }

    /// Standard output as text, without white space around it.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// Standard error as text, without white space around it.
    #[must_use]
    pub fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_told_apart_and_parts_joined() {
        let log =
            Log::parse(b"T stdout P ab\nT stderr F oops  x\nT stdout F c\nT stdout F \n").unwrap();
        assert_eq!(log.stdout, b"abc\n\n");
        assert_eq!(log.stderr, b"oops  x\n");
    }

    #[test]
    fn a_line_of_another_shape_is_an_error() {
        assert!(Log::parse(b"hello\n").is_err());
        assert!(Log::parse(b"T stdin F x\n").is_err());
    }
}
