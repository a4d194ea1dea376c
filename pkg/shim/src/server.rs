// SPDX-License-Identifier: Apache-2.0
//! `serve`: the process of one pod, from its start to its end.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};
use podhull_config::Config;
use podhull_sandbox::{RunDir, Runtime};
use podhull_telemetry::{Metrics, log};
use podhull_types::{Deadline, SandboxId, chain};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::task::TaskTracker;
use ttrpc::r#async::{Server, Service};

use crate::SELF;
use crate::args::Args;
use crate::bootstrap::{SERVES, TTRPC_ADDRESS};
use crate::called::{self, CALLED};
use crate::connections;
use crate::error::ShimError;
use crate::identity::Identity;
use crate::metrics;
use crate::publisher::Publisher;
use crate::sandbox_service::SandboxService;
use crate::shim::Shim;
use crate::task_service::TaskService;

/// How long a process serves that nobody asks for a pod.
const IDLE: Duration = Duration::from_secs(120);
/// Time for the last events to reach containerd.
const LAST_EVENTS: Duration = Duration::from_secs(3);
/// Time for streams to be read and to end.
const LAST_STREAMS: Duration = Duration::from_secs(2);
/// Time for containerd to hang up after its last answer.
const HANG_UP: Duration = Duration::from_secs(2);
/// Time for what may block in the kernel, once all else has ended.
const BLOCKED: Duration = Duration::from_secs(1);
/// By which `ps` and `pgrep` list it: the program's, as much as the kernel keeps.
const NAME: &CStr = c"containerd-shim";
/// The names of the Task service: the methods are the same.
const TASK_V3: &str = "containerd.task.v3.Task";
const TASK_V2: &str = "containerd.task.v2.Task";

/// Serves the pod `args.id` until containerd ends it. Called in a process of
/// its own with one thread, whose standard input is the listening socket and
/// whose standard output is read by `start`.
///
/// # Errors
/// What kept it from serving; `start` has been told.
pub fn serve(args: &Args) -> Result<(), ShimError> {
    let mut says = standard_output().map_err(ShimError::system("take standard output"))?;
    match prepare(args) {
        Ok((runtime, prepared)) => to_its_end(runtime, run(prepared, says)),
        Err(error) => Err(told(&mut says, error)),
    }
}

/// Tells `start` what kept the process from serving.
fn told(says: &mut impl Write, error: ShimError) -> ShimError {
    if let Err(unheard) = says.write_all(chain(&error).as_bytes()) {
        tracing::warn!(error = chain(&error), %unheard, "nobody waits for the shim");
    }
    error
}

/// Does `work`. The process is not held up by what blocks in the kernel behind it,
/// as a mount does whose server is away: nobody else knows of it any more.
fn to_its_end<T>(runtime: tokio::runtime::Runtime, work: impl Future<Output = T>) -> T {
    let done = runtime.block_on(work);
    runtime.shutdown_timeout(BLOCKED);
    done
}

/// The pipe to `start`; standard output itself is /dev/null from here on.
fn standard_output() -> io::Result<std::fs::File> {
    let pipe = io::stdout().as_fd().try_clone_to_owned()?;
    let null = std::fs::File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(pipe.into())
}

#[derive(Debug)]
struct Prepared {
    namespace: String,
    id: SandboxId,
    listener: UnixListener,
    run_dir: RunDir,
    runtime: Arc<Runtime>,
    started: Instant,
}

fn prepare(args: &Args) -> Result<(tokio::runtime::Runtime, Prepared), ShimError> {
    // Otherwise it is that of the link by which it was run.
    rustix::thread::set_name(NAME).map_err(ShimError::system("name the process"))?;
    let called = std::env::var(CALLED).ok();
    // Run by hand, it is called now.
    let started = called
        .and_then(|word| called::moment(&word))
        .unwrap_or_else(Instant::now);
    nix::unistd::setsid().map_err(ShimError::system("start a session"))?;
    // What the guest's users must reach is made with the modes that are asked for.
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
    let config = Config::load(Path::new(podhull_config::PATH))?;
    let id = SandboxId::new(args.id.as_str())?;
    let run_dir = RunDir::of(&config.run_dir, &args.namespace, &id);
    // containerd says so when it logs at this level itself.
    let filter = if args.debug { "debug" } else { &config.log };
    log::init(filter, Some(Path::new("log")), Some(&run_dir.log()))?;
    log::panics();
    let identity = Identity::own().map_err(ShimError::system("find our own start"))?;
    identity.write(&run_dir.shim())?;
    own_mounts()?;
    std::env::set_current_dir("/").map_err(ShimError::file("enter", "/"))?;
    let metrics = Metrics::new().map_err(|error| ShimError::Metrics(error.to_string()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(ShimError::system("start the runtime"))?;
    let prepared = Prepared {
        namespace: args.namespace.clone(),
        id,
        listener: listener().map_err(ShimError::system("take the listening socket"))?,
        run_dir,
        runtime: Arc::new(Runtime {
            config,
            helper: SELF.into(),
            metrics,
        }),
        started,
    };
    Ok((runtime, prepared))
}

/// The pod's mounts are this process's own, so that they end with it; what the
/// host mounts later is seen all the same.
fn own_mounts() -> Result<(), ShimError> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(ShimError::system("make a mount namespace"))?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .map_err(ShimError::system("keep mounts from the host"))
}

/// The listening socket from standard input, which is /dev/null from here on.
fn listener() -> io::Result<UnixListener> {
    let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// What serves once it is made.
struct Serving {
    shim: Arc<Shim>,
    publisher: Arc<Publisher>,
    server: Server,
    /// containerd's connections.
    open: TaskTracker,
    terminated: Signal,
    readers: tokio::net::UnixListener,
    numbers: Metrics,
    run_dir: RunDir,
    stop_timeout: Duration,
}

async fn run(prepared: Prepared, mut says: std::fs::File) -> Result<(), ShimError> {
    match set_up(prepared).await {
        Ok(serving) => {
            serving.until_the_end(says).await;
            Ok(())
        }
        Err(error) => Err(told(&mut says, error)),
    }
}

async fn set_up(prepared: Prepared) -> Result<Serving, ShimError> {
    let Prepared {
        namespace,
        id,
        listener,
        run_dir,
        runtime,
        started,
    } = prepared;
    let events_to = std::env::var(TTRPC_ADDRESS).unwrap_or_default();
    let publisher = Arc::new(Publisher::start(&namespace, &events_to));
    let stop_timeout = runtime.config.stop_timeout();
    let numbers = runtime.metrics.clone();
    let readers = metrics::listen(&run_dir.metrics())
        .map_err(ShimError::file("listen at", run_dir.metrics()))?;
    let shim = Shim::new(namespace, id, runtime, Arc::clone(&publisher), started);
    let open = TaskTracker::new();
    let mut server = server(&shim, listener, open.clone())?;
    let terminated =
        signal(SignalKind::terminate()).map_err(ShimError::system("watch for SIGTERM"))?;
    server.start().await.map_err(|error| ShimError::System {
        step: "serve",
        source: io::Error::other(error),
    })?;
    Ok(Serving {
        shim,
        publisher,
        server,
        open,
        terminated,
        readers,
        numbers,
        run_dir,
        stop_timeout,
    })
}

impl Serving {
    async fn until_the_end(self, mut says: std::fs::File) {
        let Self {
            shim,
            publisher,
            mut server,
            open,
            mut terminated,
            readers,
            numbers,
            run_dir,
            stop_timeout,
        } = self;
        // `start` answers containerd once it reads the end of this. If containerd
        // has given the start up, nobody will come.
        if let Err(error) = says.write_all(SERVES.as_bytes()) {
            tracing::warn!(%error, "nobody waits for the shim any more");
            shim.end();
        }
        drop(says);
        tracing::info!(sandbox = %shim.id, "serving");

        tokio::select! {
            () = shim.ending.cancelled() => tracing::info!("containerd ends the shim"),
            _ = terminated.recv() => tracing::info!("terminated"),
            () = unused(&shim) => tracing::warn!("nobody asked for a pod"),
            never = metrics::serve(&readers, &numbers) => match never {},
        }
        shim.release(Deadline::after(stop_timeout)).await;
        shim.streams.end(Deadline::after(LAST_STREAMS)).await;
        publisher.finish(Deadline::after(LAST_EVENTS)).await;
        server.stop_listen().await;
        open.close();
        let left = Deadline::after(HANG_UP).run(open.wait()).await;
        tracing::debug!(all_left = left.is_ok(), "connections");
        if let Err(error) = server.shutdown().await {
            tracing::warn!(%error, "server not shut down");
        }
        if let Err(error) = run_dir.remove() {
            tracing::error!(%error, "run folder not removed");
        }
    }
}

fn server(
    shim: &Arc<Shim>,
    listener: UnixListener,
    open: TaskTracker,
) -> Result<Server, ShimError> {
    let listener = tokio::net::UnixListener::from_std(listener)
        .map_err(ShimError::system("watch the socket"))?;
    let mut server = Server::new().add_listener(connections::accept(
        listener,
        open,
        Arc::clone(&shim.streams),
    ));
    for service in services(shim) {
        server = server.register_service(service);
    }
    Ok(server)
}

/// What containerd may call, by the services' names.
fn services(shim: &Arc<Shim>) -> [HashMap<String, Service>; 3] {
    let task = TaskService(Arc::clone(shim));
    let mut v2 = create_task(Arc::new(task.clone()));
    if let Some(methods) = v2.remove(TASK_V3) {
        v2.insert(TASK_V2.to_owned(), methods);
    }
    let v3 = create_task(Arc::new(task));
    let sandbox = create_sandbox(Arc::new(SandboxService(Arc::clone(shim))));
    [v2, v3, sandbox]
}

/// Resolves if containerd made the process and then forgot it.
async fn unused(shim: &Shim) {
    loop {
        tokio::time::sleep(IDLE).await;
        if !shim.is_used() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ttrpc::Code;
    use ttrpc::r#async::Client;

    use super::*;
    use crate::fixture;

    #[test]
    fn a_shim_whose_mount_blocks_ends_all_the_same() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (let_go, held) = std::sync::mpsc::channel::<()>();
        let (ended, end) = std::sync::mpsc::channel();
        let blocks = move || held.recv().is_err();
        std::thread::spawn(move || {
            let work = async { drop(tokio::task::spawn_blocking(blocks)) };
            to_its_end(runtime, work);
            ended.send(()).unwrap();
        });
        let in_time = end.recv_timeout(Duration::from_secs(2));
        drop(let_go);
        assert!(in_time.is_ok(), "it waits for the mount");
    }

    #[tokio::test]
    async fn what_keeps_a_shim_from_serving_is_told_to_its_start() {
        let folder = tempfile::tempdir().unwrap();
        let id = SandboxId::new("s1").unwrap();
        let run_dir = RunDir::of(folder.path(), "k8s.io", &id);
        let taken = run_dir.metrics();
        std::fs::create_dir_all(&taken).unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let prepared = Prepared {
            namespace: "k8s.io".into(),
            id,
            listener,
            run_dir,
            runtime: fixture::runtime(folder.path()),
            started: Instant::now(),
        };
        let (mut said, says) = io::pipe().unwrap();
        let says = std::fs::File::from(std::os::fd::OwnedFd::from(says));
        let error = run(prepared, says).await.unwrap_err();
        let mut text = String::new();
        io::Read::read_to_string(&mut said, &mut text).unwrap();
        assert!(text.contains(taken.to_str().unwrap()), "{text}");
        assert_eq!(text, chain(&error));
    }

    /// A generated trait answers NotFound for each method that is left out, with
    /// these words.
    const LEFT_OUT: &str = "is not supported";

    #[tokio::test]
    async fn no_method_of_a_service_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let shim = fixture::shim(folder.path());
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut server = server(&shim, listener, TaskTracker::new()).unwrap();
        server.start().await.unwrap();
        let client = Client::connect(&format!("unix://{}", path.display())).await;
        let client = client.unwrap();

        let mut called = BTreeSet::new();
        for (service, methods) in services(&shim).into_iter().flatten() {
            for method in methods.methods.into_keys() {
                let request = ttrpc::Request {
                    service: service.clone(),
                    method: method.clone(),
                    timeout_nano: 5_000_000_000,
                    ..ttrpc::Request::default()
                };
                let answer = client.request(request).await;
                if let Err(ttrpc::Error::RpcStatus(status)) = answer {
                    let left_out = status.message().contains(LEFT_OUT);
                    assert!(!left_out, "{service}/{method}: {}", status.message());
                    assert_ne!(status.code(), Code::UNKNOWN, "{service}/{method}");
                }
                called.insert(format!("{service}/{method}"));
            }
        }
        // Task twice (v2 and v3 have the same methods), Sandbox once.
        assert_eq!(called.len(), 2 * 17 + 9, "{called:?}");
        server.shutdown().await.unwrap();
    }
}
