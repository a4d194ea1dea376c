// SPDX-License-Identifier: Apache-2.0
//! A stock containerd as a supervised child, on a private socket.

mod cni;
mod config;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

pub use cni::{BRIDGE, Cni, LINKS_V4, LINKS_V6, SUBNET_V4, SUBNET_V6};
pub use config::{FORGETFUL, STREAMING, podhull as podhull_config};

use crate::cri::Client;
use crate::evidence;
use crate::image;
use crate::node;
use crate::programs::Programs;

/// containerd's log, in the node's folder.
pub(crate) const LOG: &str = "containerd.log";
const SOCKET: &str = "/run/containerd/containerd.sock";
const ROOT: &str = "/var/lib/containerd";
const STATE: &str = "/run/containerd";
/// What of its state 1.x does not know.
const STATE_OF_2: [&str; 3] = [
    "/run/containerd/io.containerd.mount-manager.v1.bolt",
    "/run/containerd/io.containerd.sandbox.controller.v1.shim",
    "/run/nri",
];
const CONFIG: &str = "/etc/containerd/config.toml";
const READY_WITHIN: Duration = Duration::from_secs(60);
const STOP_WITHIN: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(50);

/// The releases under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Release {
    /// Debian 12's package, 1.6.
    Debian16,
    /// 1.7, the last of the first line; built by the set-up, as the following.
    V1_7,
    /// 2.1, of those that start shims as 1.7 does.
    V2_1,
    /// 2.4, which starts shims with bootstrap parameters.
    V2_4,
}

impl Release {
    /// All of them, the oldest first.
    pub const ALL: [Self; 4] = [Self::Debian16, Self::V1_7, Self::V2_1, Self::V2_4];

    /// As on a command line: `1.6`, `1.7`, `2.1` or `2.4`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Debian16 => "1.6",
            Self::V1_7 => "1.7",
            Self::V2_1 => "2.1",
            Self::V2_4 => "2.4",
        }
    }

    /// The exact version that the set-up builds; `None` for Debian's.
    #[must_use]
    pub fn version(self) -> Option<&'static str> {
        match self {
            Self::Debian16 => None,
            Self::V1_7 => Some("1.7.35"),
            Self::V2_1 => Some("2.1.9"),
            Self::V2_4 => Some("2.4.2"),
        }
    }

    /// True for 2.x, whose pods may be made by a shim without a pause container.
    #[must_use]
    pub fn is_2(self) -> bool {
        matches!(self, Self::V2_1 | Self::V2_4)
    }

    /// The release called `name`.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|release| release.name() == name)
    }

    /// One of its programs: `containerd`, `ctr`, the runc shim.
    #[must_use]
    pub fn program(self, programs: &Programs, name: &str) -> PathBuf {
        match self.version() {
            None => Path::new("/usr/bin").join(name),
            Some(version) => programs
                .containerds
                .join(format!("containerd-{version}"))
                .join(name),
        }
    }

    /// Fails, with what makes it, if its containerd is not there.
    ///
    /// # Errors
    /// If it is missing.
    pub fn check(self, programs: &Programs) -> Result<()> {
        let program = self.program(programs, "containerd");
        let made_by = match self.version() {
            None => "make packages".to_owned(),
            Some(version) => format!("tests/setup/containerd.sh {version}"),
        };
        ensure!(
            program.is_file(),
            "{} is missing: {made_by}",
            program.display()
        );
        Ok(())
    }
}

/// One running containerd. Only one at a time in a node: it uses the usual paths.
#[derive(Debug)]
pub struct Containerd {
    release: Release,
    programs: Programs,
    folder: PathBuf,
    log: PathBuf,
    child: Option<Child>,
    client: Client,
}

impl Containerd {
    /// Writes the node's configuration, starts containerd, imports the images,
    /// and returns when pods can be run.
    ///
    /// # Errors
    /// If containerd does not become ready; the end of its log is quoted.
    pub async fn start(release: Release, programs: &Programs, folder: &Path) -> Result<Self> {
        write(cni::FILE, &Cni::default().file())?;
        write("/etc/podhull/config.toml", &config::podhull(programs))?;
        // Forwarding a port is to connect to localhost, of both families.
        write("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")?;
        write(CONFIG, &config::containerd(release, Path::new(SOCKET)))?;
        install_shim(programs)?;
        let mut containerd = Self {
            release,
            programs: programs.clone(),
            folder: folder.into(),
            log: folder.join(LOG),
            child: None,
            client: Client::new(Path::new(SOCKET))?,
        };
        containerd.spawn().await?;
        containerd.import().await?;
        Ok(containerd)
    }

    /// Has pods connected another way from now on. Those that are there must go
    /// before it is changed again: the CNI removes them as it would make them.
    ///
    /// # Errors
    /// If containerd does not take the configuration over.
    pub async fn use_cni(&self, cni: Cni) -> Result<()> {
        let file = cni.file();
        if fs::read_to_string(cni::FILE).is_ok_and(|present| present == file) {
            return Ok(());
        }
        write(cni::FILE, &file)?;
        let by = Instant::now() + READY_WITHIN;
        loop {
            let status = self.client.cni_status().await?;
            if cni.is_in(&status) {
                return Ok(());
            }
            ensure!(
                Instant::now() < by,
                "containerd does not use {cni:?} but {status}"
            );
            tokio::time::sleep(POLL).await;
        }
    }

    /// Which release this is.
    #[must_use]
    pub fn release(&self) -> Release {
        self.release
    }

    /// The CRI services of this containerd; they survive its restarts.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// containerd's process, if it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().and_then(Child::id)
    }

    /// What containerd logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// How long its log is.
    ///
    /// # Errors
    /// If it cannot be looked at.
    pub fn log_size(&self) -> Result<u64> {
        let size = fs::metadata(&self.log).map(|file| file.len());
        size.context("look at containerd's log")
    }

    /// What follows the first `from` bytes of its log.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn log_since(&self, from: u64) -> Result<Vec<u8>> {
        let mut log = File::open(&self.log).context("open containerd's log")?;
        log.seek(SeekFrom::Start(from))
            .context("seek in containerd's log")?;
        let mut text = Vec::new();
        log.read_to_end(&mut text)
            .context("read containerd's log")?;
        Ok(text)
    }

    async fn spawn(&mut self) -> Result<()> {
        let program = self.release.program(&self.programs, "containerd");
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .context("open containerd's log")?;
        let path = format!(
            "{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            program.parent().unwrap_or(Path::new("/usr/bin")).display()
        );
        // A clean environment: neither the shims nor CNI shall see the tests'.
        let child = Command::new(&program)
            .args(["--config", CONFIG])
            .env_clear()
            .env("PATH", path)
            .env("HOME", "/root")
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("containerd's log")?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        self.child = Some(child);
        self.ready().await
    }

    /// Waits for CRI to say that runtime and network are ready.
    async fn ready(&mut self) -> Result<()> {
        let by = Instant::now() + READY_WITHIN;
        loop {
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait().context("look at containerd")?
            {
                self.child = None;
                bail!("containerd ended: {status}\n{}", self.log_tail());
            }
            let state = match self.client.not_ready().await {
                // Its status is told before it has found the pods of before again.
                Ok(conditions) if conditions.is_empty() => match self.client.pod_ids(None).await {
                    Ok(_) => return Ok(()),
                    Err(error) => format!("{error:#}"),
                },
                Ok(conditions) => conditions.join(", "),
                Err(error) => format!("{error:#}"),
            };
            ensure!(
                Instant::now() < by,
                "containerd is not ready after {READY_WITHIN:?}: {state}\n{}",
                self.log_tail()
            );
            tokio::time::sleep(POLL).await;
        }
    }

    async fn import(&mut self) -> Result<()> {
        let archive = self.folder.join("images.tar");
        image::write_archive(&archive)?;
        let archive_name = archive.to_string_lossy();
        self.ctr(&["images", "import", &archive_name]).await?;
        fs::remove_file(&archive).context("remove the archive")?;
        // CRI learns of new images by events.
        let by = Instant::now() + READY_WITHIN;
        for name in [image::PAUSE, image::BUSYBOX, image::USR1] {
            while !self.client.has_image(name).await? {
                ensure!(Instant::now() < by, "CRI does not see the image {name}");
                tokio::time::sleep(POLL).await;
            }
        }
        Ok(())
    }

    /// Runs `ctr` in the namespace of Kubernetes and gives its stdout.
    ///
    /// # Errors
    /// If it fails; its stderr is quoted.
    pub async fn ctr(&self, args: &[&str]) -> Result<String> {
        let output = self.ctr_command(args).output().await.context("run ctr")?;
        ensure!(
            output.status.success(),
            "ctr {}: {}: {}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        String::from_utf8(output.stdout).context("ctr's output")
    }

    /// Has containerd remove now what nothing refers to any more. By itself it
    /// does so some time after the last deletion: snapshots stay until then.
    ///
    /// # Errors
    /// If ctr fails.
    pub async fn collect_garbage(&self) -> Result<()> {
        // Only the deletion of a lease or an image can wait for the collection.
        const LEASE: &str = "podhull-collect-garbage";
        self.ctr(&["leases", "create", "--id", LEASE]).await?;
        self.ctr(&["leases", "delete", "--sync", LEASE]).await?;
        Ok(())
    }

    /// The command for `ctr` in the namespace of Kubernetes.
    #[must_use]
    pub fn ctr_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.release.program(&self.programs, "ctr"));
        command
            .args(["--address", SOCKET, "--namespace", "k8s.io"])
            .args(args)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    /// Ends containerd with `signal` and waits for it. Pods go on.
    ///
    /// # Errors
    /// If it does not end within its time.
    pub async fn stop(&mut self, signal: Signal) -> Result<()> {
        let Some(mut child) = self.child.take() else {
            return Ok(());
        };
        if let Some(pid) = child.id() {
            kill(Pid::from_raw(pid.cast_signed()), signal).context("signal containerd")?;
        }
        match tokio::time::timeout(STOP_WITHIN, child.wait()).await {
            Ok(status) => {
                status.context("wait for containerd")?;
                Ok(())
            }
            Err(_) => bail!("containerd still runs {STOP_WITHIN:?} after {signal}"),
        }
    }

    /// Starts it again after [`Containerd::stop`].
    ///
    /// # Errors
    /// If it does not become ready.
    pub async fn start_again(&mut self) -> Result<()> {
        ensure!(self.child.is_none(), "containerd already runs");
        self.spawn().await
    }

    /// Starts `release` after [`Containerd::stop`], with all that the one before
    /// has left: an upgrade.
    ///
    /// # Errors
    /// If it does not become ready.
    pub async fn start_again_as(&mut self, release: Release) -> Result<()> {
        write(CONFIG, &config::containerd(release, Path::new(SOCKET)))?;
        self.release = release;
        self.start_again().await
    }

    /// Starts `release` after [`Containerd::stop`] with nothing of what was there
    /// but the folders of its state. Pods must be gone.
    ///
    /// # Errors
    /// If something cannot be removed, or it does not become ready.
    pub async fn start_anew_as(&mut self, release: Release) -> Result<()> {
        // A mount of the node's: it stays.
        node::empty(Path::new(ROOT))?;
        for folder in STATE_OF_2 {
            match fs::remove_dir_all(folder) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed.with_context(|| format!("remove {folder}"))?,
            }
        }
        install_shim(&self.programs)?;
        self.start_again_as(release).await?;
        self.import().await
    }

    /// Puts another file with the same shim in the place of the one that
    /// containerd finds, as an upgrade of its package does.
    ///
    /// # Errors
    /// If it cannot be replaced.
    pub fn replace_shim(&self) -> Result<()> {
        self.next_shim()?()
    }

    /// The same in two steps; the second, which is what this gives, takes no time.
    ///
    /// # Errors
    /// If it cannot be copied.
    pub fn next_shim(&self) -> Result<impl FnOnce() -> Result<()> + use<>> {
        next_shim(&self.programs)
    }

    fn log_tail(&self) -> String {
        evidence::last(&self.log(), 15)
    }
}

/// Puts the shim where containerd finds it by name: the opt plugin's `bin`.
fn install_shim(programs: &Programs) -> Result<()> {
    let bin = Path::new(config::OPT).join("bin");
    fs::create_dir_all(bin).context("create containerd's opt folder")?;
    if programs.shim.exists() {
        next_shim(programs)?()?;
    }
    Ok(())
}

/// Copies the shim to beside its place. One that is there already may run: what this
/// gives takes that file away, and puts the copy there, at once.
fn next_shim(programs: &Programs) -> Result<impl FnOnce() -> Result<()> + use<>> {
    let bin = Path::new(config::OPT).join("bin");
    let new = bin.join(".new");
    fs::copy(&programs.shim, &new).context("copy the shim")?;
    Ok(move || fs::rename(new, bin.join("containerd-shim-podhull-v2")).context("place the shim"))
}

fn write(path: &str, text: &str) -> Result<()> {
    let path = Path::new(path);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}
