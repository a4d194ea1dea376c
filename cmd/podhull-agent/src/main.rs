// SPDX-License-Identifier: Apache-2.0
//! The guest agent's program: PID 1 of a pod's microVM.

use std::process::ExitCode;

fn main() -> ExitCode {
    podhull_guest_agent::run(std::env::args())
}
