// SPDX-License-Identifier: Apache-2.0
//! How many cases went how.

use std::fmt;
use std::fs;
use std::ops::AddAssign;
use std::path::Path;

use anyhow::{Context as _, Result};

/// The figures of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
    pub(crate) skipped: u32,
}

impl Tally {
    /// Hands the figures from a node to who started it.
    pub(crate) fn keep(self, file: &Path) -> Result<()> {
        let text = format!("{} {} {}", self.passed, self.failed, self.skipped);
        fs::write(file, text).with_context(|| format!("write {}", file.display()))
    }

    /// Takes what [`Tally::keep`] wrote.
    pub(crate) fn take(file: &Path) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        fs::remove_file(file).with_context(|| format!("remove {}", file.display()))?;
        let mut numbers = text.split(' ').map(str::parse);
        let mut next = || {
            numbers
                .next()
                .context("too few figures")?
                .context("a figure")
        };
        Ok(Self {
            passed: next()?,
            failed: next()?,
            skipped: next()?,
        })
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}
