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

/// All of them. One that is none any more fails its case.
pub(crate) const DIFFERENCES: &[Difference] = &[];
