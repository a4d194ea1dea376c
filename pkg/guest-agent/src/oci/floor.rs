// SPDX-License-Identifier: Apache-2.0
//! The seccomp filter that every process of a container has, whatever its own
//! profile says: no AF_VSOCK, so that nobody poses as the agent or the host, and
//! no AF_ALG, whose kernel code is reachable by everybody and needed by few. Nor
//! io_uring, which makes sockets past any filter: programs fall back, as they do
//! under containerd's default profile.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use crate::error::GuestError;

fn failed(error: impl std::fmt::Display) -> GuestError {
    GuestError::System {
        what: "install the floor filter",
        source: io::Error::other(error.to_string()),
    }
}

fn families(call: libc::c_long) -> Result<(i64, Vec<SeccompRule>), GuestError> {
    let rules = [libc::AF_VSOCK, libc::AF_ALG]
        .into_iter()
        .map(|family| {
            let family = u64::from(family.unsigned_abs());
            let is = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, family);
            SeccompRule::new(vec![is.map_err(failed)?]).map_err(failed)
        })
        .collect::<Result<_, _>>()?;
    Ok((call, rules))
}

fn program(
    rules: impl IntoIterator<Item = (i64, Vec<SeccompRule>)>,
    errno: libc::c_int,
) -> Result<BpfProgram, GuestError> {
    let rules: BTreeMap<_, _> = rules.into_iter().collect();
    let refused = SeccompAction::Errno(errno.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, refused, TargetArch::x86_64)
        .and_then(BpfProgram::try_from)
        .map_err(failed)
}

fn programs() -> Result<[BpfProgram; 2], GuestError> {
    let sockets = [families(libc::SYS_socket)?, families(libc::SYS_socketpair)?];
    let rings = [(libc::SYS_io_uring_setup, vec![])];
    Ok([
        program(sockets, libc::EAFNOSUPPORT)?,
        program(rings, libc::ENOSYS)?,
    ])
}

/// Installs the filters for this process and all it makes. Needs CAP_SYS_ADMIN:
/// no_new_privs is the container's own choice.
pub(super) fn install() -> Result<(), GuestError> {
    programs()?.iter().try_for_each(apply)
}

fn apply(program: &BpfProgram) -> Result<(), GuestError> {
    let had = nix::sys::prctl::get_no_new_privs().map_err(GuestError::system("prctl"))?;
    if had {
        return apply_filter(program).map_err(failed);
    }
    crate::sys::seccomp_without_no_new_privs(program)
        .map_err(GuestError::system("install the floor filter"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filters_compile() {
        for program in programs().unwrap() {
            assert!(!program.is_empty());
        }
    }
}
