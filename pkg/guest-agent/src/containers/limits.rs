// SPDX-License-Identifier: Apache-2.0
//! The resource limits of a process whose spec does not give them.
//!
//! On a node they come from containerd's own, which are its service manager's.
//! A guest's kernel gives its PID 1 far less, and libcontainer changes one for
//! init only.

use oci_spec::runtime::{PosixRlimitBuilder, PosixRlimitType, Process};

use crate::error::GuestError;

/// Soft and hard, as systemd gives them to a service like containerd's:
/// `LimitNPROC=infinity`, and its defaults otherwise (systemd.exec(5)), but for
/// the hard limit of open files, which is the kernel's largest.
const DEFAULTS: [(PosixRlimitType, u64, u64); 3] = [
    (PosixRlimitType::RlimitNofile, 1024, 1 << 20),
    (PosixRlimitType::RlimitNproc, u64::MAX, u64::MAX),
    (PosixRlimitType::RlimitMemlock, 8 << 20, 8 << 20),
];

/// Adds the limits that `process` leaves out.
pub(super) fn complete(process: &mut Process) -> Result<(), GuestError> {
    let mut limits = process.rlimits().clone().unwrap_or_default();
    for (kind, soft, hard) in DEFAULTS {
        if limits.iter().all(|limit| limit.typ() != kind) {
            let limit = PosixRlimitBuilder::default()
                .typ(kind)
                .soft(soft)
                .hard(hard);
            limits.push(limit.build().map_err(|error| GuestError::Invalid {
                field: "process.rlimits",
                reason: error.to_string(),
            })?);
        }
    }
    process.set_rlimits(Some(limits));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_the_spec_are_kept_and_others_added() {
        let own = PosixRlimitBuilder::default()
            .typ(PosixRlimitType::RlimitNofile)
            .soft(5_u64)
            .hard(6_u64)
            .build()
            .unwrap();
        let mut process = Process::default();
        process.set_rlimits(Some(vec![own]));
        complete(&mut process).unwrap();
        let limits = process.rlimits().as_ref().unwrap();
        let of = |kind| {
            let mut found = limits.iter().filter(|limit| limit.typ() == kind);
            let limit = found.next().unwrap();
            assert!(found.next().is_none());
            (limit.soft(), limit.hard())
        };
        assert_eq!(of(PosixRlimitType::RlimitNofile), (5, 6));
        assert_eq!(of(PosixRlimitType::RlimitNproc), (u64::MAX, u64::MAX));
    }
}
