// SPDX-License-Identifier: Apache-2.0
//! What the state machines of this crate ([`crate::lease`], `conn`,
//! `session::state`, `session::stream`) share and lock with. `tests/models.rs`
//! compiles the same files with loom's instead and tries every interleaving.

pub(crate) use std::sync::{Arc, Mutex, MutexGuard};
