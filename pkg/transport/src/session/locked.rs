// SPDX-License-Identifier: Apache-2.0
//! The lock of a session's state.

use std::ops::{Deref, DerefMut};
use std::task::Waker;

use super::state::State;
use crate::sync::MutexGuard;

/// The state, locked. Fields are dropped in this order: whoever is woken finds
/// the lock free.
#[derive(Debug)]
pub(crate) struct Locked<'a> {
    state: MutexGuard<'a, State>,
    woken: Woken,
}

impl<'a> Locked<'a> {
    pub(super) fn new(state: MutexGuard<'a, State>) -> Self {
        let woken = Woken::default();
        Self { state, woken }
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.woken.0 = std::mem::take(&mut self.state.woken);
    }
}

impl Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

#[derive(Debug, Default)]
struct Woken(Vec<Waker>);

impl Drop for Woken {
    fn drop(&mut self) {
        self.0.drain(..).for_each(Waker::wake);
    }
}
