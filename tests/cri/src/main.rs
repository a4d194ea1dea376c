// SPDX-License-Identifier: Apache-2.0
//! The CRI suite: what a kubelet may ask of a runtime, asked of podhull on
//! stock containerds, and after each case a look at what was left.
//!
//! ```text
//! podhull-cri-tests [--containerd 1.6,1.7,2.1,2.4|all] [--handler NAME|all] [--list] [FILTER...]
//! ```
//!
//! At the end it says `N passed, N failed, N skipped`, and below that, a line
//! each, what failed.

mod case;
mod cases;
mod client;
mod compare;
mod compatibility;
mod context;
mod held;
mod options;
mod outside;
mod peer;
mod probe;
mod procfs;
mod runner;
mod stream;
mod tally;
mod unclosed;
mod vsock_guest;

use std::env;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use podhull_testkit::{Release, namespaces};

use options::Options;
use tally::{Figures, Tally};

/// Which release a node is for, and where it writes its figures.
const RELEASE: &str = "PODHULL_CRI_RELEASE";
const RESULT: &str = "PODHULL_CRI_RESULT";

fn main() -> ExitCode {
    if let Some(code) = namespaces::helper_stage() {
        return code;
    }
    let result = Options::parse(env::args().skip(1)).and_then(|options| {
        if options.compatibility {
            print(&compatibility::page())
        } else if options.list {
            list(&options)
        } else if namespaces::inside() {
            inside(&options)
        } else {
            outside(&options)
        }
    });
    result.unwrap_or_else(|error| {
        eprintln!("podhull-cri-tests: {error:#}");
        ExitCode::from(2)
    })
}

fn print(text: &str) -> Result<ExitCode> {
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn list(options: &Options) -> Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    for setup in options.setups() {
        for case in cases::all() {
            if case.on.has(setup) && options.wants(setup, &case) {
                writeln!(out, "{setup} {}", case.name)?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// One node after the other: each release finds what a fresh node has.
fn outside(options: &Options) -> Result<ExitCode> {
    let some = |setup| {
        let mut cases = cases::all().into_iter();
        cases.any(|case| case.on.has(setup) && options.wants(setup, &case))
    };
    ensure!(
        options.setups().into_iter().any(some),
        "no case to run has {} in its name: --list shows them",
        options.asked_for()
    );
    let begin = Instant::now();
    let mut total = Tally::default();
    let mut gave_up = None;
    let result = env::temp_dir().join(format!("podhull-cri-{}", std::process::id()));
    for release in &options.releases {
        let file = result.to_string_lossy();
        let code = namespaces::enter(&[(RELEASE, release.name()), (RESULT, &file)])?;
        match Tally::take(&result) {
            Ok(tally) => total.add(tally),
            // It has said why.
            Err(_) => {
                let what = format!("the run on containerd {}", release.name());
                let mut lost = Figures::of(&what);
                lost.fail(&what, "it did not come to its end");
                total.push(lost);
                if code != ExitCode::SUCCESS && code != ExitCode::FAILURE {
                    gave_up = Some(code);
                    break;
                }
            }
        }
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "\nall releases: {:.0} s",
        begin.elapsed().as_secs_f64()
    )?;
    write!(out, "{}", total.table())?;
    writeln!(out, "{total}")?;
    write!(out, "{}", total.failures())?;
    Ok(match gave_up {
        Some(code) => code,
        None if total.is_green() => ExitCode::SUCCESS,
        None => ExitCode::FAILURE,
    })
}

fn inside(options: &Options) -> Result<ExitCode> {
    let release = env::var(RELEASE).with_context(|| format!("{RELEASE} is not set"))?;
    let release = Release::named(&release).context("no such release")?;
    let result = env::var_os(RESULT).with_context(|| format!("{RESULT} is not set"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("make the runtime")?;
    let tally = runtime.block_on(runner::run(options, release))?;
    tally.keep(&PathBuf::from(result))?;
    Ok(if tally.is_green() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
