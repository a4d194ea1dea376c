// SPDX-License-Identifier: Apache-2.0
//! How many cases went how.

use std::fmt::{self, Write};
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::compare::Verdict;

/// How much of an error is told again at the end.
const FIRST_LINE: usize = 200;

/// The figures of one setup.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Figures {
    setup: String,
    passed: u32,
    skipped: u32,
    failed: u32,
    /// Of those that passed with podhull: all that they saw is as with runc.
    same: u32,
    /// They say nothing of what they see; what they expect holds with both.
    asserted: u32,
    /// But for differences with a reason.
    differing: u32,
    seconds: u64,
}

/// The figures of a run, and what failed in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tally {
    setups: Vec<Figures>,
    /// One line each.
    failed: Vec<String>,
}

impl Figures {
    fn new(setup: &str) -> Self {
        Self {
            setup: setup.to_owned(),
            ..Self::default()
        }
    }

    fn cells(&self) -> [String; 9] {
        let counts = [
            self.passed + self.failed,
            self.same,
            self.asserted,
            self.differing,
            self.passed - self.same - self.asserted - self.differing,
            self.failed,
            self.skipped,
        ];
        let [cases, same, asserted, differing, alone, failed, skipped] =
            counts.map(|count| count.to_string());
        let (setup, time) = (self.setup.clone(), format!("{} s", self.seconds));
        [
            setup, cases, same, asserted, differing, alone, failed, skipped, time,
        ]
    }
}

/// What [`Figures::cells`] are.
const HEADS: [&str; 9] = [
    "setup",
    "cases",
    "same as runc",
    "same by what they expect",
    "differing with reason",
    "not compared",
    "failing",
    "skipped",
    "time",
];

impl Tally {
    /// The figures of a setup that begins.
    pub(crate) fn of(setup: &str) -> Self {
        Self {
            setups: vec![Figures::new(setup)],
            failed: Vec::new(),
        }
    }

    fn figures(&mut self) -> &mut Figures {
        if self.setups.is_empty() {
            self.setups.push(Figures::default());
        }
        let last = self.setups.len() - 1;
        &mut self.setups[last]
    }

    /// Notes a case that passed, and how it compares with runc.
    pub(crate) fn pass(&mut self, verdict: Option<Verdict>) {
        let figures = self.figures();
        figures.passed += 1;
        match verdict {
            Some(Verdict::Same) => figures.same += 1,
            Some(Verdict::Asserted) => figures.asserted += 1,
            Some(Verdict::Differs) => figures.differing += 1,
            None => {}
        }
    }

    /// Notes a case that said why it does not run.
    pub(crate) fn skip(&mut self) {
        self.figures().skipped += 1;
    }

    /// Notes what failed, with the first line of its error.
    pub(crate) fn fail(&mut self, what: &str, error: &str) {
        let line = error.lines().next().unwrap_or_default();
        let line: String = line.chars().take(FIRST_LINE).collect();
        self.failed.push(format!("{what}: {line}"));
        self.figures().failed += 1;
    }

    /// Notes how long the setup took.
    pub(crate) fn took(&mut self, time: Duration) {
        self.figures().seconds = time.as_secs();
    }

    /// Adds what another node counted.
    pub(crate) fn add(&mut self, other: Self) {
        self.setups.extend(other.setups);
        self.failed.extend(other.failed);
    }

    /// True if nothing failed.
    pub(crate) fn is_green(&self) -> bool {
        self.failed.is_empty()
    }

    /// A line for each failure, for the end of a log.
    pub(crate) fn failures(&self) -> String {
        let lines = self.failed.iter().map(|line| format!("failed: {line}\n"));
        lines.collect()
    }

    /// A row for each setup.
    pub(crate) fn table(&self) -> String {
        let mut rows = vec![HEADS.map(str::to_owned)];
        rows.extend(self.setups.iter().map(Figures::cells));
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
        let widths: Vec<_> = (0..HEADS.len()).filter_map(width).collect();
        let mut text = String::new();
        for row in &rows {
            let mut line = String::new();
            for (number, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let _ = match number {
                    0 => write!(line, "{cell:<width$}"),
                    _ => write!(line, "  {cell:>width$}"),
                };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    /// Hands the figures from a node to who started it.
    pub(crate) fn keep(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_vec(self).context("encode the figures")?;
        fs::write(file, text).with_context(|| format!("write {}", file.display()))
    }

    /// Takes what [`Tally::keep`] wrote.
    pub(crate) fn take(file: &Path) -> Result<Self> {
        let text = fs::read(file).with_context(|| format!("read {}", file.display()))?;
        fs::remove_file(file).with_context(|| format!("remove {}", file.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("understand {}", file.display()))
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = |of: fn(&Figures) -> u32| self.setups.iter().map(of).sum::<u32>();
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            sum(|figures| figures.passed),
            self.failed.len(),
            sum(|figures| figures.skipped)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setup_has_a_row_that_adds_up() {
        let mut tally = Tally::of("podhull on 2.4");
        for verdict in [Some(Verdict::Same), Some(Verdict::Asserted), None] {
            tally.pass(verdict);
        }
        tally.pass(Some(Verdict::Differs));
        tally.skip();
        tally.fail("pod_x", "broken\nand more");
        tally.took(Duration::from_millis(2900));
        let mut all = Tally::of("runc on 2.4");
        all.pass(None);
        all.add(tally);
        let table = all.table();
        let rows: Vec<Vec<_>> = table
            .lines()
            .skip(1)
            .map(|line| {
                line.split("  ")
                    .map(str::trim)
                    .filter(|cell| !cell.is_empty())
                    .collect()
            })
            .collect();
        assert_eq!(
            rows[0],
            ["runc on 2.4", "1", "0", "0", "0", "1", "0", "0", "0 s"]
        );
        assert_eq!(
            rows[1],
            ["podhull on 2.4", "5", "1", "1", "1", "1", "1", "1", "2 s"]
        );
        assert_eq!(all.to_string(), "5 passed, 1 failed, 1 skipped");
        assert_eq!(all.failures(), "failed: pod_x: broken\n");
        assert!(!all.is_green());
    }

    #[test]
    fn what_is_kept_is_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("figures");
        let mut tally = Tally::of("runc on 1.6");
        tally.skip();
        tally.keep(&file).unwrap();
        assert_eq!(Tally::take(&file).unwrap(), tally);
        assert!(Tally::take(&file).is_err());
    }
}
