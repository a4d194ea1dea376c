// SPDX-License-Identifier: Apache-2.0
//! Models of what may happen at once: loom runs every interleaving of the
//! threads below, on the very files that production uses, which here lock with
//! loom's mutex (`crate::sync`). A wake-up that is lost is a deadlock to loom; a
//! descriptor or VM that is used while it is closed is a race on its cell.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    reason = "a test, which includes more of the files than it uses"
)]

mod sync {
    pub(crate) use loom::sync::{Arc, Mutex, MutexGuard};
}
#[path = "../src/conn.rs"]
mod conn;
#[path = "../src/error.rs"]
mod error;
#[path = "../src/lease.rs"]
mod lease;
#[path = "../src/session"]
mod session {
    pub(crate) mod buffer;
    #[path = "frame.rs"]
    mod codec;
    mod locked;
    pub(crate) mod state;
    pub(crate) mod stream;

    pub(crate) mod frame {
        pub(crate) use super::codec::*;
        /// Small, so that a few bytes exhaust it.
        pub(crate) const WINDOW: usize = 4;
        pub(crate) const MAX_DATA: usize = 2;
    }
}
mod models {
    mod credit;
    mod lifetime;
    mod relay;

    use loom::model::Builder;

    /// Every interleaving with at most `preemptions` switches that no thread asked
    /// for: what more of them find takes minutes.
    fn explore(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
        let mut builder = Builder::new();
        builder.preemption_bound = Some(preemptions);
        builder.max_branches = 10_000;
        builder.check(model);
    }
}
