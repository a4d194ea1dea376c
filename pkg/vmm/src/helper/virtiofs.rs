// SPDX-License-Identifier: Apache-2.0
//! The file server: the virtiofsd library in a process of its own, with its
//! sandbox and its seccomp filter on.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use caps::{CapSet, Capability, CapsHashSet};
use rustix::thread::{CapabilitiesSecureBits, set_capabilities_secure_bits};
use serde::{Deserialize, Serialize};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use virtiofsd::passthrough::{self, CachePolicy, PassthroughFs};
use virtiofsd::sandbox::{Sandbox, SandboxMode};
use virtiofsd::seccomp::{SeccompAction, enable_seccomp};
use virtiofsd::vhost_user::VhostUserFsBackendBuilder;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::{at, die_with_shim, join_cgroups, shim};
use crate::child::FIRST_FD;
use crate::config::SHARE_TAG;
use crate::sys;

/// The helper's name on the command line.
pub(crate) const ROLE: &str = "virtiofsd";
/// How long the guest may believe what it has read of files that the host can
/// change: ConfigMaps are seen to change within it.
const CACHE: Duration = Duration::from_secs(1);
/// Descriptors kept for what is not the guest's: memory regions (509 slots),
/// worker threads, and the process's own.
const RESERVED_FDS: u64 = 700;
const THREADS: usize = 4;
/// What serving files of any owner needs.
const CAPABILITIES: [Capability; 8] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
];

/// A folder to be served to one client, who comes to the listener that the
/// process inherits.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) cgroups: Vec<PathBuf>,
    pub(crate) folder: PathBuf,
    pub(crate) mapped_users: bool,
}

pub(crate) fn run(task: Task) -> io::Result<()> {
    sys::close_from(FIRST_FD.unsigned_abs() + 1).map_err(at("close descriptors"))?;
    let listener = Listener::from(UnixListener::from(sys::inherited(FIRST_FD)));
    join_cgroups(&task.cgroups)?;
    die_with_shim(shim())?;
    // Also for the process that waits; the library takes its capabilities.
    nix::sys::prctl::set_no_new_privs().map_err(at("set no_new_privs"))?;
    let limit = raise_fd_limit()?;
    let folder = task.folder.to_string_lossy().into_owned();
    let mut sandbox = Sandbox::new(folder, SandboxMode::Namespace, vec![], vec![]);
    let mountinfo_prefix = sandbox.get_mountinfo_prefix()?;
    // The child goes on; this process waits for it inside, and passes on its end.
    let mut listener = sandbox
        .enter(listener)
        .map_err(|error| io::Error::other(format!("enter the sandbox: {error}")))?;
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(at("set the parent-death signal"))?;
    let config = passthrough::Config {
        root_dir: sandbox.get_root_dir(),
        mountinfo_prefix,
        proc_sfd_rawfd: sandbox.get_proc_self_fd(),
        proc_mountinfo_rawfd: sandbox.get_mountinfo_fd(),
        // The client must know which file is on which filesystem of the host.
        announce_submounts: true,
        cache_policy: CachePolicy::Auto,
        entry_timeout: CACHE,
        attr_timeout: CACHE,
        readdirplus: true,
        xattr: true,
        guest_fd_limit: limit.saturating_sub(RESERVED_FDS).max(128),
        ..passthrough::Config::default()
    };
    // Before the library starts its threads: both are per thread.
    enable_seccomp(SeccompAction::Kill, false)
        .map_err(|error| io::Error::other(format!("seccomp: {error}")))?;
    if task.mapped_users {
        // The library makes files as the user that the guest names, who then has no
        // capability: a container's root could make none in another's folder. What
        // a user may do, the guest's kernel has decided before.
        set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)
            .map_err(at("keep capabilities over a change of user"))?;
    }
    keep_capabilities()?;
    let fs = PassthroughFs::new(config).map_err(at("open the shared tree"))?;
    let backend = VhostUserFsBackendBuilder::default()
        .set_thread_pool_size(THREADS)
        .set_tag(Some(SHARE_TAG.to_owned()))
        .build(fs)
        .map_err(|error| io::Error::other(format!("backend: {error}")))?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("virtiofsd".to_owned(), Arc::new(backend), memory)
        .map_err(|error| io::Error::other(format!("daemon: {error:?}")))?;
    daemon
        .start(&mut listener)
        .map_err(|error| io::Error::other(format!("start: {error:?}")))?;
    match daemon.wait() {
        Ok(())
        | Err(vhost_user_backend::Error::HandleRequest(
            vhost::vhost_user::Error::Disconnected | vhost::vhost_user::Error::PartialMessage,
        )) => Ok(()),
        Err(error) => Err(io::Error::other(format!("serve: {error:?}"))),
    }
}

/// As many descriptors as the host lets us have: the guest's inodes need them.
fn raise_fd_limit() -> io::Result<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(at("read the fd limit"))?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(at("raise the fd limit"))?;
    Ok(hard)
}

fn keep_capabilities() -> io::Result<()> {
    let keep: CapsHashSet = CAPABILITIES.into_iter().collect();
    for capability in caps::all() {
        if !keep.contains(&capability)
            && caps::has_cap(None, CapSet::Bounding, capability).unwrap_or(false)
        {
            caps::drop(None, CapSet::Bounding, capability).map_err(io::Error::other)?;
        }
    }
    caps::clear(None, CapSet::Ambient).map_err(io::Error::other)?;
    caps::clear(None, CapSet::Inheritable).map_err(io::Error::other)?;
    caps::set(None, CapSet::Effective, &keep).map_err(io::Error::other)?;
    caps::set(None, CapSet::Permitted, &keep).map_err(io::Error::other)
}
