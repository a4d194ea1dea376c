// SPDX-License-Identifier: Apache-2.0
//! Re-executions of our own program that confine themselves and then become,
//! or are, a child of the VM.

pub mod jail;
pub mod virtiofs;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::de::DeserializeOwned;

use crate::child::{SHIM_FD, TASK_FD};
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
            let written = io::stderr().write_all(line.as_bytes());
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

/// Our end of the socket pair with the shim.
fn shim() -> UnixStream {
    UnixStream::from(sys::inherited(SHIM_FD))
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

/// Makes the calling process one that dies with the shim, and waits until the
/// shim has noticed: one that was gone before does not answer. The parent-death
/// signal is lost by a change of user and by a fork, so this comes after them.
fn die_with_shim(mut shim: UnixStream) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(at("set the parent-death signal"))?;
    shim.write_all(&[0])
        .and_then(|()| shim.read_exact(&mut [0]))
        .map_err(at("wait for the shim"))
}
