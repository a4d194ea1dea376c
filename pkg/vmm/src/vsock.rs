// SPDX-License-Identifier: Apache-2.0
//! The guest's vsock device: the kernel's where the host has it, else a daemon.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use podhull_transport::{GuestAddress, LeaseSet, VsockListener};
use podhull_types::{Cid, Deadline, VsockPort};

use crate::child::{Child, Streams};
use crate::error::VmmError;
use crate::helper::jail::{self, Bind};
use crate::image;
use crate::sys;

const KERNEL_DEVICE: &str = "/dev/vhost-vsock";
/// The VM's folder as the daemon sees it.
const FOLDER: &str = "/vm";
const NAME: &str = "vsock daemon";
/// Pause between two tries to reach the daemon: nothing tells when it listens.
const RETRY: Duration = Duration::from_millis(2);
/// Tries to find a context id that nobody has.
const CID_TRIES: u32 = 64;

/// The device as QEMU is told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GuestDevice {
    /// `/dev/vhost-vsock`, opened and given this context id.
    Kernel { cid: u64 },
    /// A vhost-user device.
    Daemon,
}

/// A device that is ready for QEMU.
#[derive(Debug)]
pub(crate) struct Vsock {
    pub(crate) device: GuestDevice,
    /// The vhost device, or the connection to the daemon.
    pub(crate) fd: OwnedFd,
    pub(crate) address: GuestAddress,
    pub(crate) ready: VsockListener,
    pub(crate) daemon: Option<Child>,
}

/// A way to give a guest its vsock device.
#[async_trait]
pub(crate) trait VsockDevice: Send + Sync {
    /// Makes the device, and listens for the guest that will have it.
    async fn start(&self, leases: LeaseSet, by: Deadline) -> Result<Vsock, VmmError>;
}

/// The kernel's own device where the host has it, else the daemon.
pub(crate) fn device<'a>(daemon: Daemon<'a>) -> Box<dyn VsockDevice + 'a> {
    if Path::new(KERNEL_DEVICE).exists() {
        Box::new(KernelDevice)
    } else {
        Box::new(daemon)
    }
}

/// `/dev/vhost-vsock`.
#[derive(Debug)]
struct KernelDevice;

#[async_trait]
impl VsockDevice for KernelDevice {
    async fn start(&self, leases: LeaseSet, _: Deadline) -> Result<Vsock, VmmError> {
        open_kernel_device(leases)
    }
}

/// Opens the kernel's device with a context id of the VM's own.
fn open_kernel_device(leases: LeaseSet) -> Result<Vsock, VmmError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(KERNEL_DEVICE)
        .map_err(VmmError::file("open", KERNEL_DEVICE))?;
    let cid = reserve_cid(&file).map_err(VmmError::system("reserve a vsock context id"))?;
    let ready = VsockListener::bind_vsock(None, Cid(cid), leases)?;
    Ok(Vsock {
        device: GuestDevice::Kernel { cid: cid.into() },
        fd: file.into(),
        address: GuestAddress::Vsock { cid: Cid(cid) },
        ready,
        daemon: None,
    })
}

/// The kernel refuses an id that another VM has.
fn reserve_cid(device: &File) -> io::Result<u32> {
    let mut random = File::open("/dev/urandom")?;
    for _ in 0..CID_TRIES {
        let mut bytes = [0; 4];
        random.read_exact(&mut bytes)?;
        // 0 to 2 are taken by the protocol; the upper half is left alone.
        let cid = (u32::from_le_bytes(bytes) >> 1).max(3);
        match sys::set_guest_cid(device, cid.into()) {
            Ok(()) => return Ok(cid),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// The vhost-user daemon, and what it needs to be started.
#[derive(Debug)]
pub(crate) struct Daemon<'a> {
    pub(crate) program: &'a Path,
    pub(crate) helper: &'a Path,
    pub(crate) folder: &'a Path,
    pub(crate) root: PathBuf,
    pub(crate) cgroups: Vec<PathBuf>,
    pub(crate) user: Option<u32>,
}

#[async_trait]
impl VsockDevice for Daemon<'_> {
    async fn start(&self, leases: LeaseSet, by: Deadline) -> Result<Vsock, VmmError> {
        start_daemon(self, leases, by).await
    }
}

/// Starts the daemon and connects QEMU's end to it.
async fn start_daemon(
    config: &Daemon<'_>,
    leases: LeaseSet,
    by: Deadline,
) -> Result<Vsock, VmmError> {
    image::check_program("vsock_daemon", config.program)?;
    let folder = config.folder;
    let vm_socket = folder.join("vsock");
    let ready = VsockListener::bind_hybrid(&vm_socket, VsockPort::READY, leases)?;
    let mut ready_path = vm_socket.clone().into_os_string();
    ready_path.push(format!("_{}", VsockPort::READY));
    // The daemon is who connects to it.
    std::os::unix::fs::chown(&ready_path, config.user, config.user)
        .map_err(VmmError::file("give away", &ready_path))?;
    let task = jail::Task {
        cgroups: config.cgroups.clone(),
        root: config.root.clone(),
        binds: vec![Bind {
            source: folder.into(),
            target: FOLDER.into(),
            writable: true,
        }],
        devices: vec![],
        user: config.user,
        fds: 0,
        program: config.program.into(),
        args: vec![
            "--vm".into(),
            format!("guest-cid=3,uds-path={FOLDER}/vsock,socket={FOLDER}/vhost"),
        ],
    };
    // It would wait for another VMM.
    let streams = Streams::default();
    let daemon = Child::start(NAME, config.helper, jail::ROLE, &task, streams, by)
        .await?
        .lingering();
    let connected = connect(&daemon, &folder.join("vhost"), by).await;
    match connected {
        Ok(stream) => Ok(Vsock {
            device: GuestDevice::Daemon,
            fd: stream.into(),
            address: GuestAddress::Hybrid { socket: vm_socket },
            ready,
            daemon: Some(daemon),
        }),
        Err(error) => {
            daemon.kill();
            daemon.ended().await;
            Err(error)
        }
    }
}

async fn connect(daemon: &Child, socket: &Path, by: Deadline) -> Result<UnixStream, VmmError> {
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => {
                // Nobody else is to connect; the daemon removes it as well.
                match fs::remove_file(socket) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(VmmError::file("remove", socket)(error));
                    }
                    _ => return Ok(stream),
                }
            }
            Err(_) if daemon.has_ended() => {
                return Err(VmmError::ChildDied {
                    name: NAME,
                    status: daemon.ended().await,
                    said: daemon.said(),
                });
            }
            Err(_) if by.passed() => {
                let (name, said) = (NAME, daemon.said());
                return Err(VmmError::ChildSlow { name, said });
            }
            Err(_) => tokio::time::sleep(RETRY).await,
        }
    }
}
