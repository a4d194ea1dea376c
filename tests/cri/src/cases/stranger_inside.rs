// SPDX-License-Identifier: Apache-2.0
//! Who is in the guest and no agent, and wants to use AF_VSOCK: in a container,
//! and beside all containers.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use podhull_testkit::context_id;
use podhull_testkit::cri::Pod;
use podhull_testkit::cri::api::{Int64Value, SecurityProfile, security_profile::ProfileType};
use vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

use super::vsock_id::id_of;
use crate::case::{cases, same};
use crate::context::Context;
use crate::held::run_folder;
use crate::probe::{PROBE, with_probe};
use crate::procfs::{Processes, Role};
use crate::vsock_guest::ABSENT;

cases! {
    PODHULL_ONCE:
        stranger_in_a_container_opens_no_vsock,
        stranger_in_the_guest_without_a_filter_reaches_nobody;
}

const WITHIN: Duration = Duration::from_secs(20);
/// Where the agent takes sessions (`VsockPort::SESSIONS`).
const SESSIONS: u32 = 1025;
/// Names, to the guest's kernel, the port at which the host waited for the agent
/// (`VsockPort::READY_WORD`).
const READY_WORD: &str = "podhull.ready_port=";
/// A port of the host that podhull does not use.
const HEARD: u32 = 4998;
/// A guest's context id where each has a daemon to itself (`pkg/vmm/src/vsock.rs`).
const OWN_BY_DAEMON: u32 = 3;

/// A pod whose containers may be privileged.
async fn privileged_pod(t: &Context) -> Result<Pod> {
    let privileged = |context: &mut podhull_testkit::cri::api::LinuxPodSandboxConfig| {
        context.security_context.get_or_insert_default().privileged = true;
    };
    t.pod("pod").linux(privileged).run().await
}

/// What comes of each way to make an AF_VSOCK socket where the agent's filter
/// is the only one.
const REFUSED: [(&str, &[&str]); 5] = [
    ("socket", &["EAFNOSUPPORT"]),
    ("socketpair", &["EAFNOSUPPORT"]),
    ("io_uring", &["ENOSYS"]),
    // Calls that are not of this machine's own kind end who makes them.
    ("int80", &["SIGSEGV", "SIGSYS"]),
    ("x32", &["ENOSYS"]),
];

/// Checks what the probe says of each way. A profile of the container's own may
/// refuse first.
fn all_refused(said: &str, has_a_profile: bool) -> Result<()> {
    let lines: Vec<_> = said.lines().collect();
    same!(lines.len(), REFUSED.len() + 1, "ways in {said:?}");
    for (line, (way, answers)) in lines.iter().zip(REFUSED) {
        let answer = line.strip_prefix(way).map(str::trim);
        let answer = answer.with_context(|| format!("no {way} in {said:?}"))?;
        let refused = answers.contains(&answer) || has_a_profile && answer == "EPERM";
        ensure!(refused, "AF_VSOCK by {way} gives {answer}");
    }
    Ok(())
}

async fn stranger_in_a_container_opens_no_vsock(t: &Context) -> Result<()> {
    let pod = privileged_pod(t).await?;
    for (name, profile, user, privileged) in [
        ("default", ProfileType::RuntimeDefault, 0, false),
        ("unconfined", ProfileType::Unconfined, 0, false),
        ("user", ProfileType::Unconfined, 1000, false),
        ("privileged", ProfileType::Unconfined, 0, true),
    ] {
        let container = t
            .container(&pod, name)
            .command([PROBE, "vsock", "stay"])
            .security(|security| {
                security.privileged = privileged;
                security.run_as_user = Some(Int64Value { value: user });
                security.seccomp = Some(SecurityProfile {
                    profile_type: profile.into(),
                    localhost_ref: String::new(),
                });
                if privileged {
                    security.masked_paths.clear();
                    security.readonly_paths.clear();
                }
            });
        let container = with_probe(t, container).await?.start().await?;
        let by_init = container.wrote("end", WITHIN).await?.text();
        let has_a_profile = profile == ProfileType::RuntimeDefault;
        all_refused(&by_init, has_a_profile).with_context(|| format!("{name}: init"))?;
        let by_exec = container.exec([PROBE, "vsock", "-"]).await?.success()?;
        same!(by_exec.text(), by_init, "{name}: an exec");
    }
    Ok(())
}

/// Somebody on the host whom a pod's guest may connect to.
#[derive(Debug)]
enum Listener {
    /// By the daemon's convention.
    Socket {
        _listens: UnixListener,
        path: PathBuf,
    },
    Vsock(VsockListener),
}

impl Listener {
    fn of(processes: &Processes) -> Result<Self> {
        if context_id::by_the_kernel() {
            let any = VsockAddr::new(VMADDR_CID_ANY, u32::MAX);
            return Ok(Self::Vsock(VsockListener::bind(&any)?));
        }
        let folder = run_folder(processes.pid(Role::Shim)?)?;
        let path = folder.join(format!("vm/vsock_{HEARD}"));
        let listens = UnixListener::bind(&path).context("listen for the daemon")?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
        Ok(Self::Socket {
            _listens: listens,
            path,
        })
    }

    fn port(&self) -> Result<u32> {
        Ok(match self {
            Self::Socket { .. } => HEARD,
            Self::Vsock(listener) => listener.local_addr()?.port(),
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Socket { path, .. } = self {
            // It is the pod's folder: what is left there is found.
            drop(fs::remove_file(path));
        }
    }
}

/// Root of a guest is not held by a filter for long: here its kernel runs a
/// program for it, beside all containers. From there the host, the agent and
/// another pod's are as far away.
async fn stranger_in_the_guest_without_a_filter_reaches_nobody(t: &Context) -> Result<()> {
    let pod = privileged_pod(t).await?;
    let other = t.pod("other").run().await?;
    let processes = Processes::of(pod.id())?;
    let heard = Listener::of(&processes)?;
    // What the host answers where nobody listens: a daemon says nothing.
    let (own, others, unheard) = match heard {
        Listener::Vsock(_) => {
            let others = id_of(&Processes::of(other.id())?)?;
            (id_of(&processes)?, others, "ECONNRESET")
        }
        Listener::Socket { .. } => (OWN_BY_DAEMON, ABSENT, "ETIMEDOUT"),
    };
    let folder = t.new_folder("data")?;
    let container = pod
        .container("main")
        .idle()
        .mount(&folder, "/data", false)
        .security(|security| security.privileged = true);
    let container = with_probe(t, container).await?.start().await?;
    let line = container.exec(["cat", "/proc/cmdline"]).await?.text();
    let mut words = line.split_whitespace();
    let ready = words.find_map(|word| word.strip_prefix(READY_WORD));
    let ready = ready.with_context(|| line.clone())?.parse()?;
    let tries = [
        // The host, where somebody listens, and where nobody waits for a guest any more.
        (2, heard.port()?, "ok"),
        (2, ready, unheard),
        (2, SESSIONS, unheard),
        // The agent itself, and another pod's.
        (1, SESSIONS, "ETIMEDOUT"),
        (own, SESSIONS, "ENODEV"),
        (others, SESSIONS, "ETIMEDOUT"),
    ];
    let dials: String = tries
        .iter()
        .map(|(cid, port, _)| format!("../probe/probe dial {cid} {port}\n"))
        .collect();
    let seccomp = "../bin/busybox grep ^Seccomp: /proc/self/status";
    let job = format!("cd /proc/$1/root/data\n{{ {seccomp}\n{dials}echo end; }} >said 2>&1\n");
    t.new_file("data/job", &job)?;
    // The kernel hands a dump to a program that it finds by the dead process's root,
    // and keeps that until the program has ended.
    let crash = "echo 1 >/proc/sys/kernel/core_pipe_limit; \
        echo '|/proc/%P/root/bin/busybox sh /proc/%P/root/data/job %P' >/proc/sys/kernel/core_pattern; \
        sh -c 'kill -ABRT $$'";
    let crashed = container.shell(crash).await?;
    same!(crashed.code, 134, "{crashed:?}");
    let said = fs::read_to_string(Path::new(&folder).join("said")).context("what it said")?;
    let answers = tries.map(|(_, _, answer)| answer).join("\n");
    same!(said, format!("Seccomp:\t0\n{answers}\nend\n"), "{tries:?}");
    for pod in [&pod, &other] {
        ensure!(pod.is_ready().await?, "a pod has ended");
    }
    container.exec(["true"]).await?.success()?;
    Ok(())
}
