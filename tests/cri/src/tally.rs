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

/// The figures of one setup, and what failed in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Figures {
    setup: String,
    passed: u32,
    skipped: u32,
    /// Of those that passed with podhull: all that they saw is as with runc.
    same: u32,
    /// They say nothing of what they see; what they expect holds with both.
    asserted: u32,
    /// But for differences with a reason.
    differing: u32,
    /// One line each.
    failed: Vec<String>,
    seconds: u64,
}

impl Figures {
    /// Those of a setup that begins.
    pub(crate) fn of(setup: &str) -> Self {
        Self {
            setup: setup.to_owned(),
            ..Self::default()
        }
    }

    /// Notes a case that passed, and how it compares with runc.
    pub(crate) fn pass(&mut self, verdict: Option<Verdict>) {
        self.passed += 1;
        match verdict {
            Some(Verdict::Same) => self.same += 1,
            Some(Verdict::Asserted) => self.asserted += 1,
            Some(Verdict::Differs) => self.differing += 1,
            None => {}
        }
    }

    /// Notes a case that said why it does not run.
    pub(crate) fn skip(&mut self) {
        self.skipped += 1;
    }

    /// Notes what failed, with the first line of its error.
    pub(crate) fn fail(&mut self, what: &str, error: &str) {
        let line = error.lines().next().unwrap_or_default();
        let line: String = line.chars().take(FIRST_LINE).collect();
        self.failed.push(format!("{what}: {line}"));
    }

    /// Notes how long it took.
    pub(crate) fn took(&mut self, time: Duration) {
        self.seconds = time.as_secs();
    }

    /// How many passed, failed and were skipped.
    fn counts(&self) -> [u32; 3] {
        let failed = u32::try_from(self.failed.len()).unwrap_or(u32::MAX);
        [self.passed, failed, self.skipped]
    }

    fn cells(&self) -> [String; 9] {
        let [passed, failed, skipped] = self.counts();
        let counts = [
            passed + failed,
            self.same,
            self.asserted,
            self.differing,
            passed - self.same - self.asserted - self.differing,
            failed,
            skipped,
        ];
        let [cases, same, asserted, differing, alone, failed, skipped] =
            counts.map(|count| count.to_string());
        let (setup, time) = (self.setup.clone(), format!("{} s", self.seconds));
        [
            setup, cases, same, asserted, differing, alone, failed, skipped, time,
        ]
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [passed, failed, skipped] = self.counts();
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
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

/// The figures of a run, a setup after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tally(Vec<Figures>);

impl Tally {
    /// Adds those of a setup.
    pub(crate) fn push(&mut self, figures: Figures) {
        self.0.push(figures);
    }

    /// Adds what another node counted.
    pub(crate) fn add(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// True if nothing failed.
    pub(crate) fn is_green(&self) -> bool {
        self.0.iter().all(|figures| figures.failed.is_empty())
    }

    /// A line for each failure, for the end of a log.
    pub(crate) fn failures(&self) -> String {
        let lines = self.0.iter().flat_map(|figures| &figures.failed);
        lines.map(|line| format!("failed: {line}\n")).collect()
    }

    /// A row for each setup.
    pub(crate) fn table(&self) -> String {
        let mut rows = vec![HEADS.map(str::to_owned)];
        rows.extend(self.0.iter().map(Figures::cells));
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
        let mut all = Figures::default();
        for figures in &self.0 {
            all.passed += figures.passed;
            all.skipped += figures.skipped;
            all.failed.extend_from_slice(&figures.failed);
        }
        all.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setup_has_a_row_that_adds_up() {
        let mut podhull = Figures::of("podhull on 2.4");
        for verdict in [Some(Verdict::Same), Some(Verdict::Asserted), None] {
            podhull.pass(verdict);
        }
        podhull.pass(Some(Verdict::Differs));
        podhull.skip();
        podhull.fail("pod_x", "broken\nand more");
        podhull.took(Duration::from_millis(2900));
        let mut runc = Figures::of("runc on 2.4");
        runc.pass(None);
        let (mut all, mut other) = (Tally::default(), Tally::default());
        all.push(runc);
        other.push(podhull);
        all.add(other);
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
        let mut figures = Figures::of("runc on 1.6");
        figures.skip();
        figures.fail("pod_x", "broken");
        let mut tally = Tally::default();
        tally.push(figures);
        tally.keep(&file).unwrap();
        assert_eq!(Tally::take(&file).unwrap(), tally);
        assert!(Tally::take(&file).is_err());
    }
}
