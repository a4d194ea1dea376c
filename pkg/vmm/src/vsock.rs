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

use crate::child::{Child, DIES, Streams};
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
    let cid = random()
        .and_then(|random| reserve_cid(random, |cid| sys::set_guest_cid(&file, cid.into())))
        .map_err(VmmError::system("reserve a vsock context id"))?;
    let ready = VsockListener::bind_vsock(None, Cid(cid), leases)?;
    Ok(Vsock {
        device: GuestDevice::Kernel { cid: cid.into() },
        fd: file.into(),
        address: GuestAddress::Vsock { cid: Cid(cid) },
        ready,
        daemon: None,
    })
}

fn random() -> io::Result<File> {
    File::open("/dev/urandom")
}

/// Takes the first id for which `reserve` succeeds: the kernel refuses one that
/// another VM has.
fn reserve_cid(
    mut random: impl Read,
    mut reserve: impl FnMut(u32) -> io::Result<()>,
) -> io::Result<u32> {
    for _ in 0..CID_TRIES {
        let mut bytes = [0; 4];
        random.read_exact(&mut bytes)?;
        // 0 to 2 are taken by the protocol; the upper half is left alone.
        let cid = (u32::from_le_bytes(bytes) >> 1).max(3);
        match reserve(cid) {
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
            if Deadline::after(DIES).run(daemon.ended()).await.is_err() {
                tracing::error!("the vsock daemon was killed and does not end");
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The ids that are tried where `random` gives these numbers and the kernel
    /// refuses `taken`.
    fn tried(
        random: &[u32],
        taken: impl Fn(u32) -> Option<io::ErrorKind>,
    ) -> (io::Result<u32>, Vec<u32>) {
        let random: Vec<u8> = random.iter().flat_map(|it| it.to_le_bytes()).collect();
        let mut tried = Vec::new();
        let reserved = reserve_cid(&random[..], |cid| {
            tried.push(cid);
            taken(cid).map_or(Ok(()), |error| Err(error.into()))
        });
        (reserved, tried)
    }

    fn clash(taken: &[u32]) -> impl Fn(u32) -> Option<io::ErrorKind> {
        move |cid| taken.contains(&cid).then_some(io::ErrorKind::AddrInUse)
    }

    #[test]
    fn an_id_that_another_vm_has_is_passed_over() {
        let (reserved, tried) = tried(&[20, 30, 40, 50], clash(&[10, 15]));
        assert_eq!((reserved.unwrap(), tried), (20, vec![10, 15, 20]));
    }

    #[test]
    fn no_id_of_the_protocol_or_of_the_upper_half_is_tried() {
        let (reserved, tried) = tried(&[0, 2, 5, 7, u32::MAX], clash(&[3]));
        assert_eq!(tried, [3, 3, 3, 3, u32::MAX >> 1]);
        assert_eq!(reserved.unwrap(), u32::MAX >> 1);
    }

    #[test]
    fn a_host_without_a_free_id_is_an_error_after_some_tries() {
        let taken = |_| Some(io::ErrorKind::AddrInUse);
        let (reserved, tried) = tried(&[20; 1000], taken);
        assert_eq!(reserved.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(tried.len(), CID_TRIES as usize);
    }

    #[test]
    fn what_is_no_clash_is_an_error_at_once() {
        let denied = |_| Some(io::ErrorKind::PermissionDenied);
        let (reserved, tried) = tried(&[20; 1000], denied);
        assert_eq!(
            reserved.unwrap_err().kind(),
            io::ErrorKind::PermissionDenied
        );
        assert_eq!(tried, [10]);
    }
}
