// SPDX-License-Identifier: Apache-2.0
//! The control channel's service: requests in, [`Containers`] does the work.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use futures::Stream;
use nix::mount::{MntFlags, MsFlags, mount};
use nix::sys::time::TimeSpec;
use podhull_api::agent::agent_server::Agent;
use podhull_api::agent::{self, Event};
use podhull_types::{ContainerId, Deadline, ExecId, ProcessRef};
use tokio::sync::Notify;
use tonic::{Request, Response, Status};

use crate::containers::{Containers, now_ns};
use crate::error::GuestError;
use crate::events::Events;
use crate::init::{SHARE, SHM};
use crate::network;
use crate::tally::Tally;

/// The usual size of a pod's /dev/shm.
const DEFAULT_SHM: u64 = 64 << 20;

/// For /proc/sys/vm/drop_caches: names and inodes.
const DROP_NAMES: &str = "2";
/// For the same: from now on, no line in the kernel's log about it.
const QUIETLY: &str = "4";
/// Passes until a name of two levels and its inode have gone.
const PASSES: u32 = 4;

/// The service.
#[derive(Debug)]
pub struct Service {
    containers: Containers,
    events: Events,
    tally: Tally,
    /// Told when the VM may end.
    ended: std::sync::Arc<Notify>,
}

impl Service {
    /// A service on `containers`; `ended` is told after a Shutdown.
    #[must_use]
    pub fn new(
        containers: Containers,
        events: Events,
        tally: Tally,
        ended: std::sync::Arc<Notify>,
    ) -> Self {
        Self {
            containers,
            events,
            tally,
            ended,
        }
    }

    async fn freeze(&self, id: &str, frozen: bool) -> Result<(), GuestError> {
        let (containers, id) = (self.containers.clone(), container(id)?);
        to_the_end(async move { containers.freeze(&id, frozen).await }).await
    }
}

fn container(id: &str) -> Result<ContainerId, GuestError> {
    Ok(ContainerId::new(id)?)
}

fn process(container_id: &str, exec_id: &str) -> Result<ProcessRef, GuestError> {
    let container = container(container_id)?;
    let exec = if exec_id.is_empty() {
        None
    } else {
        Some(ExecId::new(exec_id)?)
    };
    Ok(ProcessRef { container, exec })
}

fn set_clock(ns: i64) -> Result<(), GuestError> {
    if ns <= 0 {
        return Ok(());
    }
    let time = TimeSpec::new(ns / 1_000_000_000, ns % 1_000_000_000);
    nix::time::clock_settime(nix::time::ClockId::CLOCK_REALTIME, time)
        .map_err(GuestError::system("set the clock"))
}

/// Gives back what the guest has of a container's part of the shared tree: its
/// mounts, then the names and inodes that the kernel remembers. The file server
/// keeps a descriptor for each, and the host cannot unmount what it keeps.
fn leave_share(id: &ContainerId) -> Result<(), GuestError> {
    let table = "/proc/self/mountinfo";
    let text = fs::read_to_string(table).map_err(GuestError::file("read", table))?;
    for point in mounts_of(id, &text) {
        nix::mount::umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|errno| GuestError::file("unmount", point)(errno.into()))?;
    }
    let caches = "/proc/sys/vm/drop_caches";
    fs::write(caches, QUIETLY).map_err(GuestError::file("write", caches))?;
    // A pass over what was used lately only marks it as old, and an inode, or a
    // folder, is up only after its name, or what is in it.
    for _ in 0..PASSES {
        fs::write(caches, DROP_NAMES).map_err(GuestError::file("write", caches))?;
    }
    Ok(())
}

/// The topmost mounts in a container's part of the shared tree.
fn mounts_of(id: &ContainerId, mountinfo: &str) -> BTreeSet<PathBuf> {
    let folder = PathBuf::from(SHARE).join(id.as_str());
    mountinfo
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter_map(|point| Path::new(point).strip_prefix(&folder).ok())
        // The host named it: no character of it is escaped.
        .filter_map(|below| below.components().next())
        .map(|name| folder.join(name))
        .collect()
}

async fn configure(
    containers: &Containers,
    request: &agent::ConfigureRequest,
) -> Result<(), GuestError> {
    set_clock(request.wall_clock_ns)?;
    containers.make_pod(request).await?;
    if !request.hostname.is_empty() {
        nix::unistd::sethostname(&request.hostname)
            .map_err(GuestError::system("set the hostname"))?;
    }
    if !request.domainname.is_empty() {
        let path = "/proc/sys/kernel/domainname";
        fs::write(path, &request.domainname).map_err(GuestError::file("write", path))?;
    }
    if !request.share_tag.is_empty() {
        // Set-user-id programs of images must work, so no MS_NOSUID here.
        let flags = MsFlags::MS_NODEV;
        mount(
            Some(request.share_tag.as_str()),
            SHARE,
            Some("virtiofs"),
            flags,
            None::<&str>,
        )
        .map_err(|errno| GuestError::file("mount the shared tree at", SHARE)(errno.into()))?;
    }
    let size = if request.shm_size == 0 {
        DEFAULT_SHM
    } else {
        request.shm_size
    };
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let options = format!("mode=1777,size={size}");
    mount(
        Some("shm"),
        SHM,
        Some("tmpfs"),
        flags,
        Some(options.as_str()),
    )
    .map_err(|errno| GuestError::file("mount", SHM)(errno.into()))?;
    network::configure(containers.pod(), request).await?;
    containers.set_sysctls(&request.sysctls).await
}

/// Runs `work` to its end, also if the host no longer waits for it: a process
/// that is half made would have no owner.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, GuestError>> + Send + 'static,
) -> Result<T, GuestError> {
    tokio::spawn(work).await.unwrap_or_else(|error| {
        Err(GuestError::System {
            what: "serve the request",
            source: std::io::Error::other(error),
        })
    })
}

type EventStream = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;

#[tonic::async_trait]
impl Agent for Service {
    type EventsStream = EventStream;

    async fn configure(
        &self,
        request: Request<agent::ConfigureRequest>,
    ) -> Result<Response<agent::ConfigureResponse>, Status> {
        configure(&self.containers, &request.into_inner()).await?;
        Ok(Response::new(agent::ConfigureResponse {}))
    }

    async fn create_container(
        &self,
        request: Request<agent::CreateContainerRequest>,
    ) -> Result<Response<agent::CreateContainerResponse>, Status> {
        let request = request.into_inner();
        let pid_namespace = request.pid_namespace();
        let (containers, id) = (self.containers.clone(), container(&request.container_id)?);
        let pid = to_the_end(async move {
            let stdio = request.stdio.unwrap_or_default();
            containers
                .create(
                    id,
                    &request.spec_json,
                    &request.rootfs,
                    stdio,
                    pid_namespace,
                    &request.pid_target,
                )
                .await
        })
        .await?;
        let pid = pid.as_raw().unsigned_abs();
        Ok(Response::new(agent::CreateContainerResponse { pid }))
    }

    async fn create_exec(
        &self,
        request: Request<agent::CreateExecRequest>,
    ) -> Result<Response<agent::CreateExecResponse>, Status> {
        let request = request.into_inner();
        let id = process(&request.container_id, &request.exec_id)?;
        let stdio = request.stdio.unwrap_or_default();
        self.containers
            .create_exec(&id, &request.process_json, stdio)?;
        Ok(Response::new(agent::CreateExecResponse {}))
    }

    async fn start(
        &self,
        request: Request<agent::StartRequest>,
    ) -> Result<Response<agent::StartResponse>, Status> {
        let request = request.into_inner();
        let id = process(&request.container_id, &request.exec_id)?;
        let containers = self.containers.clone();
        let pid = to_the_end(async move { containers.start(&id).await }).await?;
        Ok(Response::new(agent::StartResponse {
            pid: pid.as_raw().unsigned_abs(),
        }))
    }

    async fn signal(
        &self,
        request: Request<agent::SignalRequest>,
    ) -> Result<Response<agent::SignalResponse>, Status> {
        let request = request.into_inner();
        let id = process(&request.container_id, &request.exec_id)?;
        self.containers.signal(&id, request.signal, request.all)?;
        Ok(Response::new(agent::SignalResponse {}))
    }

    async fn resize(
        &self,
        request: Request<agent::ResizeRequest>,
    ) -> Result<Response<agent::ResizeResponse>, Status> {
        let request = request.into_inner();
        let id = process(&request.container_id, &request.exec_id)?;
        self.containers.resize(&id, request.columns, request.rows)?;
        Ok(Response::new(agent::ResizeResponse {}))
    }

    async fn delete(
        &self,
        request: Request<agent::DeleteRequest>,
    ) -> Result<Response<agent::DeleteResponse>, Status> {
        let request = request.into_inner();
        let id = process(&request.container_id, &request.exec_id)?;
        let containers = self.containers.clone();
        let code = to_the_end(async move {
            let code = containers.delete(&id).await?;
            if id.exec.is_none() {
                let container = id.container.clone();
                let left = tokio::task::spawn_blocking(move || leave_share(&container)).await;
                // The host does without: it detaches what is still in use.
                if !matches!(left, Ok(Ok(()))) {
                    tracing::warn!(container = %id.container, ?left, "shared tree not left");
                }
            }
            Ok(code)
        })
        .await?;
        let exit = code.map(|code| agent::Exit {
            code: code.into(),
            at_ns: now_ns(),
        });
        Ok(Response::new(agent::DeleteResponse { exit }))
    }

    async fn pids(
        &self,
        request: Request<agent::PidsRequest>,
    ) -> Result<Response<agent::PidsResponse>, Status> {
        let pids = self
            .containers
            .pids(&container(&request.into_inner().container_id)?)?;
        Ok(Response::new(agent::PidsResponse { pids }))
    }

    async fn pause(
        &self,
        request: Request<agent::PauseRequest>,
    ) -> Result<Response<agent::PauseResponse>, Status> {
        self.freeze(&request.into_inner().container_id, true)
            .await?;
        Ok(Response::new(agent::PauseResponse {}))
    }

    async fn resume(
        &self,
        request: Request<agent::ResumeRequest>,
    ) -> Result<Response<agent::ResumeResponse>, Status> {
        self.freeze(&request.into_inner().container_id, false)
            .await?;
        Ok(Response::new(agent::ResumeResponse {}))
    }

    async fn update(
        &self,
        request: Request<agent::UpdateRequest>,
    ) -> Result<Response<agent::UpdateResponse>, Status> {
        let request = request.into_inner();
        self.containers
            .update(&container(&request.container_id)?, &request.resources_json)?;
        Ok(Response::new(agent::UpdateResponse {}))
    }

    async fn stats(
        &self,
        request: Request<agent::StatsRequest>,
    ) -> Result<Response<agent::StatsResponse>, Status> {
        let stats = self
            .containers
            .stats(&container(&request.into_inner().container_id)?)?;
        Ok(Response::new(stats))
    }

    async fn events(
        &self,
        request: Request<agent::EventsRequest>,
    ) -> Result<Response<EventStream>, Status> {
        let after = request.into_inner().after_sequence;
        self.events.acknowledge(after);
        let events = self.events.clone();
        let stream = futures::stream::unfold(after, move |after| {
            let events = events.clone();
            async move {
                let event = events.after(after).await;
                let sequence = event.sequence;
                Some((Ok(event), sequence))
            }
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn ping(
        &self,
        request: Request<agent::PingRequest>,
    ) -> Result<Response<agent::PingResponse>, Status> {
        self.events
            .acknowledge(request.into_inner().acknowledged_sequence);
        // The host is to know that this guest lives, whatever it holds.
        let held = self.tally.held();
        if let Err(error) = &held {
            tracing::warn!(%error, "the agent's descriptors cannot be counted");
        }
        Ok(Response::new(agent::PingResponse {
            wall_clock_ns: now_ns(),
            counts: Some(self.tally.counts()),
            held: held.ok(),
        }))
    }

    async fn shutdown(
        &self,
        request: Request<agent::ShutdownRequest>,
    ) -> Result<Response<agent::ShutdownResponse>, Status> {
        let time = Duration::from_millis(request.into_inner().deadline_ms.into());
        let mut problems = self.containers.end_all(Deadline::after(time)).await;
        nix::unistd::sync();
        // What is still mounted from it keeps it busy; the host must know.
        if let Err(errno) = nix::mount::umount2(SHARE, MntFlags::MNT_DETACH)
            && errno != nix::errno::Errno::EINVAL
        {
            problems.push(format!("unmount the shared tree: {errno}"));
        }
        self.ended.notify_one();
        Ok(Response::new(agent::ShutdownResponse {
            problems,
            counts: Some(self.tally.counts()),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_containers_own_topmost_mounts_are_left() {
        let text = "1 0 0:1 / /run/podhull/share rw - virtiofs x rw\n\
            2 1 0:2 / /run/podhull/share/c1/rootfs rw - virtiofs x rw\n\
            3 2 0:3 / /run/podhull/share/c1/v1/a\\040b rw - virtiofs x rw\n\
            4 1 0:4 / /run/podhull/share/c10/rootfs rw - virtiofs x rw\n";
        let found = mounts_of(&ContainerId::new("c1").unwrap(), text);
        let expected = ["rootfs", "v1"].map(|name| Path::new(SHARE).join("c1").join(name));
        assert_eq!(found, BTreeSet::from(expected));
    }
}
