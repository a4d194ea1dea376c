// SPDX-License-Identifier: Apache-2.0
//! What closing something did.

use std::fmt;

/// How one step of closing ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// As it should.
    Clean,
    /// The deadline passed; what that means is said in words.
    Forced(String),
    /// It failed; later steps ran all the same.
    Failed(String),
}

/// The steps of one closing, in the order in which they ran.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "a step of closing may have failed"]
pub struct CloseReport {
    steps: Vec<(&'static str, Outcome)>,
}

impl CloseReport {
    /// A report of one step.
    pub fn of(step: &'static str, outcome: Outcome) -> Self {
        Self {
            steps: vec![(step, outcome)],
        }
    }

    /// Adds a step.
    pub fn push(&mut self, step: &'static str, outcome: Outcome) {
        self.steps.push((step, outcome));
    }

    /// Adds the steps of another report.
    pub fn extend(&mut self, other: Self) {
        self.steps.extend(other.steps);
    }

    /// The steps and how each ended.
    pub fn steps(&self) -> impl Iterator<Item = (&'static str, &Outcome)> {
        self.steps.iter().map(|(step, outcome)| (*step, outcome))
    }

    /// Whether every step ended as it should.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.steps
            .iter()
            .all(|(_, outcome)| *outcome == Outcome::Clean)
    }

    /// The first step that failed or was forced, if any.
    #[must_use]
    pub fn first_problem(&self) -> Option<(&'static str, &Outcome)> {
        self.steps()
            .find(|(_, outcome)| **outcome != Outcome::Clean)
    }
}

impl fmt::Display for CloseReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (step, outcome)) in self.steps().enumerate() {
            if index > 0 {
                f.write_str(", ")?;
            }
            match outcome {
                Outcome::Clean => write!(f, "{step}: clean")?,
                Outcome::Forced(why) => write!(f, "{step}: forced ({why})")?,
                Outcome::Failed(why) => write!(f, "{step}: failed ({why})")?,
            }
        }
        Ok(())
    }
}
