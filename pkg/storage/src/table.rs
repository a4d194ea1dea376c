// SPDX-License-Identifier: Apache-2.0
//! The mounts below a folder, from the kernel's mountinfo.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::StorageError;

/// Of the calling thread: tests give theirs a mount namespace of its own.
const TABLE: &str = "/proc/thread-self/mountinfo";

/// Mount points at and below `folder`, the last mounted first.
pub(crate) fn below(folder: &Path) -> Result<Vec<PathBuf>, StorageError> {
    let text = std::fs::read_to_string(TABLE).map_err(StorageError::path("read", TABLE))?;
    let mut found = parse(&text);
    found.retain(|point| point.starts_with(folder));
    found.reverse();
    Ok(found)
}

fn parse(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(unescape)
        .collect()
}

/// Spaces and the like stand there as `\040`.
fn unescape(field: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| first == b'\\');
        let value = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(value.unwrap_or(first));
        rest = if value.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_with_their_escapes() {
        let text = "30 20 0:26 / /a\\040b rw - tmpfs tmpfs rw\n31 30 0:27 / /c rw - x y z\n";
        assert_eq!(parse(text), [PathBuf::from("/a b"), PathBuf::from("/c")]);
        assert_eq!(unescape("\\134x\\04"), PathBuf::from("\\x\\04"));
    }
}
