// SPDX-License-Identifier: Apache-2.0
//! The phases of the guest's boot, drawn as bars one below the other.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Where podhull keeps a folder per sandbox.
const RUN: &str = "/run/podhull";
const WIDTH: usize = 44;

/// A moment of the boot, and the time since its start.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Moment {
    name: String,
    ms: f64,
}

/// The moments of a sandbox's boot, from its `boot.json`.
pub(crate) fn read(sandbox: &str) -> Result<Vec<Moment>> {
    let path = folder_of(sandbox)?.join("boot.json");
    let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    parse(&text).with_context(|| format!("understand {}", path.display()))
}

/// The run folder whose record names the sandbox.
fn folder_of(sandbox: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(RUN).with_context(|| format!("read {RUN}"))?;
    let is_its = |folder: &Path| {
        fs::read(folder.join("sandbox.json"))
            .ok()
            .and_then(|text| serde_json::from_slice::<Value>(&text).ok())
            .is_some_and(|record| record["id"] == *sandbox)
    };
    entries
        .flatten()
        .map(|entry| entry.path())
        .find(|folder| is_its(folder))
        .with_context(|| format!("no folder of sandbox {sandbox} in {RUN}"))
}

fn parse(text: &[u8]) -> Result<Vec<Moment>> {
    let value: Value = serde_json::from_slice(text)?;
    let phases = value["phases"].as_array().context("no phases")?;
    let moments: Option<Vec<Moment>> = phases
        .iter()
        .map(|phase| {
            Some(Moment {
                name: phase["name"].as_str()?.to_owned(),
                ms: phase["ms"].as_f64()?,
            })
        })
        .collect();
    let moments = moments.context("a phase without name or time")?;
    ensure!(!moments.is_empty(), "no phases");
    Ok(moments)
}

/// One line per moment; its bar spans the time since the moment before.
pub(crate) fn waterfall(moments: &[Moment]) -> Vec<String> {
    let end = moments
        .iter()
        .fold(1.0_f64, |end, moment| end.max(moment.ms));
    let names = moments
        .iter()
        .map(|moment| moment.name.len())
        .max()
        .unwrap_or(0);
    let mut before = 0.0;
    let mut lines = Vec::new();
    for moment in moments {
        let (from, to) = (column(before, end), column(moment.ms, end));
        // Even the shortest phase is seen.
        let from = from.min(WIDTH - 1);
        let bar = "#".repeat(to.saturating_sub(from).max(1));
        let name = moment.name.replace('_', " ");
        lines.push(format!(
            "{name:<names$}  {:>6.0} ms  |{:from$}{bar:<rest$}|",
            moment.ms,
            "",
            rest = WIDTH - from,
        ));
        before = moment.ms;
    }
    lines
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a share between 0 and 1 of a small width"
)]
fn column(ms: f64, end: f64) -> usize {
    ((ms / end).clamp(0.0, 1.0) * WIDTH as f64).round() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_follow_each_other_and_keep_the_width() {
        let moments = parse(
            br#"{"phases": [{"name": "start_called", "ms": 0.0}, {"name": "b", "ms": 50.2},
                {"name": "c", "ms": 50.3}, {"name": "d", "ms": 100.0}]}"#,
        )
        .unwrap();
        let lines = waterfall(&moments);
        let bars: Vec<_> = lines
            .iter()
            .map(|line| line.split('|').nth(1).unwrap())
            .collect();
        assert!(bars.iter().all(|bar| bar.len() == WIDTH), "{lines:#?}");
        assert_eq!(bars[1].trim_end(), "#".repeat(WIDTH / 2));
        assert_eq!(bars[2].trim(), "#");
        assert!(bars[3].ends_with('#'));
        assert!(
            lines[1].starts_with("b                 50 ms"),
            "{}",
            lines[1]
        );
    }

    #[test]
    fn a_file_without_phases_is_refused() {
        assert!(parse(b"{}").is_err());
        assert!(parse(br#"{"phases": []}"#).is_err());
        assert!(parse(br#"{"phases": [{"name": "x"}]}"#).is_err());
    }
}
