// SPDX-License-Identifier: Apache-2.0
//! Leases: who still needs a VM.
//!
//! Whoever stops a VM asks its [`LeaseSet`] first; the set refuses new leases
//! from then on and names those that are still held.

use std::collections::BTreeMap;
use std::fmt;
use std::future::poll_fn;
use std::sync::PoisonError;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use podhull_types::Deadline;

use crate::sync::{Arc, Mutex, MutexGuard};

/// The VM is being stopped: no new leases.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{owner} is stopping")]
pub struct Closing {
    /// Whose leases were asked for.
    pub owner: String,
}

/// What a lease is held for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HolderKind {
    /// The gRPC channel to the agent.
    Control,
    /// One exec, attach or port-forward connection.
    Session,
    /// A connection that was accepted and is not yet anything else.
    Listener,
    /// A copier between a guest's connection and a local one.
    Relay,
    /// Anything else.
    Other,
}

impl fmt::Display for HolderKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Control => "control",
            Self::Session => "session",
            Self::Listener => "listener",
            Self::Relay => "relay",
            Self::Other => "other",
        })
    }
}

/// Who holds a lease, for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// What for.
    pub kind: HolderKind,
    /// Whom for: a process, a port, a peer.
    pub name: String,
}

impl Holder {
    /// A holder of `kind` called `name`.
    pub fn new(kind: HolderKind, name: impl Into<String>) -> Self {
        Self {
            kind,
            name: name.into(),
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// A lease that is held, as the set sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldLease {
    /// Who holds it.
    pub holder: Holder,
    /// The other end of the connection that it is held for, once there is one.
    pub peer: Option<String>,
    /// For how long already.
    pub age: Duration,
}

impl fmt::Display for HeldLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.holder)?;
        if let Some(peer) = &self.peer {
            write!(f, " with {peer}")?;
        }
        write!(f, " for {:.1} s", self.age.as_secs_f64())
    }
}

#[derive(Debug)]
struct Entry {
    holder: Holder,
    peer: Option<String>,
    since: Instant,
}

#[derive(Debug, Default)]
struct State {
    closing: bool,
    next: u64,
    held: BTreeMap<u64, Entry>,
    /// Woken when nobody holds a lease.
    waiting: Vec<Waker>,
}

#[derive(Debug)]
struct Shared {
    owner: String,
    state: Mutex<State>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent between any two statements below.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(this: &Arc<Self>, state: &mut State, holder: Holder) -> Lease {
        let number = state.next;
        state.next += 1;
        let entry = Entry {
            holder,
            peer: None,
            since: Instant::now(),
        };
        state.held.insert(number, entry);
        Lease {
            shared: Arc::clone(this),
            number,
        }
    }
}

/// All leases on one VM. Cloning gives another handle on the same set.
#[derive(Debug, Clone)]
pub struct LeaseSet {
    shared: Arc<Shared>,
}

impl LeaseSet {
    /// An empty set; `owner` names the VM in errors and logs.
    pub fn new(owner: impl Into<String>) -> Self {
        Self {
            shared: Arc::new(Shared {
                owner: owner.into(),
                state: Mutex::default(),
            }),
        }
    }

    /// Hands out a lease: the VM is not stopped while it is held.
    ///
    /// # Errors
    /// [`Closing`] once [`close`](Self::close) was called.
    pub fn issue(&self, holder: Holder) -> Result<Lease, Closing> {
        let mut state = self.shared.lock();
        if state.closing {
            return Err(Closing {
                owner: self.shared.owner.clone(),
            });
        }
        Ok(Shared::enter(&self.shared, &mut state, holder))
    }

    /// Refuses new leases from now on. Leases that are held stay valid, and
    /// their holders may still clone them: the VM is held anyway.
    pub fn close(&self) {
        self.shared.lock().closing = true;
    }

    /// The leases held now, oldest first.
    #[must_use]
    pub fn held(&self) -> Vec<HeldLease> {
        self.shared
            .lock()
            .held
            .values()
            .map(|entry| HeldLease {
                holder: entry.holder.clone(),
                peer: entry.peer.clone(),
                age: entry.since.elapsed(),
            })
            .collect()
    }

    /// Closes the set and waits until nobody holds a lease. Cancel safe.
    ///
    /// # Errors
    /// The leases still held when the deadline passed.
    pub async fn drained(&self, by: Deadline) -> Result<(), Vec<HeldLease>> {
        self.close();
        by.run(poll_fn(|cx| self.poll_drained(cx)))
            .await
            .map_err(|_| self.held())
    }

    /// Ready when nobody holds a lease.
    pub(crate) fn poll_drained(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.shared.lock();
        if state.held.is_empty() {
            return Poll::Ready(());
        }
        let waker = cx.waker();
        if !state.waiting.iter().any(|old| old.will_wake(waker)) {
            state.waiting.push(waker.clone());
        }
        Poll::Pending
    }
}

/// The right to find the VM alive. Dropping it releases the VM; cloning it
/// makes one more that has to be dropped.
#[derive(Debug)]
pub struct Lease {
    shared: Arc<Shared>,
    number: u64,
}

impl Lease {
    /// Says whom the lease is held for from now on.
    pub fn rename(&self, holder: Holder) {
        if let Some(entry) = self.shared.lock().held.get_mut(&self.number) {
            entry.holder = holder;
        }
    }

    /// Says whom the connection is to.
    pub(crate) fn connected_to(&self, peer: String) {
        if let Some(entry) = self.shared.lock().held.get_mut(&self.number) {
            entry.peer = Some(peer);
        }
    }
}

impl Clone for Lease {
    fn clone(&self) -> Self {
        let mut state = self.shared.lock();
        let holder = state.held.get(&self.number).map_or_else(
            || Holder::new(HolderKind::Other, "clone"),
            |entry| entry.holder.clone(),
        );
        Shared::enter(&self.shared, &mut state, holder)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.held.remove(&self.number);
        if state.held.is_empty() {
            let waiting = std::mem::take(&mut state.waiting);
            drop(state);
            waiting.into_iter().for_each(Waker::wake);
        }
    }
}
