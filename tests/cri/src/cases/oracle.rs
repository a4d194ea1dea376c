// SPDX-License-Identifier: Apache-2.0
//! The leak oracle itself: one leak of each kind is planted, and must be named.

use std::fs::{self, File};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use podhull_testkit::image::BUSYBOX;
use podhull_testkit::oracle::{Kind, SOCKETS_MAY_DIFFER, Snapshot};
use tokio::process::Command;

use crate::case::{cases, contains};
use crate::context::{Context, refusal};
use crate::held::{self, Held};
use crate::procfs::{Processes, Role};

cases! {
    ONCE:
        oracle_planted_process_is_named,
        oracle_planted_zombie_is_named,
        oracle_planted_mount_is_named,
        oracle_planted_link_and_qdisc_are_named,
        oracle_planted_rule_is_named,
        oracle_planted_cgroup_is_named,
        oracle_planted_file_socket_and_fifo_are_named,
        oracle_planted_abstract_socket_is_named,
        oracle_planted_network_namespace_is_named;
    // What is asked of containerd, and what its pods are made of.
    ALL_TWICE:
        oracle_planted_descriptors_of_containerd_are_named,
        oracle_planted_records_of_containerd_are_named,
        oracle_running_pod_is_named;
    PODHULL_TWICE:
        oracle_planted_connection_of_a_shim_is_named;
}

/// Fails unless the difference to the case's begin names every one of `facts`.
async fn names(t: &Context, facts: &[(Kind, &str)]) -> Result<()> {
    let difference = Snapshot::take(&*t.containerd().await)
        .await?
        .since(t.before());
    for (kind, words) in facts {
        ensure!(
            difference
                .left
                .iter()
                .any(|(of, fact)| of == kind && fact.contains(words)),
            "the oracle does not name {kind:?} {words:?}:\n{difference}"
        );
    }
    Ok(())
}

async fn run(program: &str, args: &[&str]) -> Result<()> {
    let output = Command::new(program).args(args).output().await?;
    ensure!(
        output.status.success(),
        "{program} {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

async fn oracle_planted_process_is_named(t: &Context) -> Result<()> {
    let mut child = Command::new("sleep")
        .arg("98765")
        .kill_on_drop(true)
        .spawn()?;
    names(t, &[(Kind::Process, "sleep 98765")]).await?;
    child.kill().await?;
    Ok(())
}

async fn oracle_planted_zombie_is_named(t: &Context) -> Result<()> {
    // The standard library's child: nobody but us reaps it.
    let mut child = std::process::Command::new("true").spawn()?;
    let pid = Pid::from_raw(child.id().cast_signed());
    waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)?;
    let named = names(t, &[(Kind::Process, "true (zombie)")]).await;
    child.wait()?;
    named
}

async fn oracle_planted_descriptors_of_containerd_are_named(t: &Context) -> Result<()> {
    // Each connection is a descriptor of containerd's as well.
    let connections: Result<Vec<_>, _> = (0..SOCKETS_MAY_DIFFER + 4)
        .map(|_| UnixStream::connect("/run/containerd/containerd.sock"))
        .collect();
    let connections = connections?;
    names(t, &[(Kind::Descriptor, "socket:")]).await?;
    drop(connections);
    // A container that runs is a FIFO more for each of its outputs.
    let (_pod, container) = t.idle().await?;
    let fifo = format!("/{}-stdout", container.id());
    names(t, &[(Kind::Descriptor, &fifo)]).await
}

/// Shims are not in the oracle's snapshots, as none lives then; what one holds
/// while its pod lives is compared in the cases `load_…` and `exec_repeated…`.
async fn oracle_planted_connection_of_a_shim_is_named(t: &Context) -> Result<()> {
    let (pod, _container) = t.idle().await?;
    let shim = Processes::of(pod.id())?.pid(Role::Shim)?;
    let before = Held::at_rest(shim).await?;
    let planted = UnixStream::connect(held::run_folder(shim)?.join("shim.sock"))?;
    // Until the shim has accepted it, it is in nobody's table.
    let by = Instant::now() + Duration::from_secs(20);
    let again = loop {
        let again = before.again_within(shim, Duration::from_secs(1)).await;
        if again.is_err() || Instant::now() > by {
            break again;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let refused = refusal(again, "a connection more")?;
    contains!(&refused, "held:", "socket");
    drop(planted);
    before.again(shim).await
}

async fn oracle_planted_mount_is_named(t: &Context) -> Result<()> {
    let point = t.new_folder("planted")?;
    mount(
        Some("leak"),
        &*point,
        Some("tmpfs"),
        MsFlags::empty(),
        None::<&str>,
    )?;
    let named = names(t, &[(Kind::Mount, "planted (tmpfs)")]).await;
    umount2(&*point, MntFlags::MNT_DETACH)?;
    named
}

async fn oracle_planted_link_and_qdisc_are_named(t: &Context) -> Result<()> {
    run("ip", &["link", "add", "leak0", "type", "bridge"]).await?;
    let named = async {
        run("tc", &["qdisc", "add", "dev", "leak0", "ingress"]).await?;
        names(
            t,
            &[
                (Kind::Link, "link leak0"),
                (Kind::Link, "qdisc ingress on leak0"),
            ],
        )
        .await
    };
    let named = named.await;
    run("ip", &["link", "del", "leak0"]).await?;
    named
}

async fn oracle_planted_rule_is_named(t: &Context) -> Result<()> {
    run("nft", &["add", "table", "ip", "planted"]).await?;
    let named = names(t, &[(Kind::Rule, "planted")]).await;
    run("nft", &["delete", "table", "ip", "planted"]).await?;
    named
}

/// A cgroup's folder of whichever version this machine has.
fn cgroup() -> Result<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let mut found = vec![root.to_path_buf()];
    found.extend(fs::read_dir(root)?.flatten().map(|entry| entry.path()));
    let found = found
        .into_iter()
        .find(|path| path.join("cgroup.procs").exists());
    found.context("no cgroup hierarchy")
}

async fn oracle_planted_cgroup_is_named(t: &Context) -> Result<()> {
    let planted = cgroup()?.join("planted");
    fs::create_dir(&planted)?;
    let named = names(t, &[(Kind::Cgroup, "/planted")]).await;
    fs::remove_dir(&planted)?;
    named
}

async fn oracle_planted_file_socket_and_fifo_are_named(t: &Context) -> Result<()> {
    let folder = Path::new("/run/planted");
    fs::create_dir(folder)?;
    File::create(folder.join("a-file"))?;
    let socket = UnixListener::bind(folder.join("a-socket"))?;
    nix::unistd::mkfifo(&folder.join("a-fifo"), Mode::S_IRUSR)?;
    let named = names(
        t,
        &[
            (Kind::File, "file /run/planted/a-file"),
            (Kind::File, "socket /run/planted/a-socket"),
            (Kind::File, "FIFO /run/planted/a-fifo"),
        ],
    )
    .await;
    drop(socket);
    fs::remove_dir_all(folder)?;
    named
}

async fn oracle_planted_abstract_socket_is_named(t: &Context) -> Result<()> {
    let name = SocketAddr::from_abstract_name("planted")?;
    let socket = UnixListener::bind_addr(&name)?;
    let named = names(t, &[(Kind::AbstractSocket, "@planted")]).await;
    drop(socket);
    named
}

async fn oracle_planted_records_of_containerd_are_named(t: &Context) -> Result<()> {
    let containerd = t.containerd().await;
    let root = t.new_folder("root")?;
    containerd
        .ctr(&["leases", "create", "--id", "planted-lease"])
        .await?;
    containerd
        .ctr(&["snapshots", "prepare", "planted-snapshot"])
        .await?;
    containerd
        .ctr(&[
            "containers",
            "create",
            "--rootfs",
            &root,
            "planted-container",
        ])
        .await?;
    let named = names(
        t,
        &[
            (Kind::Record, "lease planted-lease"),
            (Kind::Record, "snapshot planted-snapshot"),
            (Kind::Record, "container planted-container"),
        ],
    )
    .await;
    containerd
        .ctr(&["containers", "delete", "planted-container"])
        .await?;
    containerd
        .ctr(&["snapshots", "remove", "planted-snapshot"])
        .await?;
    containerd
        .ctr(&["leases", "delete", "planted-lease"])
        .await?;
    ensure!(
        containerd.client().has_image(BUSYBOX).await?,
        "the image went with the lease"
    );
    named
}

async fn oracle_planted_network_namespace_is_named(t: &Context) -> Result<()> {
    let folder_was_there = Path::new("/run/netns").exists();
    run("ip", &["netns", "add", "planted"]).await?;
    let named = names(
        t,
        &[
            (Kind::Mount, "netns/planted"),
            (Kind::File, "netns/planted"),
        ],
    )
    .await;
    run("ip", &["netns", "delete", "planted"]).await?;
    // What `ip` itself leaves.
    umount2("/run/netns", MntFlags::MNT_DETACH)?;
    if !folder_was_there {
        fs::remove_dir("/run/netns")?;
    }
    named
}

async fn oracle_running_pod_is_named(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    names(
        t,
        &[
            (Kind::Record, &format!("sandbox {}", pod.id())),
            (Kind::Record, &format!("task {}", container.id())),
            (Kind::Process, "containerd-shim"),
            (Kind::Mount, "(nsfs)"),
            (Kind::Link, "veth"),
            (Kind::File, pod.id()),
        ],
    )
    .await
}
