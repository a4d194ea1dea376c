// SPDX-License-Identifier: Apache-2.0
//! What both services share: the one sandbox of this process, and its end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::topics;
use podhull_sandbox::{
    EventSink, RunDir, Runtime, Sandbox, SandboxError, SandboxEvent, SandboxSpec,
};
use podhull_types::{ContainerId, Deadline, ProcessRef, SandboxId};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::error::ShimError;
use crate::publisher::Publisher;
use crate::streaming::Streams;
use crate::wire::timestamp;

/// Where the process's sandbox is in its life.
#[derive(Debug)]
enum Slot {
    /// containerd has not asked for it yet, or its boot failed.
    Empty,
    /// CreateSandbox described it; StartSandbox will boot it.
    Described(Box<SandboxSpec>),
    Booting,
    Running(Arc<Sandbox>),
}

/// One pod's shim.
#[derive(Debug)]
pub(crate) struct Shim {
    pub(crate) namespace: String,
    pub(crate) id: SandboxId,
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) streams: Arc<Streams>,
    /// When containerd called `start`.
    pub(crate) started: Instant,
    /// Cancelled when the process is to end.
    pub(crate) ending: CancellationToken,
    /// Boots that are under way.
    booting: TaskTracker,
    runtime: Arc<Runtime>,
    slot: Mutex<Slot>,
    /// containerd made the sandbox by the Sandbox service.
    sandbox_api: AtomicBool,
    created_at: Mutex<Option<SystemTime>>,
}

impl Shim {
    pub(crate) fn new(
        namespace: String,
        id: SandboxId,
        runtime: Arc<Runtime>,
        publisher: Arc<Publisher>,
        started: Instant,
    ) -> Arc<Self> {
        let run_dir = RunDir::of(&runtime.config.run_dir, &namespace, &id);
        Arc::new(Self {
            namespace,
            id,
            publisher,
            streams: Streams::new(&run_dir),
            started,
            ending: CancellationToken::new(),
            booting: TaskTracker::new(),
            runtime,
            slot: Mutex::new(Slot::Empty),
            sandbox_api: AtomicBool::new(false),
            created_at: Mutex::new(None),
        })
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The running sandbox; NotFound while there is none.
    pub(crate) fn sandbox(&self) -> Result<Arc<Sandbox>, ShimError> {
        match &*self.slot() {
            Slot::Running(sandbox) => Ok(Arc::clone(sandbox)),
            _ => {
                let id = ContainerId::new(self.id.as_str())?;
                Err(SandboxError::NoProcess(ProcessRef::init(id)).into())
            }
        }
    }

    /// True once something was asked for: an idle process ends by itself.
    pub(crate) fn is_used(&self) -> bool {
        !matches!(&*self.slot(), Slot::Empty)
    }

    /// Whether the sandbox has no pause container and is ended by its service.
    pub(crate) fn serves_sandbox_api(&self) -> bool {
        self.sandbox_api.load(Ordering::Acquire)
    }

    /// When the sandbox was booted.
    pub(crate) fn created_at(&self) -> Option<SystemTime> {
        *self
            .created_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what StartSandbox will boot.
    pub(crate) fn describe(&self, spec: SandboxSpec) -> Result<(), ShimError> {
        let mut slot = self.slot();
        match *slot {
            Slot::Empty => {
                *slot = Slot::Described(Box::new(spec));
                self.sandbox_api.store(true, Ordering::Release);
                Ok(())
            }
            _ => Err(self.exists()),
        }
    }

    /// Takes what CreateSandbox described.
    pub(crate) fn described(&self) -> Result<SandboxSpec, ShimError> {
        let mut slot = self.slot();
        match std::mem::replace(&mut *slot, Slot::Empty) {
            Slot::Described(spec) => Ok(*spec),
            other => {
                *slot = other;
                let reason = "the sandbox was not created, or was started already";
                Err(SandboxError::refused("sandbox_id", reason).into())
            }
        }
    }

    fn exists(&self) -> ShimError {
        let id = ContainerId::new(self.id.as_str());
        match id {
            Ok(id) => SandboxError::ProcessExists(ProcessRef::init(id)).into(),
            Err(error) => error.into(),
        }
    }

    /// Boots the sandbox. A caller that goes away does not interrupt it.
    pub(crate) async fn boot(
        self: &Arc<Self>,
        spec: SandboxSpec,
    ) -> Result<Arc<Sandbox>, ShimError> {
        let under_way = {
            let mut slot = self.slot();
            if self.ending.is_cancelled() {
                return Err(SandboxError::Stopping(self.id.clone()).into());
            }
            if !matches!(*slot, Slot::Empty) {
                return Err(self.exists());
            }
            *slot = Slot::Booting;
            self.booting.token()
        };
        let shim = Arc::clone(self);
        detached(async move {
            let _under_way = under_way;
            let events = forward(&shim);
            let runtime = Arc::clone(&shim.runtime);
            let booted = Sandbox::boot(runtime, spec, events, &shim.ending).await;
            let mut slot = shim.slot();
            match booted {
                Ok(sandbox) => {
                    *slot = Slot::Running(Arc::clone(&sandbox));
                    *shim
                        .created_at
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner) = Some(SystemTime::now());
                    Ok(sandbox)
                }
                Err(error) => {
                    *slot = Slot::Empty;
                    Err(error.into())
                }
            }
        })
        .await
    }

    /// Waits for `making`, which makes the sandbox. If whoever asked for it goes away
    /// first, as a containerd that is killed, the process ends: the next containerd has
    /// no record of the sandbox and would never ask for its end.
    pub(crate) async fn asked_for<T>(&self, making: impl Future<Output = T>) -> T {
        let nobody_waits = self.ending.clone().drop_guard();
        let made = making.await;
        nobody_waits.disarm();
        made
    }

    /// Releases everything, also what a boot that is under way has made; for
    /// the end of the process.
    pub(crate) async fn release(&self, by: Deadline) {
        {
            // A boot is counted by now, or is refused.
            let _slot = self.slot();
            self.ending.cancel();
        }
        self.booting.close();
        if by.run(self.booting.wait()).await.is_err() {
            tracing::error!("a boot does not end");
        }
        if let Ok(sandbox) = self.sandbox() {
            let report = sandbox.stop(by).await;
            tracing::info!(%report, "released");
        }
    }

    /// Lets the process end: everything is released on the way.
    pub(crate) fn end(&self) {
        self.ending.cancel();
    }
}

/// Runs `work` to its end, also if whoever waits for it is gone: ttrpc drops a
/// request whose connection or deadline ended, and half a change must not stay.
pub(crate) async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, ShimError>> + Send + 'static,
) -> Result<T, ShimError> {
    tokio::spawn(work).await.unwrap_or_else(|error| {
        Err(ShimError::System {
            step: "serve the request",
            source: std::io::Error::other(error),
        })
    })
}

/// Passes on what happens in the sandbox, in its order.
fn forward(shim: &Arc<Shim>) -> EventSink {
    let publisher = Arc::clone(&shim.publisher);
    let streams = Arc::clone(&shim.streams);
    EventSink::new(move |event| match event {
        SandboxEvent::Exited { process, pid, exit } => {
            streams.ended(&process);
            let container = process.container.to_string();
            let event = TaskExit {
                id: process
                    .exec
                    .map_or_else(|| container.clone(), |exec| exec.to_string()),
                container_id: container,
                pid,
                exit_status: exit.code.into(),
                exited_at: timestamp(exit.at),
                ..TaskExit::default()
            };
            publisher.publish(topics::TASK_EXIT_EVENT_TOPIC, "TaskExit", &event);
        }
        SandboxEvent::OutOfMemory { container } => {
            let event = TaskOOM {
                container_id: container.to_string(),
                ..TaskOOM::default()
            };
            publisher.publish(topics::TASK_OOM_EVENT_TOPIC, "TaskOOM", &event);
        }
        // The exits that came before it are what containerd understands.
        SandboxEvent::Died { reason } => tracing::error!(reason, "sandbox died"),
    })
}

#[cfg(test)]
mod tests {
    use std::task::Poll;
    use std::time::Duration;

    use podhull_sandbox::PodFiles;

    use super::*;
    use crate::fixture::shim;

    fn spec() -> SandboxSpec {
        SandboxSpec {
            id: SandboxId::new("s1").unwrap(),
            namespace: "k8s.io".into(),
            hostname: String::new(),
            domainname: String::new(),
            netns: None,
            users: None,
            cgroups_path: None,
            sysctls: std::collections::BTreeMap::new(),
            memory_limit_bytes: None,
            vcpus: None,
            shm_size: None,
            files: PodFiles::default(),
            started: Instant::now(),
        }
    }

    #[tokio::test]
    async fn a_shim_whose_sandbox_nobody_waits_for_ends() {
        let folder = tempfile::tempdir().unwrap();
        let shim = shim(folder.path());
        shim.asked_for(std::future::ready(())).await;
        assert!(!shim.ending.is_cancelled(), "it was answered");
        let asked = shim.asked_for(std::future::pending::<()>());
        drop(Box::pin(asked));
        assert!(!shim.ending.is_cancelled(), "it was not asked for yet");
        let mut asked = Box::pin(shim.asked_for(std::future::pending::<()>()));
        let polled = std::future::poll_fn(|cx| Poll::Ready(asked.as_mut().poll(cx)));
        assert!(polled.await.is_pending());
        drop(asked);
        assert!(shim.ending.is_cancelled());
    }

    #[tokio::test]
    async fn a_boot_after_the_release_began_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let shim = shim(folder.path());
        shim.release(Deadline::after(Duration::from_secs(5))).await;
        let error = shim.boot(spec()).await.unwrap_err();
        let ShimError::Sandbox(SandboxError::Stopping(id)) = error else {
            panic!("{error}");
        };
        assert_eq!(id.as_str(), "s1");
        assert!(!shim.is_used(), "it would be waited for");
    }
}
