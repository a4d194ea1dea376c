// SPDX-License-Identifier: Apache-2.0
//! The command line.

use anyhow::{Context as _, Result, bail};
use podhull_testkit::Release;

use crate::case::{Case, Setup};
use crate::cases::core;

const USAGE: &str = "podhull-cri-tests [--containerd 1.6,1.7,2.1,2.4|all] [--handler podhull|podhull-sandbox|runc|all] [--core] [--alone] [--list] [--compatibility] [FILTER...]";

/// What the user asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) releases: Vec<Release>,
    pub(crate) list: bool,
    /// The page on compatibility, and nothing else.
    pub(crate) compatibility: bool,
    /// Only the core cases.
    core: bool,
    /// Nothing is compared with runc.
    pub(crate) alone: bool,
    handlers: Vec<String>,
    filters: Vec<String>,
}

impl Options {
    /// Reads the arguments after the program's name.
    pub(crate) fn parse(args: impl IntoIterator<Item = String>) -> Result<Self> {
        let mut options = Self {
            releases: vec![Release::Debian16, Release::V2_4],
            list: false,
            compatibility: false,
            core: false,
            alone: false,
            handlers: vec!["podhull".into(), "podhull-sandbox".into()],
            filters: Vec::new(),
        };
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let mut value = || {
                args.next()
                    .with_context(|| format!("{arg} needs a value; {USAGE}"))
            };
            match &*arg {
                "--containerd" => match &*value()? {
                    "all" => options.releases = Release::ALL.into(),
                    names => {
                        let named = names.split(',').map(|name| {
                            Release::named(name)
                                .with_context(|| format!("no containerd {name}; {USAGE}"))
                        });
                        options.releases = named.collect::<Result<_>>()?;
                    }
                },
                "--handler" => match &*value()? {
                    "all" => options.handlers = Setup::HANDLERS.map(str::to_owned).into(),
                    name if Setup::HANDLERS.contains(&name) => options.handlers = vec![name.into()],
                    name => bail!("no handler {name}; {USAGE}"),
                },
                "--list" => options.list = true,
                "--compatibility" => options.compatibility = true,
                "--core" => options.core = true,
                "--alone" => options.alone = true,
                "--help" | "-h" => bail!("{USAGE}"),
                other if other.starts_with('-') => bail!("unknown option {other}; {USAGE}"),
                filter => options.filters.push(filter.into()),
            }
        }
        Ok(options)
    }

    /// What names are asked for, to be quoted.
    pub(crate) fn asked_for(&self) -> String {
        self.filters.join(" or ")
    }

    /// True if a case is to run: any filter is part of its name.
    pub(crate) fn wants(&self, setup: Setup, case: &Case) -> bool {
        let name = case.name;
        let named = |filter: &String| name.contains(&**filter);
        (self.filters.is_empty() || self.filters.iter().any(named))
            && (!self.core || core::has(setup, name))
    }

    /// What to run, releases in order.
    pub(crate) fn setups(&self) -> Vec<Setup> {
        self.releases
            .iter()
            .flat_map(|release| self.setups_of(*release))
            .collect()
    }

    /// What to run on one release.
    pub(crate) fn setups_of(&self, release: Release) -> Vec<Setup> {
        Setup::HANDLERS
            .into_iter()
            .filter(|handler| self.handlers.iter().any(|wanted| wanted == handler))
            .map(|handler| Setup { release, handler })
            // 1.x knows no other sandboxer than its own.
            .filter(|setup| setup.release.is_2() || !setup.shim_is_sandboxer())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::On;

    fn parse(line: &str) -> Result<Options> {
        Options::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn by_default_podhull_runs_everywhere() {
        let setups = parse("").unwrap().setups();
        let shown: Vec<_> = setups.iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            ["[1.6 podhull]", "[2.4 podhull]", "[2.4 podhull-sandbox]"]
        );
    }

    #[test]
    fn arguments_narrow_it_and_wrong_ones_are_refused() {
        let options = parse("--containerd 2.4 --handler runc exec_ mount_").unwrap();
        assert_eq!(options.setups().len(), 1);
        let two = parse("--containerd 1.7,2.1 --handler podhull").unwrap();
        assert_eq!(two.releases, [Release::V1_7, Release::V2_1]);
        assert_eq!(parse("--containerd all").unwrap().releases, Release::ALL);
        let case = |name| Case {
            name,
            on: On::ALL,
            run: |_| Box::pin(async { Ok(()) }),
        };
        let wants = |name| options.wants(options.setups()[0], &case(name));
        assert!(wants("exec_x") && wants("mount_y") && !wants("z"));

        for wrong in ["--containerd 3", "--handler crun", "--containerd", "--x"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
