// SPDX-License-Identifier: Apache-2.0
//! `start`: makes the process that serves a pod, or finds it.
//!
//! What containerd sends and expects differs between its releases (containerd's
//! `core/runtime/v2/binary.go` and `shim.go`):
//!
//! | containerd | on standard input | answered with |
//! |---|---|---|
//! | 1.6 to 2.2 | the runtime's options, an Any | the address: task API version 2, `start` once per container |
//! | from 2.3 | BootstrapParams | JSON: task API version 3, containers join by address |
//!
//! Both read `address` in each bundle when they come back, 1.x needs it.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::protobuf::Message;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{Mode, umask};
use podhull_config::Config;
use podhull_sandbox::RunDir;
use podhull_telemetry::log;
use podhull_types::{SandboxId, chain};

use crate::SELF;
use crate::address;
use crate::args::Args;
use crate::bundle;
use crate::called::{self, CALLED};
use crate::error::ShimError;
use crate::identity::{DIES, Identity, Running};

/// Time for the serving process to accept connections.
const SERVING: Duration = Duration::from_secs(20);
/// Time for one that has said why it does not serve to end.
const ENDS: Duration = Duration::from_secs(3);
/// What the serving process says when it does.
pub(crate) const SERVES: &str = "serves";
/// Where containerd listens for events.
pub(crate) const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// Programs that the serving process may need.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// What containerd told `start`, beside the flags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The folder in which containerd started us: the bundle.
    pub bundle: PathBuf,
    /// What came on standard input.
    pub stdin: Vec<u8>,
    /// containerd's ttrpc socket, from the environment.
    pub ttrpc_address: String,
}

impl Caller {
    /// The bootstrap parameters, if a containerd that knows them has sent them.
    /// The older message decodes as this one, too: id and namespace tell.
    fn params(&self, args: &Args) -> Option<BootstrapParams> {
        let params = BootstrapParams::parse_from_bytes(&self.stdin).ok()?;
        (params.instance_id == args.id && params.namespace == args.namespace).then_some(params)
    }
}

/// Makes or finds the process that serves the pod of `args.id`; gives what
/// containerd is to read on standard output. `name` is by which we were run, and
/// will be what that process is listed as.
///
/// # Errors
/// What kept the process from serving; nothing of it stays.
pub fn start(args: &Args, caller: &Caller, name: &OsStr) -> Result<String, ShimError> {
    let called = called::now().map_err(ShimError::system("read the clock"))?;
    let config = Config::load(Path::new(podhull_config::PATH)).map_err(ShimError::from);
    let spec = bundle::read(&caller.bundle)?;
    bundle::refuse_podless(spec.as_ref(), &args.id)?;
    let sandbox = SandboxId::new(bundle::sandbox_of(spec.as_ref(), &args.id))?;
    let params = caller.params(args);
    let run_dir = if sandbox.as_str() == args.id {
        let config = config?;
        let run_dir = RunDir::of(&config.run_dir, &args.namespace, &sandbox);
        let ttrpc_address = match &params {
            Some(params) => &params.containerd_ttrpc_address,
            None => &caller.ttrpc_address,
        };
        let serving = Serving {
            args,
            ttrpc_address,
            program: Path::new(SELF),
            name,
            called: &called,
        };
        serve_new(&serving, &config, &run_dir)?;
        run_dir
    } else {
        join(&caller.bundle, &args.namespace, &sandbox, config)?
    };
    let address = address::of(&run_dir.socket());
    address::write(&caller.bundle, &address)?;
    tracing::info!(container = args.id, %sandbox, address, "started");
    Ok(match params {
        Some(_) => {
            serde_json::json!({"version": 3, "address": address, "protocol": "ttrpc"}).to_string()
        }
        None => address,
    })
}

/// Finds the shim of a pod that runs.
fn join(
    bundle: &Path,
    namespace: &str,
    sandbox: &SandboxId,
    loaded: Result<Config, ShimError>,
) -> Result<RunDir, ShimError> {
    let (config, unusable) = settings_of_a_pod(bundle, namespace, sandbox, loaded)?;
    let run_dir = RunDir::of(&config.run_dir, namespace, sandbox);
    log::init_beside(&config.log, &run_dir.log(), false)?;
    if let Some(error) = unusable {
        tracing::warn!(error = chain(&error), "defaults are used");
    }
    UnixStream::connect(run_dir.socket()).map_err(|source| ShimError::ShimGone {
        sandbox: sandbox.to_string(),
        socket: run_dir.socket(),
        source,
    })?;
    Ok(run_dir)
}

/// A pod that runs is where it was made, whatever the configuration has become
/// since, which has to say only what the pod does not; then also what is wrong
/// with it.
fn settings_of_a_pod(
    bundle: &Path,
    namespace: &str,
    sandbox: &SandboxId,
    loaded: Result<Config, ShimError>,
) -> Result<(Config, Option<ShimError>), ShimError> {
    let Some(run_dir) = address::parent(bundle, namespace, sandbox) else {
        return loaded.map(|config| (config, None));
    };
    let (mut config, unusable) = match loaded {
        Ok(config) => (config, None),
        Err(error) => (Config::default(), Some(error)),
    };
    config.run_dir = run_dir;
    Ok((config, unusable))
}

/// What the serving process is made from.
#[derive(Debug)]
struct Serving<'a> {
    args: &'a Args,
    ttrpc_address: &'a str,
    program: &'a Path,
    name: &'a OsStr,
    /// See [`called`].
    called: &'a str,
}

/// Starts the serving process and waits until it accepts connections. Nothing
/// of it stays if that fails.
fn serve_new(serving: &Serving, config: &Config, run_dir: &RunDir) -> Result<(), ShimError> {
    let served = try_to_serve(serving, config, run_dir);
    // What a shim that runs needs is not ours to remove.
    if served.is_err() && Identity::find(&run_dir.shim()).is_none() {
        let removed = run_dir.remove();
        tracing::debug!(?removed, "released what a failed start had made");
    }
    served
}

fn try_to_serve(serving: &Serving, config: &Config, run_dir: &RunDir) -> Result<(), ShimError> {
    run_dir.create()?;
    let usual = umask(Mode::S_IRWXG | Mode::S_IRWXO);
    let listener = listen(&run_dir.socket());
    umask(usual);
    let Some(listener) = listener? else {
        // Asked twice: it serves already.
        return Ok(());
    };
    // Standard error is no place for a log: containerd reads it as the answer.
    log::init(&config.log, None, Some(&run_dir.log()))?;
    spawn(serving, listener)
}

/// Listens at `socket`; `None` if somebody does. A socket that a dead process
/// left is replaced.
fn listen(socket: &Path) -> Result<Option<UnixListener>, ShimError> {
    match UnixListener::bind(socket) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        bound => {
            return bound
                .map(Some)
                .map_err(ShimError::file("listen at", socket));
        }
    }
    if UnixStream::connect(socket).is_ok() {
        return Ok(None);
    }
    fs::remove_file(socket).map_err(ShimError::file("remove stale socket", socket))?;
    UnixListener::bind(socket)
        .map(Some)
        .map_err(ShimError::file("listen at", socket))
}

fn spawn(serving: &Serving, listener: UnixListener) -> Result<(), ShimError> {
    let Serving { args, program, .. } = serving;
    let (said, says) = io::pipe().map_err(ShimError::system("make a pipe"))?;
    let mut command = Command::new(program);
    command
        .arg0(serving.name)
        .args(["-namespace", &args.namespace])
        .args(["-id", &args.id])
        .args(["-address", &args.address])
        .args(args.debug.then_some("-debug"))
        .arg("serve")
        .env_clear()
        .env("PATH", PATH)
        .env(TTRPC_ADDRESS, serving.ttrpc_address)
        .env(CALLED, serving.called)
        // It takes its listener from standard input and reports on standard output.
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(says)
        .stderr(Stdio::null());
    let child = command.spawn().map_err(ShimError::file("run", *program))?;
    // Our end of the pipe goes, so that the child's death is its end.
    drop(command);
    let answer = read_until(said, Instant::now() + SERVING);
    match answer {
        Ok(text) if text == SERVES => Ok(()),
        Ok(text) => {
            end(child, ENDS);
            let text = if text.is_empty() {
                "it said nothing".into()
            } else {
                text
            };
            Err(ShimError::NotServing(text))
        }
        Err(error) => {
            end(child, Duration::ZERO);
            Err(ShimError::NotServing(error.to_string()))
        }
    }
}

/// Gives a process that does not serve `time` to end by itself, then kills it.
/// What even then does not end is not waited for.
fn end(mut child: Child, time: Duration) {
    let ended = Running::child(&child).map(|running| {
        running.ends_within(time) || {
            running.kill();
            running.ends_within(DIES)
        }
    });
    match ended {
        Ok(true) => {
            let status = child.wait();
            tracing::debug!(?status, "the serving process ended");
        }
        Ok(false) => tracing::error!(pid = child.id(), "killed, and does not end"),
        Err(error) => tracing::error!(pid = child.id(), %error, "not watched"),
    }
}

/// All that is written to `pipe` until its end, by `by`.
fn read_until(mut pipe: io::PipeReader, by: Instant) -> io::Result<String> {
    let mut text = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        let left = by.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        if poll(
            &mut [PollFd::new(
                std::os::fd::AsFd::as_fd(&pipe),
                PollFlags::POLLIN,
            )],
            timeout,
        )? == 0
        {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match pipe.read(&mut buffer)? {
            0 => return Ok(String::from_utf8_lossy(&text).into_owned()),
            count => text.extend_from_slice(&buffer[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> Args {
        Args::parse(["-namespace", "k8s.io", "-id", "s1", "start"].map(str::to_owned)).unwrap()
    }

    fn caller(stdin: Vec<u8>) -> Caller {
        Caller {
            bundle: "/bundle".into(),
            stdin,
            ttrpc_address: String::new(),
        }
    }

    #[test]
    fn bootstrap_parameters_are_told_from_options() {
        let params = BootstrapParams {
            instance_id: "s1".into(),
            namespace: "k8s.io".into(),
            ..BootstrapParams::default()
        };
        let bytes = params.write_to_bytes().unwrap();
        assert_eq!(caller(bytes).params(&args()), Some(params));
        let options = crate::wire::any("containerd.runc.v1.Options", b"k8s.io".to_vec());
        let bytes = options.write_to_bytes().unwrap();
        assert_eq!(caller(bytes).params(&args()), None);
        assert_eq!(caller(vec![]).params(&args()), None);
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("shim.sock");
        drop(listen(&socket).unwrap().unwrap());
        let listener = listen(&socket).unwrap().unwrap();
        assert!(listen(&socket).unwrap().is_none());
        drop(listener);
    }

    /// The socket's path is too long to listen at.
    fn start_that_cannot_listen(run_dir: &RunDir) {
        let config = Config::default();
        let serving = Serving {
            args: &args(),
            ttrpc_address: "",
            program: Path::new("/bin/false"),
            name: "false".as_ref(),
            called: "",
        };
        let served = serve_new(&serving, &config, run_dir);
        let error = chain(&served.unwrap_err());
        assert!(error.contains("listen at"), "{error}");
    }

    fn too_deep(folder: &Path) -> RunDir {
        let id = SandboxId::new("s1").unwrap();
        RunDir::of(&folder.join("x".repeat(120)), "k8s.io", &id)
    }

    #[test]
    fn a_start_that_cannot_listen_leaves_no_folder() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = too_deep(folder.path());
        start_that_cannot_listen(&run_dir);
        assert!(!run_dir.path().exists());
    }

    #[test]
    fn a_start_that_cannot_listen_leaves_the_folder_of_a_shim_that_runs() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = too_deep(folder.path());
        run_dir.create().unwrap();
        Identity::own().unwrap().write(&run_dir.shim()).unwrap();
        start_that_cannot_listen(&run_dir);
        assert!(run_dir.shim().exists());
    }

    #[test]
    fn a_pod_that_runs_is_found_whatever_became_of_the_configuration() {
        let bundles = tempfile::tempdir().unwrap();
        let sandbox = SandboxId::new("s1").unwrap();
        let (of_the_pod, bundle) = (bundles.path().join("s1"), bundles.path().join("c1"));
        fs::create_dir(&of_the_pod).unwrap();
        fs::create_dir(&bundle).unwrap();
        let changed = Config {
            log: "debug".into(),
            run_dir: "/run/changed".into(),
            ..Config::default()
        };
        let garbled = || Err(ShimError::Argument("garbled".into()));
        let settings = |loaded| settings_of_a_pod(&bundle, "k8s.io", &sandbox, loaded);
        // Nobody knows where it is but the configuration.
        let (found, unusable) = settings(Ok(changed.clone())).unwrap();
        assert!(found == changed && unusable.is_none());
        assert_eq!(settings(garbled()).unwrap_err().to_string(), "garbled");
        let run_dir = RunDir::of(Path::new("/run/first"), "k8s.io", &sandbox);
        address::write(&of_the_pod, &address::of(&run_dir.socket())).unwrap();
        let (found, unusable) = settings(Ok(changed)).unwrap();
        assert_eq!(found.run_dir, Path::new("/run/first"));
        assert!(found.log == "debug" && unusable.is_none());
        let (found, unusable) = settings(garbled()).unwrap();
        assert_eq!(found.run_dir, Path::new("/run/first"));
        assert_eq!(unusable.unwrap().to_string(), "garbled");
    }

    #[test]
    fn a_process_that_tells_why_and_stays_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let (program, noted) = (folder.path().join("shim"), folder.path().join("pid"));
        let script = format!(
            "#!/bin/sh\necho $$ >{}\nprintf 'no reason'\nexec sleep 1000 >/dev/null\n",
            noted.display()
        );
        fs::write(&program, script).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&program, mode).unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let (ended, end) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let serving = Serving {
                args: &args(),
                ttrpc_address: "",
                program: &program,
                name: program.as_ref(),
                called: "",
            };
            ended.send(spawn(&serving, listener)).unwrap();
        });
        let spawned = end.recv_timeout(ENDS + Duration::from_secs(5));
        let pid = fs::read_to_string(&noted).unwrap();
        let process = Path::new("/proc").join(pid.trim());
        let error = spawned.expect("it is waited for").unwrap_err();
        assert!(
            matches!(&error, ShimError::NotServing(text) if text == "no reason"),
            "{error}"
        );
        assert!(!process.exists(), "it runs, or is a zombie");
    }

    #[test]
    fn a_process_that_says_nothing_is_not_waited_for_ever() {
        let (said, _says) = io::pipe().unwrap();
        let error = read_until(said, Instant::now() + Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
