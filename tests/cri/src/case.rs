// SPDX-License-Identifier: Apache-2.0
//! What a case is, and on which setups it makes sense.

use std::fmt;
use std::future::Future;
use std::pin::Pin;

use anyhow::Result;
use podhull_testkit::Release;

use crate::context::Context;

/// A handler of a containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Setup {
    pub(crate) release: Release,
    pub(crate) handler: &'static str,
}

impl Setup {
    /// Every handler that test nodes have, but the last only on 2.x.
    pub(crate) const HANDLERS: [&'static str; 3] = ["runc", "podhull", "podhull-sandbox"];

    /// True if pods are VMs.
    pub(crate) fn is_podhull(self) -> bool {
        self.handler != "runc"
    }

    /// True if containerd leaves the sandbox to the shim.
    pub(crate) fn shim_is_sandboxer(self) -> bool {
        self.handler == "podhull-sandbox"
    }

    /// runc on the same containerd.
    pub(crate) fn with_runc(self) -> Self {
        Self {
            handler: "runc",
            ..self
        }
    }

    fn bit(self) -> u8 {
        // What is told of 1.6 holds for 1.7, and of 2.4 for 2.1.
        match (self.release.is_2(), self.handler) {
            (false, "runc") => On::RUNC_16.0,
            (true, "runc") => On::RUNC_24.0,
            (false, _) => On::PAUSE_16.0,
            (true, "podhull-sandbox") => On::SANDBOX_24.0,
            (true, _) => On::PAUSE_24.0,
        }
    }
}

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{} {}]", self.release.name(), self.handler)
    }
}

/// A set of setups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct On(u8);

impl On {
    const RUNC_16: Self = Self(1);
    const RUNC_24: Self = Self(2);
    const PAUSE_16: Self = Self(4);
    const PAUSE_24: Self = Self(8);
    const SANDBOX_24: Self = Self(16);

    /// Everywhere, runc included.
    pub(crate) const ALL: Self = Self(31);
    /// Wherever pods are VMs.
    pub(crate) const PODHULL: Self = Self(4 | 8 | 16);
    /// Wherever pods are VMs and containerd asks for what 1.6 does not know.
    pub(crate) const PODHULL_24: Self = Self(8 | 16);
    /// The same with runc.
    pub(crate) const ALL_24: Self = Self(2 | 8 | 16);
    /// Where containerd is 1.x.
    pub(crate) const PAUSE_1: Self = Self(4);
    /// What does not depend on how containerd asks: runc, and podhull once
    /// for either way to make a sandbox.
    pub(crate) const ALL_TWICE: Self = Self(1 | 2 | 4 | 16);
    /// The same without what the runc shim of 1.6 loses now and then: the end of
    /// a container's output, and the notice of an OOM kill.
    pub(crate) const TWICE_BUT_RUNC_16: Self = Self(2 | 4 | 16);
    /// The same without runc.
    pub(crate) const PODHULL_TWICE: Self = Self(4 | 16);
    /// Where containerd is 1.x: runc, and podhull.
    pub(crate) const RUNC_AND_PAUSE_1: Self = Self(1 | 4);
    /// What depends neither on containerd nor on the handler.
    pub(crate) const ONCE: Self = Self(1 | 2 | 16);
    /// The same without runc.
    pub(crate) const PODHULL_ONCE: Self = Self(16);

    /// True if `setup` is one of them.
    pub(crate) fn has(self, setup: Setup) -> bool {
        self.0 & setup.bit() != 0
    }
}

/// What a case's function gives.
pub(crate) type Run = for<'a> fn(&'a Context) -> Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

/// A case. Its name is that of its function: `<area>_<event>_<outcome>`.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) on: On,
    pub(crate) run: Run,
}

/// The cases of a file, by the setups they apply to.
macro_rules! cases {
    ($($on:ident: $($name:ident),+ $(,)?;)+) => {
        /// The cases of this file.
        pub(crate) fn cases() -> Vec<$crate::case::Case> {
            vec![$($($crate::case::Case {
                name: stringify!($name),
                on: $crate::case::On::$on,
                run: |t| Box::pin($name(t)),
            }),+),+]
        }
    };
}
pub(crate) use cases;

/// Fails with both values unless they are equal.
macro_rules! same {
    ($got:expr, $want:expr) => {
        same!($got, $want, "{}", stringify!($got))
    };
    ($got:expr, $want:expr, $($what:tt)+) => {{
        let (got, want) = (&$got, &$want);
        if got != want {
            anyhow::bail!("{}: {got:?}, expected {want:?}", format_args!($($what)+));
        }
    }};
}
pub(crate) use same;

/// Fails with the text unless `part` is in it.
macro_rules! contains {
    ($text:expr, $($part:expr),+) => {{
        let text = $text;
        $(anyhow::ensure!(text.contains($part), "no {:?} in: {text}", $part);)+
    }};
}
pub(crate) use contains;

/// This machine lacks what a case needs: it is counted as skipped.
#[derive(Debug)]
pub(crate) struct Skip(pub(crate) String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}
