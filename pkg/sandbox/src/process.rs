// SPDX-License-Identifier: Apache-2.0
//! The states of a process as containerd sees it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use podhull_types::{ExitStatus, ProcessRef};
use tokio::sync::watch;

use crate::error::SandboxError;
use crate::spec::{EventSink, ProcessState, SandboxEvent, Status, Stdio};
use crate::stdio::ProcessIo;

/// Least time between two reports of an OOM kill in one container.
const OOM_PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy)]
struct Life {
    status: Status,
    exit: Option<ExitStatus>,
    /// The guest has made it.
    made: bool,
    /// Its start was announced to containerd, so its exit may be, too.
    announced: bool,
    reported: bool,
}

/// The relays of a process's streams.
#[derive(Debug)]
enum Io {
    None,
    Relayed(ProcessIo),
    /// Somebody ends them, or has.
    Taken,
}

/// One process: a container's init, an added one, or the pause task, which has
/// no process in the guest.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) id: ProcessRef,
    pub(crate) pid: u32,
    pub(crate) stdio: Stdio,
    pub(crate) pause: bool,
    life: watch::Sender<Life>,
    io: Mutex<Io>,
    events: EventSink,
    /// When an OOM kill was told last.
    oom_told: Mutex<Option<Instant>>,
    /// The guest's word on its end.
    ending: OnceLock<ExitStatus>,
    /// Somebody deletes it.
    claimed: AtomicBool,
}

fn name(status: Status) -> &'static str {
    match status {
        Status::Created => "created",
        Status::Running => "running",
        Status::Paused => "paused",
        Status::Stopped => "stopped",
    }
}

impl Process {
    pub(crate) fn new(
        id: ProcessRef,
        pid: u32,
        stdio: Stdio,
        pause: bool,
        events: EventSink,
    ) -> Self {
        let life = Life {
            status: Status::Created,
            exit: None,
            made: pause,
            announced: false,
            reported: false,
        };
        let life = watch::Sender::new(life);
        Self {
            id,
            pid,
            stdio,
            pause,
            life,
            io: Mutex::new(Io::None),
            events,
            oom_told: Mutex::new(None),
            ending: OnceLock::new(),
            claimed: AtomicBool::new(false),
        }
    }

    pub(crate) fn state(&self) -> ProcessState {
        let life = *self.life.borrow();
        ProcessState {
            status: life.status,
            pid: self.pid,
            exit: life.exit,
            stdio: self.stdio.clone(),
        }
    }

    /// Fails unless the process is in one of `wanted`.
    pub(crate) fn expect(
        &self,
        wanted: &[Status],
        expected: &'static str,
    ) -> Result<(), SandboxError> {
        let status = self.life.borrow().status;
        if wanted.contains(&status) {
            return Ok(());
        }
        let (process, state) = (self.id.clone(), name(status));
        Err(SandboxError::WrongState {
            process,
            state,
            expected,
        })
    }

    /// Notes that it can be asked for.
    pub(crate) fn made(&self) {
        self.life.send_modify(|life| life.made = true);
    }

    /// Waits until it has been made, or given up.
    pub(crate) async fn until_made(&self) {
        let mut life = self.life.subscribe();
        // The sender lives in `self`, so the wait cannot fail.
        let _ = life.wait_for(|life| life.made || life.exit.is_some()).await;
    }

    /// Notes that it runs, lets `announce` tell containerd, and only then lets
    /// its exit be told, which may have come already.
    pub(crate) fn started(&self, announce: impl FnOnce(u32)) {
        self.life.send_modify(|life| {
            if life.status == Status::Created {
                life.status = Status::Running;
            }
            announce(self.pid);
            life.made = true;
            life.announced = true;
            self.report_exit(life);
        });
    }

    /// Whether an OOM kill may be told now.
    pub(crate) fn may_tell_oom(&self) -> bool {
        let mut told = self.oom_told.lock().unwrap_or_else(PoisonError::into_inner);
        let may = told.is_none_or(|told| told.elapsed() >= OOM_PAUSE);
        if may {
            *told = Some(Instant::now());
        }
        may
    }

    /// True for the first who asks: the one who deletes it.
    pub(crate) fn claim(&self) -> bool {
        !self.claimed.swap(true, Ordering::AcqRel)
    }

    /// Gives a claim back: the delete failed and may be tried again.
    pub(crate) fn unclaim(&self) {
        self.claimed.store(false, Ordering::Release);
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        self.life.send_modify(|life| match (life.status, paused) {
            (Status::Running, true) => life.status = Status::Paused,
            (Status::Paused, false) => life.status = Status::Running,
            _ => {}
        });
    }

    /// Notes how it ended; the first note stays, and the guest's word is the
    /// first.
    pub(crate) fn exited(&self, exit: ExitStatus) {
        let exit = self.ending.get().copied().unwrap_or(exit);
        self.life.send_modify(|life| {
            life.exit.get_or_insert(exit);
            life.status = Status::Stopped;
            self.report_exit(life);
        });
    }

    /// Tells the exit once, after the start and before whoever waits is woken:
    /// a delete that follows must not overtake it.
    fn report_exit(&self, life: &mut Life) {
        let Some(exit) = life.exit.filter(|_| life.announced && !life.reported) else {
            return;
        };
        life.reported = true;
        self.events.send(SandboxEvent::Exited {
            process: self.id.clone(),
            pid: self.pid,
            exit,
        });
    }

    /// Waits for its end. Cancel safe.
    pub(crate) async fn wait(&self) -> ExitStatus {
        let mut life = self.life.subscribe();
        let ended = life
            .wait_for(|life| life.exit.is_some())
            .await
            .map(|life| life.exit);
        // The sender lives in `self`, so the wait cannot fail.
        ended.ok().flatten().unwrap_or_else(ExitStatus::vm_gone)
    }

    fn io(&self) -> MutexGuard<'_, Io> {
        self.io.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives its streams' relays to it, or back to the caller if it is not to
    /// have any more.
    pub(crate) fn attach_io(&self, io: ProcessIo) -> Result<(), ProcessIo> {
        let mut slot = self.io();
        if matches!(*slot, Io::Taken) {
            return Err(io);
        }
        *slot = Io::Relayed(io);
        Ok(())
    }

    /// Its streams' relays, to be ended; there will be no others.
    pub(crate) fn take_io(&self) -> Option<ProcessIo> {
        match std::mem::replace(&mut *self.io(), Io::Taken) {
            Io::Relayed(io) => Some(io),
            Io::None | Io::Taken => None,
        }
    }

    /// Resolves once its output has been read, or will not be.
    pub(crate) async fn delivered(&self) {
        let delivered = match &*self.io() {
            Io::Relayed(io) => io.delivered(),
            Io::None | Io::Taken => return,
        };
        delivered.await;
    }

    /// Notes the guest's word on its end, which is told later. Should the VM die
    /// before that, it is still how the process ended. False if there was one
    /// already, which stays.
    pub(crate) fn set_ending(&self, exit: ExitStatus) -> bool {
        self.ending.set(exit).is_ok()
    }

    /// Whether its end is known and waits for its output.
    pub(crate) fn is_ending(&self) -> bool {
        self.ending.get().is_some() && self.state().exit.is_none()
    }

    pub(crate) fn close_stdin(&self) {
        if let Io::Relayed(io) = &*self.io() {
            io.close_stdin();
        }
    }
}

#[cfg(test)]
mod tests {
    use podhull_types::ContainerId;

    use super::*;

    fn process() -> (Process, std::sync::mpsc::Receiver<SandboxEvent>) {
        let (events, received) = std::sync::mpsc::channel();
        let events = EventSink::new(move |event| drop(events.send(event)));
        let id = ProcessRef::init(ContainerId::new("c1").unwrap());
        (
            Process::new(id, 7, Stdio::default(), false, events),
            received,
        )
    }

    #[test]
    fn an_exit_is_told_once_and_after_the_start() {
        let (process, events) = process();
        process.exited(ExitStatus {
            code: 3,
            ..ExitStatus::vm_gone()
        });
        assert!(events.try_recv().is_err(), "not announced yet");
        let mut order = Vec::new();
        process.started(|pid| order.push(pid));
        assert_eq!(order, [7]);
        assert!(matches!(
            events.try_recv(),
            Ok(SandboxEvent::Exited { exit, .. }) if exit.code == 3
        ));
        process.exited(ExitStatus::vm_gone());
        assert!(events.try_recv().is_err(), "told once");
        assert_eq!(process.state().exit.unwrap().code, 3);
        assert_eq!(process.state().status, Status::Stopped);
    }

    #[tokio::test]
    async fn every_waiter_is_answered() {
        let (process, _events) = process();
        process.started(|_| {});
        let (one, two, ()) = tokio::join!(process.wait(), process.wait(), async {
            process.exited(ExitStatus {
                code: 9,
                ..ExitStatus::vm_gone()
            });
        });
        assert_eq!((one.code, two.code, process.wait().await.code), (9, 9, 9));
    }

    /// The word waits for the output; the VM dies meanwhile.
    #[test]
    fn an_exit_that_the_guest_told_outlives_the_guest() {
        let (process, _events) = process();
        process.started(|_| {});
        let first = process.set_ending(ExitStatus {
            code: 3,
            ..ExitStatus::vm_gone()
        });
        assert!(first && !process.set_ending(ExitStatus::vm_gone()));
        assert!(process.is_ending() && process.state().exit.is_none());
        process.exited(ExitStatus::vm_gone());
        assert_eq!(process.state().exit.unwrap().code, 3);
        assert!(!process.is_ending());
    }

    #[test]
    fn a_wrong_state_names_both_states() {
        let (process, _events) = process();
        let error = process.expect(&[Status::Stopped], "stopped").unwrap_err();
        assert_eq!(error.to_string(), "process c1 is created, expected stopped");
    }
}
