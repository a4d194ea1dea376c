// SPDX-License-Identifier: Apache-2.0
//! A guest that is a kernel and one program (vsock_guest.c), to ask what
//! AF_VSOCK does: no container of a pod may open such a socket.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use podhull_testkit::context_id;
use vsock::{VsockAddr, VsockStream};

use crate::case::Skip;
use crate::context::Context;
use crate::probe::compiled;

/// Where its program listens.
pub(crate) const PORT: u32 = 5000;
/// Where nobody does, in the guest or on the host.
pub(crate) const SILENT: u32 = 4999;
/// No guest has it.
pub(crate) const ABSENT: u32 = 0x7ffe_dead;
/// Of these guests; only one runs at a time.
pub(crate) const CID: u32 = 0x7ffe_0042;
/// For anything that must come.
const WITHIN: Duration = Duration::from_secs(20);
/// Until it listens, with an emulated CPU that runs the VM.
const BOOTED_WITHIN: Duration = Duration::from_secs(60);
/// Pause between two tries: nothing tells when a guest is there.
const RETRY: Duration = Duration::from_millis(10);

const SOURCE: &str = include_str!("vsock_guest.c");

/// What such a guest is made of.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    qemu: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
    said: PathBuf,
}

impl Parts {
    /// # Errors
    /// [`Skip`] where the kernel gives guests no vsock, or nothing compiles.
    pub(crate) async fn make(t: &Context) -> Result<Self> {
        needs_the_kernels_vsock()?;
        let folder = t.node().folder().join("vsock-guest");
        let program = compiled(&folder, "init", SOURCE).await?;
        let initramfs = folder.join("initramfs.cpio");
        if !initramfs.exists() {
            let mut archive = Vec::new();
            file_of_cpio(&mut archive, "init", &fs::read(&program)?)?;
            file_of_cpio(&mut archive, "TRAILER!!!", &[])?;
            fs::write(&initramfs, archive).context("write the guest's initramfs")?;
        }
        let programs = t.node().programs();
        Ok(Self {
            qemu: programs.qemu.clone(),
            kernel: programs.kernel.clone(),
            initramfs,
            said: folder.join("said"),
        })
    }
}

/// # Errors
/// [`Skip`] where it does not.
pub(crate) fn needs_the_kernels_vsock() -> Result<()> {
    ensure!(
        context_id::by_the_kernel(),
        Skip("this machine has no /dev/vhost-vsock".into())
    );
    Ok(())
}

/// One executable file as cpio's newc format has it.
fn file_of_cpio(archive: &mut Vec<u8>, name: &str, content: &[u8]) -> Result<()> {
    let (mode, size, length) = (0o100_755, content.len(), name.len() + 1);
    write!(
        archive,
        "070701{0:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}{0:08x}{0:08x}{0:08x}{0:08x}{length:08x}{0:08x}{name}\0",
        0, 1
    )?;
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
    Ok(())
}

/// A running QEMU. It ends with its owner.
#[derive(Debug)]
pub(crate) struct Guest {
    qemu: Child,
    said: PathBuf,
}

impl Guest {
    /// Starts QEMU; its guest is not there yet.
    pub(crate) fn start(parts: &Parts, cid: u32) -> Result<Self> {
        let said = File::create(&parts.said).context("create a log")?;
        let qemu = Command::new(&parts.qemu)
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-m", "128M", "-cpu", "max"])
            .args(["-M", "microvm,accel=kvm:tcg,isa-serial=off,acpi=off"])
            .args(["-chardev", "stdio,id=console,signal=off"])
            .args(["-device", "virtio-serial-device"])
            .args(["-device", "virtconsole,chardev=console"])
            .arg("-kernel")
            .arg(&parts.kernel)
            .arg("-initrd")
            .arg(&parts.initramfs)
            .args(["-append", "console=hvc0 quiet reboot=t panic=-1"])
            .arg("-device")
            .arg(format!("vhost-vsock-device,guest-cid={cid}"))
            .stdin(Stdio::null())
            .stdout(said.try_clone().context("a log")?)
            .stderr(said)
            .spawn()
            .with_context(|| format!("start {}", parts.qemu.display()))?;
        Ok(Self {
            qemu,
            said: parts.said.clone(),
        })
    }

    /// One whose program listens.
    pub(crate) fn listening(parts: &Parts) -> Result<Self> {
        let mut guest = Self::start(parts, CID)?;
        guest.listens()?;
        Ok(guest)
    }

    /// Waits until it does.
    pub(crate) fn listens(&mut self) -> Result<()> {
        let by = Instant::now() + BOOTED_WITHIN;
        loop {
            // ENODEV before QEMU has set the id, then a wait, a reset when the
            // driver comes up, and more until the program listens.
            let Err(error) = connect(CID, PORT) else {
                return Ok(());
            };
            let ended = self.qemu.try_wait().context("look at QEMU")?;
            ensure!(
                ended.is_none() && Instant::now() < by,
                "the guest does not listen: {error}, {ended:?}\n{}",
                self.said()
            );
            std::thread::sleep(RETRY);
        }
    }

    /// What QEMU and the guest's kernel said.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap_or_default()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.qemu.id()
    }

    /// Kills QEMU, and does not wait for its end.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.qemu.kill().context("kill QEMU")
    }

    /// Waits for its end.
    pub(crate) fn reap(&mut self) -> Result<ExitStatus> {
        let by = Instant::now() + WITHIN;
        loop {
            if let Some(status) = self.qemu.try_wait().context("wait for QEMU")? {
                return Ok(status);
            }
            ensure!(Instant::now() < by, "QEMU still runs: {}", self.said());
            std::thread::sleep(RETRY);
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may be stopped, which SIGKILL does not mind, or gone.
        drop(self.qemu.kill());
        drop(self.qemu.wait());
    }
}

/// Connects with the kernel's own limit of 2 s. Nothing on the stream then
/// waits longer than a case may.
pub(crate) fn connect(cid: u32, port: u32) -> io::Result<VsockStream> {
    let stream = VsockStream::connect(&VsockAddr::new(cid, port))?;
    stream.set_read_timeout(Some(WITHIN))?;
    stream.set_write_timeout(Some(WITHIN))?;
    Ok(stream)
}

/// A connection to the guest's program that has asked for `what`.
pub(crate) fn ask(what: &str) -> Result<VsockStream> {
    let mut stream = connect(CID, PORT).with_context(|| format!("connect for {what:?}"))?;
    stream.write_all(format!("{what}\n").as_bytes())?;
    Ok(stream)
}

/// The same, once the guest says that it has begun.
pub(crate) fn begun(what: &str) -> Result<VsockStream> {
    let mut stream = ask(what)?;
    let mut said = [0];
    stream.read_exact(&mut said).context(what.to_owned())?;
    ensure!(&said == b".", "{what}: {said:?}");
    Ok(stream)
}

/// All that the guest answers.
pub(crate) fn answer(what: &str) -> Result<String> {
    let mut text = String::new();
    ask(what)?
        .read_to_string(&mut text)
        .context(what.to_owned())?;
    Ok(text)
}

/// The error of what had to fail.
pub(crate) fn error_of<T>(result: io::Result<T>, what: &str) -> Result<Errno> {
    match result {
        Ok(_) => bail!("{what} succeeded"),
        Err(error) => match error.raw_os_error() {
            Some(number) => Ok(Errno::from_raw(number)),
            None => bail!("{what}: {error}"),
        },
    }
}

/// True if a call gave up waiting at the stream's own limit.
pub(crate) fn still_waits<T>(result: &io::Result<T>) -> bool {
    result
        .as_ref()
        .is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}
