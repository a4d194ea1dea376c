// SPDX-License-Identifier: Apache-2.0
//! Re-executions of our own program that confine themselves and then become,
//! or are, a child of the VM.

pub mod jail;
pub mod virtiofs;

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::process::ExitCode;

use nix::unistd::Pid;
use serde::de::DeserializeOwned;

use crate::child::TASK_FD;
use crate::sys;

/// Runs the helper that `args` (without the program's name) name, if they name
/// one. To be called first in `main`, while the process has one thread.
pub fn helper_main(mut args: impl Iterator<Item = String>) -> Option<ExitCode> {
    let result = match args.next()?.as_str() {
        jail::ROLE => receive().and_then(|task| jail::run(&task)),
        virtiofs::ROLE => receive().and_then(virtiofs::run),
        _ => return None,
    };
    Some(match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error is the parent's ring.
            let line = format!("{error}\n");
            let written = io::Write::write_all(&mut io::stderr(), line.as_bytes());
            debug_assert!(written.is_ok());
            ExitCode::from(127)
        }
    })
}

fn receive<T: DeserializeOwned>() -> io::Result<T> {
    let mut text = Vec::new();
    File::from(sys::inherited(TASK_FD)).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Names the step in an error.
fn at<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> io::Error {
    let step = step.into();
    move |error| {
        let error = error.into();
        io::Error::new(error.kind(), format!("{step}: {error}"))
    }
}

/// Joins the cgroup, in every hierarchy.
fn join_cgroups(folders: &[PathBuf]) -> io::Result<()> {
    for folder in folders {
        let procs = folder.join("cgroup.procs");
        std::fs::write(&procs, "0").map_err(at(format!("join {}", procs.display())))?;
    }
    Ok(())
}

/// Dies with `parent`. The signal is lost by a change of user, so this comes
/// after it; a parent that is gone already is noticed.
fn die_with(parent: u32) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(at("set the parent-death signal"))?;
    if Pid::parent().as_raw().unsigned_abs() == parent {
        Ok(())
    } else {
        Err(io::Error::other("the parent is gone"))
    }
}
