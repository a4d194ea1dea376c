// SPDX-License-Identifier: Apache-2.0
//! No transport may be dropped without its close. A shim counts those that are,
//! its guest's too, and says so in its log, which containerd writes into its own.
//! The numbers cannot be lost, and go with the shim; the lines stay, also of a
//! shim that ends within the case.

use std::fs;
use std::io;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use podhull_testkit::Containerd;

use crate::held;

/// A shim that serves answers within this.
const ANSWERS: Duration = Duration::from_secs(5);
const COUNTED: [&str; 2] = [
    "podhull_transport_dropped_unclosed_total ",
    "podhull_guest_errors_total{kind=\"transport_dropped_unclosed\"} ",
];
const SAID: [&str; 2] = [
    "transport dropped without close",
    "kind=\"transport_dropped_unclosed\"",
];

/// Fails if a shim that lives has counted one.
pub(crate) async fn counted() -> Result<()> {
    let folders = match fs::read_dir("/run/podhull") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        folders => folders.context("podhull's run folder")?,
    };
    for folder in folders {
        let folder = folder?.path();
        let Ok(told) = tokio::time::timeout(ANSWERS, held::metrics(&folder)).await else {
            // It ends, or hangs.
            continue;
        };
        match told {
            Ok(text) => none_counted(&text)?,
            // It has ended.
            Err(error) if error.is::<io::Error>() => {}
            Err(error) => return Err(error.context(folder.display().to_string())),
        }
    }
    Ok(())
}

fn none_counted(metrics: &str) -> Result<()> {
    for line in metrics.lines() {
        let counted = COUNTED.iter().find_map(|name| line.strip_prefix(name));
        if counted.is_some_and(|number| number != "0") {
            bail!("a shim counts what was not closed: {line}");
        }
    }
    Ok(())
}

/// How much of containerd's log was searched.
#[derive(Debug)]
pub(crate) struct Searched(u64);

impl Searched {
    /// Everything until now.
    pub(crate) fn all(containerd: &Containerd) -> Result<Self> {
        Ok(Self(containerd.log_size()?))
    }

    /// Fails if a shim has said it since.
    pub(crate) fn on(&mut self, containerd: &Containerd) -> Result<()> {
        let log = containerd.log_since(self.0)?;
        self.0 += log.len() as u64;
        none_said(&String::from_utf8_lossy(&log))
    }
}

fn none_said(log: &str) -> Result<()> {
    let said = |line: &&str| SAID.iter().any(|words| line.contains(words));
    match log.lines().find(said) {
        Some(line) => bail!("a shim says: {line}"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_counted_or_said_fails() {
        let [host, guest] = COUNTED;
        none_counted(&format!("# TYPE {host}counter\n{host}0\n{guest}0\n")).unwrap();
        for name in COUNTED {
            none_counted(&format!("other 1\n{name}2\n")).unwrap_err();
        }
        none_said("INFO booted\nWARN heartbeat suspect=true\n").unwrap();
        for words in SAID {
            none_said(&format!("INFO booted\nWARN x: {words} peer=guest\n")).unwrap_err();
        }
    }
}
