// SPDX-License-Identifier: Apache-2.0
//! One process of a container.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use nix::unistd::Pid;
use oci_spec::runtime::Process as ProcessSpec;
use podhull_api::agent;
use podhull_types::ProcessRef;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::helper::Helper;
use crate::stdio::{Ends, Terminal};

/// What a created process waits for at its start.
#[derive(Debug)]
pub(crate) enum Waiting {
    /// An init process, for word on its socket.
    Init(Helper),
    /// An added process, to be made.
    Exec(Box<ProcessSpec>),
}

/// A process, from its creation until it is deleted.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) id: ProcessRef,
    pub(crate) stdio: agent::Stdio,
    pid: OnceLock<Pid>,
    waiting: Mutex<Option<Waiting>>,
    ends: watch::Sender<Option<Ends>>,
    terminal: OnceLock<Terminal>,
    exit: watch::Sender<Option<u8>>,
    /// Ends the relay of its streams.
    pub(crate) give_up: CancellationToken,
}

impl Process {
    pub(crate) fn new(id: ProcessRef, stdio: agent::Stdio, waiting: Option<Waiting>) -> Self {
        Self {
            id,
            stdio,
            pid: OnceLock::new(),
            waiting: Mutex::new(waiting),
            ends: watch::Sender::new(None),
            terminal: OnceLock::new(),
            exit: watch::Sender::new(None),
            give_up: CancellationToken::new(),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Option<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_waiting(&self, waiting: Waiting) {
        *self.waiting() = Some(waiting);
    }

    /// What to start; `None` if it was started already.
    pub(crate) fn take_waiting(&self) -> Option<Waiting> {
        self.waiting().take()
    }

    pub(crate) fn pid(&self) -> Option<Pid> {
        self.pid.get().copied()
    }

    pub(crate) fn set_pid(&self, pid: Pid) {
        self.pid.get_or_init(|| pid);
    }

    pub(crate) fn set_ends(&self, ends: Ends) {
        self.ends.send_replace(Some(ends));
    }

    pub(crate) fn set_terminal(&self, ends: Ends, terminal: Terminal) {
        self.terminal.get_or_init(|| terminal);
        self.set_ends(ends);
    }

    pub(crate) fn terminal(&self) -> Option<&Terminal> {
        self.terminal.get()
    }

    /// The agent's ends of the streams, once there are some. They are taken
    /// once; a terminal's come with the process.
    pub(crate) async fn take_ends(&self) -> Option<Ends> {
        let mut changes = self.ends.subscribe();
        changes.wait_for(Option::is_some).await.ok()?;
        self.ends.send_replace(None)
    }

    pub(crate) fn exit(&self) -> watch::Receiver<Option<u8>> {
        self.exit.subscribe()
    }

    pub(crate) fn exit_code(&self) -> Option<u8> {
        *self.exit.borrow()
    }

    pub(crate) fn set_exit(&self, code: u8) {
        self.exit.send_replace(Some(code));
    }
}
