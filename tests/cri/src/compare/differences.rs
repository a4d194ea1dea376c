// SPDX-License-Identifier: Apache-2.0
//! What differs from runc, and why.

/// Something that a case sees otherwise than with runc.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Difference {
    pub(crate) case: &'static str,
    /// The name under which it is seen.
    pub(crate) what: &'static str,
    pub(crate) why: &'static str,
}

const FLOOR: &str = "no process of a container is without a seccomp filter: AF_VSOCK, AF_ALG and io_uring are closed \
     to all, so that nobody poses as the agent";
const MOUNTS: &str = "files come from the node by virtio-fs, which is mounted `nodev`: a device file there opens nothing. \
     And which files of /proc there are to be masked is the guest's kernel's choice";

/// All of them. One that is none any more fails its case.
pub(crate) const DIFFERENCES: &[Difference] = &[
    Difference {
        case: "view_of_rights_is_that_of_runc",
        what: "default, init",
        why: FLOOR,
    },
    Difference {
        case: "view_of_rights_is_that_of_runc",
        what: "default, exec",
        why: FLOOR,
    },
    Difference {
        case: "view_of_rights_is_that_of_runc",
        what: "unconfined with other capabilities, init",
        why: FLOOR,
    },
    Difference {
        case: "view_of_rights_is_that_of_runc",
        what: "unconfined with other capabilities, exec",
        why: FLOOR,
    },
    Difference {
        case: "view_of_mounts_is_that_of_runc",
        what: "mounts, init",
        why: MOUNTS,
    },
    Difference {
        case: "view_of_mounts_is_that_of_runc",
        what: "mounts, exec",
        why: MOUNTS,
    },
];
