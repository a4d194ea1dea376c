// SPDX-License-Identifier: Apache-2.0
//! A pod in a microVM, to watch: `make demo`.
//!
//! A stock containerd is started in namespaces of its own, a pod is run with
//! podhull, looked at and deleted, and the leak oracle tells whether anything
//! is left. The machine is as it was when the program ends, however it ends.
//!
//! For development: `PODHULL_DEMO_HANDLER` names another handler (`runc`),
//! `PODHULL_DEMO_CONTAINERD` another containerd (`1.6`).

mod boot;
mod counts;
mod screen;
mod tour;

use std::env;
use std::process::ExitCode;

use anyhow::{Context, Result};
use podhull_testkit::programs::Programs;
use podhull_testkit::{Node, Release, evidence, namespaces};
use screen::Screen;
use tour::Choice;

/// Lines of each log that are shown when something fails.
const LOG_LINES: usize = 25;

fn main() -> ExitCode {
    if let Some(code) = namespaces::helper_stage() {
        return code;
    }
    let choice = match Choice::from_env() {
        Ok(choice) => choice,
        Err(error) => return refuse(&error),
    };
    if !namespaces::inside() {
        return check(&choice)
            .and_then(|()| namespaces::enter(&[]))
            .unwrap_or_else(|error| refuse(&error));
    }
    let mut screen = Screen::new();
    match run(&mut screen, &choice) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            screen.failed(&error);
            if let Ok(folder) = namespaces::folder() {
                screen.quote(&evidence::logs(&folder, LOG_LINES));
            }
            ExitCode::FAILURE
        }
    }
}

fn refuse(error: &anyhow::Error) -> ExitCode {
    eprintln!("podhull-demo: {error:#}");
    ExitCode::FAILURE
}

/// What is missing is better said before anything has started.
fn check(choice: &Choice) -> Result<()> {
    let programs = Programs::find();
    if choice.has_vm() {
        programs.check()?;
    }
    choice.release.check(&programs)
}

fn run(screen: &mut Screen, choice: &Choice) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("start the async runtime")?;
    runtime.block_on(tour::run(screen, &Node::here()?, choice))
}

impl Choice {
    fn from_env() -> Result<Self> {
        let handler = env::var("PODHULL_DEMO_HANDLER").unwrap_or_else(|_| "podhull".into());
        let release = env::var("PODHULL_DEMO_CONTAINERD").unwrap_or_else(|_| "2.4".into());
        let release = Release::named(&release)
            .with_context(|| format!("PODHULL_DEMO_CONTAINERD={release}: expected 1.6 or 2.4"))?;
        Ok(Self { handler, release })
    }
}
