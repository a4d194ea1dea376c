// SPDX-License-Identifier: Apache-2.0
//! What is quoted when something has failed.

use std::fs;
use std::path::Path;

/// Where the shims keep their run folders.
const RUN: &str = "/run/podhull";

/// The last `lines` of containerd's log, and of the log of each shim that
/// still has a run folder.
#[must_use]
pub fn logs(node_folder: &Path, lines: usize) -> String {
    let mut text = quote(&node_folder.join(crate::containerd::LOG), lines);
    let mut shims = 0;
    for entry in fs::read_dir(RUN).into_iter().flatten().flatten() {
        let log = entry.path().join("shim.log");
        if log.exists() {
            text += &quote(&log, lines);
            shims += 1;
        }
    }
    if shims == 0 {
        text += "No shim has left a log below /run/podhull; what it logged is in containerd's.\n";
    }
    text
}

fn quote(path: &Path, lines: usize) -> String {
    let log = match fs::read(path) {
        Ok(log) => log,
        Err(error) => return format!("--- {}: {error}\n", path.display()),
    };
    let log = String::from_utf8_lossy(&log);
    format!(
        "--- the end of {}:\n{}\n",
        path.display(),
        last(&log, lines)
    )
}

/// The last `lines` of `text`.
#[must_use]
pub fn last(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_lines_are_quoted() {
        assert_eq!(last("a\nb\nc\n", 2), "b\nc");
        assert_eq!(last("a\n", 2), "a");
    }

    #[test]
    fn a_missing_log_is_said() {
        assert!(quote(Path::new("/nonexistent/log"), 3).contains("/nonexistent/log"));
    }
}
