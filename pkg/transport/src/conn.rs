// SPDX-License-Identifier: Apache-2.0
//! A descriptor that is closed while it may be in use: who uses it, who wants
//! it closed, and who of the two lets go last.

use std::io;
use std::sync::PoisonError;
use std::task::{Context, Poll, Waker};

use crate::lease::Lease;
use crate::sync::{Arc, Mutex, MutexGuard};

/// Which way bytes go; each has one task at most.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Direction {
    Read,
    Write,
}

/// A descriptor and the lease that keeps its VM. Fields are dropped in this
/// order: the descriptor first, the VM's lease last.
#[derive(Debug)]
struct Held<S> {
    socket: S,
    lease: Lease,
}

#[derive(Debug, Default)]
struct Uses {
    closing: bool,
    viewed: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
    closer: Option<Waker>,
}

#[derive(Debug, Default)]
struct Gate(Mutex<Uses>);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Uses> {
        // Nothing under this lock can panic half-way through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The owner's share of a descriptor.
#[derive(Debug)]
pub(crate) struct Conn<S> {
    held: Arc<Held<S>>,
    gate: Arc<Gate>,
}

impl<S> Conn<S> {
    pub(crate) fn new(socket: S, lease: Lease) -> Self {
        Self {
            held: Arc::new(Held { socket, lease }),
            gate: Arc::default(),
        }
    }

    pub(crate) fn socket(&self) -> &S {
        &self.held.socket
    }

    pub(crate) fn lease(&self) -> &Lease {
        &self.held.lease
    }

    /// The one view; `None` while another exists.
    pub(crate) fn view(&self) -> Option<View<S>> {
        let mut uses = self.gate.lock();
        if std::mem::replace(&mut uses.viewed, true) {
            return None;
        }
        Some(View {
            held: Arc::clone(&self.held),
            leave: Leave(Arc::clone(&self.gate)),
        })
    }

    /// Makes every pending and later use of the view fail, and wakes it. The
    /// descriptor stays open as long as the view exists.
    pub(crate) fn begin_close(&self) {
        let mut uses = self.gate.lock();
        uses.closing = true;
        let waiting = [uses.reader.take(), uses.writer.take()];
        drop(uses);
        waiting.into_iter().flatten().for_each(Waker::wake);
    }

    /// Ready once there is no view: then the owner's share is the last one.
    pub(crate) fn poll_unused(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut uses = self.gate.lock();
        if !uses.viewed {
            return Poll::Ready(());
        }
        uses.closer = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Without its owner a view is of no use.
impl<S> Drop for Conn<S> {
    fn drop(&mut self) {
        self.begin_close();
    }
}

/// The user's share: the descriptor is open as long as this exists.
#[derive(Debug)]
pub(crate) struct View<S> {
    // Dropped in this order: whoever waits for the view's end finds that the
    // descriptor was let go of.
    held: Arc<Held<S>>,
    leave: Leave,
}

impl<S> View<S> {
    /// The descriptor, unless it is being closed; the task is woken when that
    /// begins.
    pub(crate) fn socket(&self, direction: Direction, cx: &Context<'_>) -> io::Result<&S> {
        let mut uses = self.leave.0.lock();
        if uses.closing {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "transport closed",
            ));
        }
        let waker = match direction {
            Direction::Read => &mut uses.reader,
            Direction::Write => &mut uses.writer,
        };
        if !waker.as_ref().is_some_and(|old| old.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        Ok(&self.held.socket)
    }
}

#[cfg(test)]
impl<S> View<S> {
    /// The descriptor, also while it is being closed.
    pub(crate) fn descriptor(&self) -> &S {
        &self.held.socket
    }
}

#[derive(Debug)]
struct Leave(Arc<Gate>);

impl Drop for Leave {
    fn drop(&mut self) {
        let mut uses = self.0.lock();
        uses.viewed = false;
        let closer = uses.closer.take();
        drop(uses);
        if let Some(closer) = closer {
            closer.wake();
        }
    }
}
