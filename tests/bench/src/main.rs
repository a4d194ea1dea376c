// SPDX-License-Identifier: Apache-2.0
//! Figures of podhull beside those of runc: `make bench-quick`,
//! `make bench-sessions`.
//!
//! ```text
//! podhull-bench quick|sessions|floor [-n RUNS] [--handler HANDLER] [--containerd 1.6|2.4]
//! ```
//!
//! docs/performance.md says what is measured and how. The table goes to
//! standard output, progress to standard error.

mod floor;
mod machine;
mod options;
mod quick;
mod report;
mod sessions;
mod statistics;
mod vsock;

use std::env;
use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use options::{Options, Subject};
use podhull_testkit::{Node, evidence, namespaces};

/// Lines of each log that are shown when something fails.
const LOG_LINES: usize = 25;

fn main() -> ExitCode {
    // A child of a VM of our own.
    if let Some(code) = podhull_vmm::helper_main(env::args().skip(1)) {
        return code;
    }
    if let Some(code) = namespaces::helper_stage() {
        return code;
    }
    let options = match Options::parse(env::args().skip(1)) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("podhull-bench: {error:#}\n{}", options::USAGE);
            return ExitCode::from(2);
        }
    };
    let result = if namespaces::inside() {
        run(&options).map(|()| ExitCode::SUCCESS)
    } else {
        options.check().and_then(|()| namespaces::enter(&[]))
    };
    result.unwrap_or_else(|error| {
        eprintln!("podhull-bench: {error:#}");
        if let Ok(folder) = namespaces::folder() {
            eprintln!("{}", evidence::logs(&folder, LOG_LINES));
        }
        ExitCode::FAILURE
    })
}

fn run(options: &Options) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("start the async runtime")?;
    let node = Node::here()?;
    let report = match options.subject {
        Subject::Quick => report::markdown(&runtime.block_on(quick::run(&node, options))?, options),
        Subject::Sessions => {
            report::sessions(&runtime.block_on(sessions::run(&node, options))?, options)
        }
        Subject::Floor => report::floor(&runtime.block_on(vsock::run(&node, options.runs))?),
    };
    let report = options.warning().unwrap_or_default() + &report;
    io::stdout()
        .lock()
        .write_all(report.as_bytes())
        .context("write the report")
}
