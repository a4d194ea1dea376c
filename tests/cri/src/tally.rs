// SPDX-License-Identifier: Apache-2.0
//! How many cases went how.

use std::fmt;
use std::fs;
use std::ops::AddAssign;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

/// How much of an error is told again at the end.
const FIRST_LINE: usize = 200;

/// The figures of a run, and what failed in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u32,
    pub(crate) skipped: u32,
    /// Of those that passed with podhull: what they saw is what runc gives.
    pub(crate) same: u32,
    /// Of those: but for differences with a reason.
    pub(crate) differing: u32,
    /// One line each.
    failed: Vec<String>,
}

impl Tally {
    /// Notes what failed, with the first line of its error.
    pub(crate) fn fail(&mut self, what: &str, error: &str) {
        let line = error.lines().next().unwrap_or_default();
        let line: String = line.chars().take(FIRST_LINE).collect();
        self.failed.push(format!("{what}: {line}"));
    }

    /// A line on how it compares with runc.
    pub(crate) fn beside_runc(&self) -> String {
        format!(
            "beside runc: {} the same, {} differing for a reason, {} not compared",
            self.same,
            self.differing,
            self.passed - self.same - self.differing
        )
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

    /// Hands the figures from a node to who started it.
    pub(crate) fn keep(&self, file: &Path) -> Result<()> {
        let mut text = format!(
            "{} {} {} {}\n",
            self.passed, self.skipped, self.same, self.differing
        );
        text.extend(self.failed.iter().map(|line| format!("{line}\n")));
        fs::write(file, text).with_context(|| format!("write {}", file.display()))
    }

    /// Takes what [`Tally::keep`] wrote.
    pub(crate) fn take(file: &Path) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        fs::remove_file(file).with_context(|| format!("remove {}", file.display()))?;
        let mut lines = text.lines();
        let figures = lines.next().context("no figures")?.split(' ');
        let figures: Vec<u32> = figures
            .map(str::parse)
            .collect::<Result<_, _>>()
            .context("a figure")?;
        let [passed, skipped, same, differing] = figures[..] else {
            bail!("{} figures instead of 4", figures.len());
        };
        Ok(Self {
            passed,
            skipped,
            same,
            differing,
            failed: lines.map(str::to_owned).collect(),
        })
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.skipped += other.skipped;
        self.same += other.same;
        self.differing += other.differing;
        self.failed.extend(other.failed);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed,
            self.failed.len(),
            self.skipped
        )
    }
}
