// SPDX-License-Identifier: Apache-2.0
//! How a process ended.

use std::time::SystemTime;

/// Exit code that is reported for a process whose VM ended under it: as if by
/// SIGKILL.
pub const CODE_VM_GONE: u8 = 137;

/// A process's end, as `wait` in a shell would say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus {
    /// The exit code; 128 + signal for a killed process.
    pub code: u8,
    /// When it ended.
    pub at: SystemTime,
}

impl ExitStatus {
    /// The status of a process that ended now because its VM did.
    #[must_use]
    pub fn vm_gone() -> Self {
        Self {
            code: CODE_VM_GONE,
            at: SystemTime::now(),
        }
    }
}
