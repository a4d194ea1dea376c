// SPDX-License-Identifier: Apache-2.0
//! vsock addresses.

use std::fmt;

/// A vsock port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VsockPort(pub u32);

impl VsockPort {
    /// Where the agent accepts sessions.
    pub const SESSIONS: Self = Self(1025);
    /// Where the host accepts READY when the VMM gives each VM a port space of
    /// its own (hybrid sockets). With AF_VSOCK the kernel chooses one.
    ///
    /// Far from 0: vhost-device-vsock 0.3 numbers the host's connections from
    /// there, and refuses every one for good once that number is a port to which
    /// the guest has a connection, as it has to this one for all of its life.
    pub const READY: Self = Self(1 << 30);
    /// The word on the guest kernel's command line that names the host's port
    /// for READY.
    pub const READY_WORD: &str = "podhull.ready_port=";

    /// The host's port for READY that a kernel's command line names.
    #[must_use]
    pub fn ready_on(command_line: &str) -> Option<Self> {
        let word = command_line
            .split_whitespace()
            .find_map(|word| word.strip_prefix(Self::READY_WORD))?;
        word.parse().ok().map(Self)
    }
}

impl fmt::Display for VsockPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A vsock context id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cid(pub u32);

impl Cid {
    /// The host, as a guest sees it.
    pub const HOST: Self = Self(2);
}

impl fmt::Display for Cid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ready_port_is_found_among_other_words() {
        let line = "quiet reboot=t podhull.ready_port=1024 panic=-1\n";
        assert_eq!(VsockPort::ready_on(line), Some(VsockPort(1024)));
        assert_eq!(VsockPort::ready_on("quiet podhull.ready_port=x"), None);
        assert_eq!(VsockPort::ready_on(""), None);
    }
}
