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
    pub const READY: Self = Self(1024);
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
