// SPDX-License-Identifier: Apache-2.0
//! Starting a VM's processes, watching them, ending them.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use podhull_transport::{GuestAddress, LeaseSet, VsockListener};
use podhull_types::{Deadline, VsockPort, chain};
use tokio::sync::watch;

use crate::accel::Acceleration;
use crate::cgroup::CgroupPlacement;
use crate::child::{Child, FIRST_FD, Streams};
use crate::config::VmConfig;
use crate::console::Console;
use crate::error::VmmError;
use crate::helper::jail::{self, Bind};
use crate::helper::virtiofs;
use crate::image::{self, Kernel};
use crate::qemu::{self, Machine};
use crate::vm::{StopReport, Vm, VmDeath};
use crate::vsock::{self, Daemon, Vsock};

/// Most time for connections to the guest to end before the VM is ended anyway.
const DRAIN: Duration = Duration::from_secs(2);
/// How long a guest that was asked to end may take to end its VM.
const GUEST_ENDS: Duration = Duration::from_millis(500);
/// How much later than its helpers a VMM may be seen to end.
const CAUSE: Duration = Duration::from_millis(300);
/// How long a helper may take to end with its connection to the VMM.
const HELPER_ENDS: Duration = Duration::from_millis(500);
/// How long a child may take to end when it is asked to.
const ASKED: Duration = Duration::from_secs(1);
/// Least time for reaping what was killed.
const KILLED: Duration = Duration::from_secs(2);
/// Files that children make in the VM's folder.
const FILES: [&str; 3] = ["vsock", "vhost", "fs"];
/// Mount points of the jails.
const ROOTS: [&str; 2] = ["root-qemu", "root-vsock"];

/// A VM that has been started; the guest is not there yet.
#[derive(Debug)]
pub struct Launched {
    /// The VM.
    pub vm: Arc<dyn Vm>,
    /// Where the guest will connect to.
    pub ready: VsockListener,
    /// When the VMM was started.
    pub spawned_at: Instant,
}

/// Starts a VM. Nothing of it stays if that fails.
///
/// # Errors
/// What is missing or wrong, by the name of its setting.
pub async fn launch(config: VmConfig, by: Deadline) -> Result<Launched, VmmError> {
    image::check_program("qemu", &config.programs.qemu)?;
    let kernel = image::check_kernel(&config.kernel)?;
    image::check_initramfs(&config.initramfs)?;
    image::check_memory(config.memory_mib)?;
    let run_dir = config.run_dir.clone();
    let cgroup = config.cgroup.clone();
    let started = start(config, kernel, by).await;
    if started.is_err() {
        let swept = sweep(&run_dir, Some(&cgroup), Deadline::after(KILLED)).await;
        if let Err(error) = swept {
            tracing::warn!(error = chain(&error), "a failed start left something");
        }
    }
    started
}

async fn start(config: VmConfig, kernel: Kernel, by: Deadline) -> Result<Launched, VmmError> {
    let acceleration = config.acceleration;
    let user = config.user.map(|user| user.of(&config.run_dir));
    let folder = config.run_dir.as_path();
    make_folder(folder, user)?;
    let cgroups = config.cgroup.make()?;
    let leases = LeaseSet::new(config.name.clone());
    let vsock = vsock::device(Daemon {
        program: &config.programs.vsock_daemon,
        helper: &config.programs.helper,
        folder,
        root: folder.join("root-vsock"),
        cgroups: cgroups.clone(),
        user,
    })
    .start(leases.clone(), by)
    .await?;
    let mut children = Children(vsock.daemon.iter().cloned().collect());
    let (file_server, fs_fd) = start_file_server(&config, folder, &cgroups, by).await?;
    children.0.push(file_server);
    let (console, console_end) =
        Console::new(config.console_bytes).map_err(VmmError::system("make the console"))?;
    let spawned_at = Instant::now();
    let Vsock {
        device,
        fd: vsock_fd,
        address,
        ready,
        ..
    } = vsock;
    let mut fds = vec![fs_fd.into(), vsock_fd];
    let network = config.network.map(|network| {
        fds.push(network.tap);
        (FIRST_FD + 2, network.mac)
    });
    let emulated = acceleration == Acceleration::Emulation;
    let cpuinfo = emulated.then(|| fs::read_to_string("/proc/cpuinfo").ok());
    let machine = Machine {
        name: &config.name,
        memory_mib: config.memory_mib,
        vcpus: config.vcpus,
        acceleration,
        tsc: cpuinfo.flatten().as_deref().and_then(qemu::host_tsc),
        ready_port: ready.port(),
        fs_fd: FIRST_FD,
        vsock: &device,
        vsock_fd: FIRST_FD + 1,
        network,
        generic: kernel == Kernel::BzImage,
    };
    let bind = |source: &Path, target: &str| Bind {
        source: source.into(),
        target: target.into(),
        writable: false,
    };
    let task = jail::Task {
        cgroups,
        root: folder.join("root-qemu"),
        binds: vec![
            bind(&config.kernel, qemu::KERNEL),
            bind(&config.initramfs, qemu::INITRAMFS),
        ],
        devices: if emulated {
            vec![]
        } else {
            vec!["/dev/kvm".into()]
        },
        user,
        fds: u32::try_from(fds.len()).unwrap_or_default(),
        program: config.programs.qemu.clone(),
        args: machine.args(),
    };
    let streams = Streams {
        stdout: Some(console_end),
        fds,
    };
    let vmm = Child::start(
        "qemu",
        &config.programs.helper,
        jail::ROLE,
        &task,
        streams,
        by,
    )
    .await?;
    children.0.push(vmm.clone());
    let vm = Arc::new(RunningVm {
        vmm,
        died: watch::Sender::new(None),
        children,
        leases,
        address,
        acceleration,
        console,
        cgroup: config.cgroup,
        folder: config.run_dir,
        stopping: AtomicBool::new(false),
    });
    supervise(&vm);
    Ok(Launched {
        vm,
        ready,
        spawned_at,
    })
}

/// The folder belongs to the VM's user: its daemon makes sockets there.
fn make_folder(folder: &Path, user: Option<u32>) -> Result<(), VmmError> {
    let made = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder);
    made.map_err(VmmError::file("make folder", folder))?;
    for root in ROOTS {
        let root = folder.join(root);
        match fs::create_dir(&root) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(VmmError::file("make folder", root)(error));
            }
            _ => {}
        }
    }
    std::os::unix::fs::chown(folder, user, user).map_err(VmmError::file("give away", folder))
}

/// Starts the file server; QEMU's end is connected before the server runs.
async fn start_file_server(
    config: &VmConfig,
    folder: &Path,
    cgroups: &[PathBuf],
    by: Deadline,
) -> Result<(Child, UnixStream), VmmError> {
    let path = folder.join("fs");
    let listener = UnixListener::bind(&path).map_err(VmmError::file("listen at", &path))?;
    let stream = UnixStream::connect(&path).map_err(VmmError::file("connect to", &path))?;
    fs::remove_file(&path).map_err(VmmError::file("remove", &path))?;
    let task = virtiofs::Task {
        cgroups: cgroups.to_vec(),
        folder: config.share.clone(),
        mapped_users: config.mapped_users,
    };
    let streams = Streams {
        stdout: None,
        fds: vec![listener.into()],
    };
    let role = virtiofs::ROLE;
    let child = Child::start(
        "virtiofsd",
        &config.programs.helper,
        role,
        &task,
        streams,
        by,
    )
    .await?;
    Ok((child, stream))
}

/// Kills what still runs when the last owner is gone.
#[derive(Debug)]
struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in &self.0 {
            child.kill();
        }
    }
}

#[derive(Debug)]
struct RunningVm {
    vmm: Child,
    children: Children,
    died: watch::Sender<Option<VmDeath>>,
    leases: LeaseSet,
    address: GuestAddress,
    acceleration: Acceleration,
    console: Console,
    cgroup: CgroupPlacement,
    folder: PathBuf,
    stopping: AtomicBool,
}

/// One child's end is the VM's: none of them can be replaced under a guest.
fn supervise(vm: &Arc<RunningVm>) {
    for child in vm.children.0.clone() {
        let vm = Arc::downgrade(vm);
        // Ends with the child; what it tells is waited for, not the task.
        tokio::spawn(async move {
            child.ended().await;
            let Some(vm) = vm.upgrade() else { return };
            if vm.stopping.load(Ordering::Acquire) {
                return;
            }
            // A helper that ends with its connection is noticed before the VMM
            // that closed it.
            let by = Deadline::after(CAUSE);
            let cause = match by.run(vm.vmm.ended()).await {
                Ok(_) => &vm.vmm,
                Err(_) => &child,
            };
            // What was written last may still be on its way.
            let settled = Deadline::after(CAUSE);
            if cause.name() == vm.vmm.name() {
                vm.console.ended(settled).await;
            }
            cause.said_all(settled).await;
            let death = VmDeath {
                child: cause.name(),
                status: cause.ended().await,
                out_of_memory: vm.cgroup.ran_out_of_memory(),
                said: cause.said(),
                console: vm.console.tail(),
            };
            vm.died.send_if_modified(|died| {
                let first = died.is_none();
                died.get_or_insert(death);
                first
            });
            vm.leases.close();
            for other in &vm.children.0 {
                other.kill();
            }
        });
    }
}

#[async_trait]
impl Vm for RunningVm {
    fn leases(&self) -> &LeaseSet {
        &self.leases
    }

    fn address(&self) -> &GuestAddress {
        &self.address
    }

    fn acceleration(&self) -> Acceleration {
        self.acceleration
    }

    fn pid(&self) -> u32 {
        self.vmm.pid()
    }

    fn processes(&self) -> Vec<(&'static str, u32)> {
        let children = self.children.0.iter();
        children.map(|child| (child.name(), child.pid())).collect()
    }

    fn died(&self) -> watch::Receiver<Option<VmDeath>> {
        self.died.subscribe()
    }

    fn console_tail(&self) -> String {
        self.console.tail()
    }

    async fn stop(&self, by: Deadline) -> StopReport {
        let mut report = StopReport::default();
        self.leases.close();
        if let Err(holders) = self.leases.drained(by.at_most(DRAIN)).await {
            for holder in &holders {
                tracing::warn!(?holder, "still holds the VM that is being stopped");
            }
            report.holders = holders;
        }
        self.stopping.store(true, Ordering::Release);
        let by = by.max(Deadline::after(KILLED));
        // QEMU first: a guest that loses its devices would only panic.
        let mut grace = by.at_most(GUEST_ENDS);
        for child in self.children.0.iter().rev() {
            let asked = Deadline::after(ASKED).max(grace).at_most(by.remaining());
            match child.end(grace, asked, by).await {
                Some(false) => {}
                Some(true) => report.killed.push(child.name()),
                None => report
                    .problems
                    .push(format!("{} does not end", child.name())),
            }
            grace = by.at_most(HELPER_ENDS);
        }
        if let Err(error) = sweep(&self.folder, Some(&self.cgroup), by).await {
            report.problems.push(chain(&error));
        }
        report
    }
}

/// Removes what a VM's processes left in `run_dir` and their cgroup; the
/// processes themselves are gone. Succeeds if there is nothing.
///
/// # Errors
/// The first thing that could not be removed; the rest was tried.
pub async fn sweep(
    run_dir: &Path,
    cgroup: Option<&CgroupPlacement>,
    by: Deadline,
) -> Result<(), VmmError> {
    let mut first = Ok(());
    if let Some(cgroup) = cgroup {
        first = cgroup.remove(by).await;
    }
    let ready = format!("vsock_{}", VsockPort::READY);
    let files = FILES.into_iter().chain([ready.as_str()]);
    let files = files.map(|name| (run_dir.join(name), false));
    let folders = ROOTS.map(|name| (run_dir.join(name), true));
    for (path, is_folder) in files.chain(folders).chain([(run_dir.into(), true)]) {
        let removed = if is_folder {
            fs::remove_dir(&path)
        } else {
            fs::remove_file(&path)
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                first = first.and(Err(VmmError::file("remove", path)(error)));
            }
            _ => {}
        }
    }
    first
}
