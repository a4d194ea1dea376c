// SPDX-License-Identifier: Apache-2.0
//! A program in namespaces of its own, of which nothing stays behind.
//!
//! A program that wants a node calls [`helper_stage`] first in `main`, then
//! [`enter`] while [`inside`] is false. It is re-executed three times:
//!
//! ```text
//! program            what the user started; forwards Ctrl-C, returns the exit code
//! └─ janitor         own session; owns the folder and the cgroups and removes them last
//!    └─ init         PID 1 of the new namespaces: mounts, cgroups, links; reaps orphans
//!       └─ program   the same arguments again: `inside()` is true
//! ```
//!
//! If the outermost process dies, however it dies, the janitor reads the end of
//! its stdin, kills PID 1 (and the kernel everything with it) and cleans. If
//! the janitor is killed, PID 1 goes by its parent-death signal, and the next
//! run sweeps the folder, which nobody holds locked any more.

mod cgroup;
mod init;
mod janitor;
mod mounts;

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

pub use cgroup::{Hierarchy, hierarchies};

/// `argv[0]` tells a re-executed process which part it plays.
const JANITOR: &str = "podhull-node: janitor";
const INIT: &str = "podhull-node: init";
const PROGRAM: &str = "podhull-node: program";

/// The node's folder on a disk, handed from the janitor to those inside.
const FOLDER: &str = "PODHULL_NODE_FOLDER";
/// The name of the node's cgroup in every hierarchy.
const CGROUP: &str = "PODHULL_NODE_CGROUP";

/// Runs the janitor's and PID 1's part, if that is what this process was
/// started for. Call it first in `main`, before any thread exists.
#[must_use]
pub fn helper_stage() -> Option<ExitCode> {
    let result = match env::args_os().next()?.to_str()? {
        JANITOR => janitor::run(),
        INIT => init::run(),
        _ => return None,
    };
    Some(result.unwrap_or_else(|error| {
        report(&error);
        ExitCode::FAILURE
    }))
}

/// True in the program that runs in the namespaces.
#[must_use]
pub fn inside() -> bool {
    env::args_os()
        .next()
        .is_some_and(|name| name.to_str() == Some(PROGRAM))
}

/// The node's folder on a disk. Removed when the program ends.
///
/// # Errors
/// If the program is not inside.
pub fn folder() -> Result<PathBuf> {
    env::var_os(FOLDER)
        .map(PathBuf::from)
        .context("not inside a test node: call namespaces::enter")
}

/// Runs this program again, with the same arguments and `env` added, in
/// namespaces of its own, and gives its exit code.
///
/// # Errors
/// If the janitor cannot be started.
pub fn enter(env: &[(&str, &str)]) -> Result<ExitCode> {
    let signals = signal_set(&[
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGCHLD,
    ]);
    signals.thread_block().context("block signals")?;
    let mut janitor = stage(JANITOR)
        .envs(env.iter().copied())
        .stdin(Stdio::piped())
        .spawn()
        .context("start the janitor")?;
    let mut life_line = janitor.stdin.take();
    let mut interrupted = None;
    let status = loop {
        // A signal that arrived before the wait is still pending: none is lost.
        if let Some(status) = janitor.try_wait().context("wait for the janitor")? {
            break status;
        }
        match signals.wait().context("wait for a signal")? {
            Signal::SIGCHLD => {}
            signal => {
                interrupted = Some(signal);
                drop(life_line.take());
            }
        }
    };
    signals.thread_unblock().context("unblock signals")?;
    Ok(match interrupted {
        Some(signal) => {
            // The janitor ends last, after what it has removed.
            eprintln!("\nInterrupted. All that was started has ended, and its folders are gone.");
            exit_code(ExitStatus::from_raw(signal as i32))
        }
        None => exit_code(status),
    })
}

/// This program once more, playing `part`, with its own arguments.
fn stage(part: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(part).args(env::args_os().skip(1));
    command
}

fn signal_set(signals: &[Signal]) -> SigSet {
    signals.iter().copied().collect()
}

/// As a shell counts: 128 + signal.
fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1);
    ExitCode::from(code)
}

fn report(error: &anyhow::Error) {
    eprintln!("test node: {error:#}");
}

fn kill_and_wait(child: &mut Child) -> io::Result<ExitStatus> {
    child.kill()?;
    child.wait()
}

fn env_os(name: &str) -> Result<OsString> {
    env::var_os(name).with_context(|| format!("{name} is not set"))
}
