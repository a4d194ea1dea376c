// SPDX-License-Identifier: Apache-2.0
//! The command line.

use anyhow::{Context, Result, bail, ensure};
use podhull_testkit::Release;
use podhull_testkit::programs::Programs;

pub(crate) const USAGE: &str = "usage: podhull-bench quick|sessions|floor [-n RUNS] [--handler HANDLER] [--containerd 1.6|2.4]";

/// Figures of fewer runs are for trying out.
const QUOTABLE: usize = 10;

/// Which figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    /// A pod's life, and its memory.
    Quick,
    /// What runs in it, and ports.
    Sessions,
    /// Of sessions, what the guest's own connections can do; alone.
    Floor,
}

impl Subject {
    fn name(self) -> &'static str {
        match self {
            Self::Quick => "quick",
            Self::Sessions => "sessions",
            Self::Floor => "floor",
        }
    }
}

/// What is to be measured.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) subject: Subject,
    /// How often; a first run of each handler comes on top and is not counted.
    pub(crate) runs: usize,
    /// The handler that is measured beside runc.
    pub(crate) handler: String,
    /// The containerd.
    pub(crate) release: Release,
}

impl Options {
    pub(crate) fn parse(mut args: impl Iterator<Item = String>) -> Result<Self> {
        let command = args.next();
        let subject = [Subject::Quick, Subject::Sessions, Subject::Floor]
            .into_iter()
            .find(|subject| command.as_deref() == Some(subject.name()))
            .context("expected: quick, sessions or floor")?;
        let mut options = Self {
            subject,
            // Of each of four pods.
            runs: if subject == Subject::Quick { 10 } else { 50 },
            handler: "podhull".into(),
            release: Release::V2_4,
        };
        while let Some(name) = args.next() {
            let mut value = || args.next().with_context(|| format!("{name} needs a value"));
            match name.as_str() {
                "-n" => options.runs = value()?.parse().context("-n: not a number")?,
                "--handler" => options.handler = value()?,
                "--containerd" => {
                    options.release = Release::named(&value()?).context("no such containerd")?;
                }
                _ => bail!("unknown argument {name}"),
            }
        }
        ensure!(options.runs > 0, "-n 0 measures nothing");
        Ok(options)
    }

    /// What is missing is better said before anything has started.
    pub(crate) fn check(&self) -> Result<()> {
        let programs = Programs::find();
        if self.handler.starts_with("podhull") {
            programs.check()?;
        }
        self.release.check(&programs)
    }

    /// What is said with figures of so few runs that they tell nothing.
    pub(crate) fn warning(&self) -> Option<String> {
        let runs = self.runs;
        (runs < QUOTABLE).then(|| format!("Not for quoting: n = {runs}, below {QUOTABLE}.\n\n"))
    }

    /// As it would be typed.
    pub(crate) fn command(&self) -> String {
        format!(
            "podhull-bench {} -n {} --handler {} --containerd {}",
            self.subject.name(),
            self.runs,
            self.handler,
            self.release.name()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options> {
        Options::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn the_command_line_is_understood() {
        let options = parse("quick -n 3 --handler runc --containerd 1.6").unwrap();
        assert_eq!(options.runs, 3);
        assert_eq!(options.release, Release::Debian16);
        assert_eq!(parse("quick").unwrap().runs, 10);
        assert_eq!(parse("sessions").unwrap().subject, Subject::Sessions);
        let typed = options.command();
        assert_eq!(
            parse(typed.strip_prefix("podhull-bench ").unwrap()).unwrap(),
            options
        );
    }

    #[test]
    fn figures_of_few_runs_are_not_for_quoting() {
        let warning = parse("quick -n 9").unwrap().warning();
        assert_eq!(warning.unwrap(), "Not for quoting: n = 9, below 10.\n\n");
        assert_eq!(parse("quick -n 10").unwrap().warning(), None);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for line in [
            "",
            "slow",
            "quick -n",
            "quick -n x",
            "quick -n 0",
            "quick --fast",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
