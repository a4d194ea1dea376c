// SPDX-License-Identifier: Apache-2.0
//! PIDs that are reported to containerd.
//!
//! Container specs carry `/proc/<PID>/ns/…` and `kubectl debug --target` names a
//! container by its PID, so each process needs one of its own; and nothing on
//! the host may take it for a process of the host. Linux never gives out a PID
//! above 2^22 (`PID_MAX_LIMIT`), so ours begin there.

use std::sync::atomic::{AtomicU32, Ordering};

const PID_MAX_LIMIT: u32 = 1 << 22;
/// Where PIDs begin that only the guest knows.
const GUEST_BASE: u32 = 1 << 23;

/// Hands out PIDs of one sandbox.
#[derive(Debug, Default)]
pub(crate) struct Pids(AtomicU32);

impl Pids {
    pub(crate) fn next(&self) -> u32 {
        PID_MAX_LIMIT
            + 1
            + self.0.fetch_add(1, Ordering::Relaxed) % (GUEST_BASE - PID_MAX_LIMIT - 1)
    }
}

/// The PID under which a process of the guest that has no other is listed.
pub(crate) fn of_guest(pid: u32) -> u32 {
    GUEST_BASE.saturating_add(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pids_differ_and_are_no_process_of_the_host() {
        let pids = Pids::default();
        let (first, second) = (pids.next(), pids.next());
        assert_ne!(first, second);
        assert!(first > PID_MAX_LIMIT && second > PID_MAX_LIMIT);
        assert!(of_guest(1) > second);
        assert!(i32::try_from(of_guest(u32::from(u16::MAX))).is_ok());
    }
}
