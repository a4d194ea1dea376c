// SPDX-License-Identifier: Apache-2.0
//! The helpers' side: `podhull-agent oci create | exec | pause | pod |
//! sysctls`.

pub mod create;
pub mod exec;
pub mod executor;
mod floor;
pub mod lookup;
pub mod pause;
pub(crate) mod pod;

use std::process::ExitCode;

/// Runs a helper; `None` if `name` is none. The process must have one thread.
#[must_use]
pub fn main(name: &str) -> Option<ExitCode> {
    let done = match name {
        "create" => create::main(),
        "exec" => exec::main(),
        "pause" => pause::main(),
        "pod" => pod::main(),
        "sysctls" => pod::sysctls(),
        _ => return None,
    };
    Some(if done {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
