// SPDX-License-Identifier: Apache-2.0
//! A shim is asked by its own services: what containerd's clients have no word for,
//! and what containerd itself keeps from them.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, Mount, StartRequest, WaitRequest,
};
use containerd_shim_protos::sandbox_api::{
    PingRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest, WaitSandboxRequest,
};
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::ttrpc::context::{self, Context as Call};
use containerd_shim_protos::ttrpc::{Code, Error};
use podhull_testkit::cri::{Container, Pod};
use serde_json::{Value, json};

use crate::case::{cases, contains, same};
use crate::context::Context;
use crate::held::run_folder;
use crate::procfs::{Processes, Role};

cases! {
    PODHULL_TWICE:
        direct_container_has_the_size_of_its_terminal,
        direct_ambient_capabilities_are_kept_by_users,
        direct_fields_that_no_guest_has_are_refused_by_name;
    PODHULL_ONCE:
        direct_sandbox_service_answers_of_its_pod_alone;
}

const WITHIN: Duration = Duration::from_secs(30);
/// The container that the shim is asked for.
const ID: &str = "asked-for-directly";

fn call() -> Call {
    context::with_timeout(i64::try_from(WITHIN.as_nanos()).unwrap_or(i64::MAX))
}

async fn shim_of(pod: &Pod) -> Result<Client> {
    let shim = Processes::of(pod.id())?.pid(Role::Shim)?;
    let socket = run_folder(shim)?.join("shim.sock");
    Ok(Client::connect(&format!("unix://{}", socket.display())).await?)
}

/// The specification that containerd has made for `container`.
async fn spec_of(t: &Context, container: &Container) -> Result<Value> {
    let args = ["containers", "info", "--spec", container.id()];
    let text = t.containerd().await.ctr(&args).await?;
    serde_json::from_str(&text).context(text)
}

/// A bundle with `spec`.
fn bundle(t: &Context, spec: &Value) -> Result<String> {
    t.new_folder("bundle")?;
    t.new_file("bundle/config.json", &spec.to_string())?;
    Ok(t.path("bundle"))
}

/// A root filesystem that has busybox.
fn rootfs(t: &Context) -> Result<Mount> {
    let folder = t.new_folder("rootfs")?;
    for name in ["bin", "data", "dev", "etc", "proc", "sys", "tmp"] {
        t.new_folder(&format!("rootfs/{name}"))?;
    }
    fs::copy("/bin/busybox", Path::new(&folder).join("bin/busybox"))?;
    fs::hard_link(
        Path::new(&folder).join("bin/busybox"),
        Path::new(&folder).join("bin/sh"),
    )?;
    Ok(Mount {
        type_: "bind".into(),
        source: folder,
        options: ["rbind", "rw"].map(str::to_owned).into(),
        ..Mount::default()
    })
}

/// Runs `script` in a container of its own, made of `container`'s specification as
/// `change` leaves it, and gives what it has written to /data/out.
async fn run(
    t: &Context,
    (pod, container): (&Pod, &Container),
    script: &str,
    change: impl FnOnce(&mut Value),
) -> Result<String> {
    let data = t.new_folder("data")?;
    let mut spec = spec_of(t, container).await?;
    spec["process"]["args"] = json!(["sh", "-c", script]);
    let mount = json!({"type": "bind", "source": data, "destination": "/data",
        "options": ["rbind", "rw"]});
    spec["mounts"].as_array_mut().context("mounts")?.push(mount);
    fs::set_permissions(&data, fs::Permissions::from_mode(0o777))?;
    change(&mut spec);
    let tasks = TaskClient::new(shim_of(pod).await?);
    let create = CreateTaskRequest {
        id: ID.into(),
        bundle: bundle(t, &spec)?,
        rootfs: vec![rootfs(t)?],
        terminal: spec["process"]["terminal"] == true,
        ..CreateTaskRequest::default()
    };
    tasks.create(call(), &create).await.context("Create")?;
    let start = StartRequest {
        id: ID.into(),
        ..StartRequest::default()
    };
    tasks.start(call(), &start).await.context("Start")?;
    let wait = WaitRequest {
        id: ID.into(),
        ..WaitRequest::default()
    };
    let ended = tasks.wait(call(), &wait).await.context("Wait")?;
    same!(ended.exit_status, 0);
    let delete = DeleteRequest {
        id: ID.into(),
        ..DeleteRequest::default()
    };
    tasks.delete(call(), &delete).await.context("Delete")?;
    fs::read_to_string(t.path("data/out")).context("what the container wrote")
}

/// CRI and ctr say a terminal's size only once its process runs.
async fn direct_container_has_the_size_of_its_terminal(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let script = "busybox stty size >/data/out";
    let size = run(t, (&pod, &container), script, |spec| {
        spec["process"]["terminal"] = json!(true);
        spec["process"]["consoleSize"] = json!({"width": 97, "height": 31});
    });
    same!(size.await?, "31 97\n");
    Ok(())
}

/// They outlive the change of user, which others do not. containerd does not pass
/// CRI's word for them on.
async fn direct_ambient_capabilities_are_kept_by_users(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let script = "busybox grep ^Cap /proc/self/status >/data/out";
    let sets = run(t, (&pod, &container), script, |spec| {
        let both = json!(["CAP_NET_BIND_SERVICE", "CAP_CHOWN"]);
        let process = &mut spec["process"];
        process["user"] = json!({"uid": 1000, "gid": 1000});
        process["capabilities"] = json!({
            "bounding": both, "permitted": both, "effective": both,
            "inheritable": ["CAP_NET_BIND_SERVICE"], "ambient": ["CAP_NET_BIND_SERVICE"],
        });
    });
    let sets = sets.await?;
    for (set, bits) in [
        ("Inh", "0400"),
        ("Prm", "0400"),
        ("Eff", "0400"),
        ("Bnd", "0401"),
        ("Amb", "0400"),
    ] {
        contains!(&sets, &format!("Cap{set}:\t000000000000{bits}\n"));
    }
    Ok(())
}

async fn direct_fields_that_no_guest_has_are_refused_by_name(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let spec = spec_of(t, &container).await?;
    let tasks = TaskClient::new(shim_of(&pod).await?);
    for (name, pointer, value) in [
        (
            "hooks",
            "/hooks",
            json!({"createRuntime": [{"path": "/bin/true"}]}),
        ),
        (
            "linux.memoryPolicy",
            "/linux/memoryPolicy",
            json!({"mode": "MPOL_BIND", "nodes": "0"}),
        ),
        (
            "linux.resources.hugepageLimits[0].limit",
            "/linux/resources/hugepageLimits",
            json!([{"pageSize": "2MB", "limit": 1 << 21}]),
        ),
        (
            "linux.intelRdt",
            "/linux/intelRdt",
            json!({"closID": "guaranteed"}),
        ),
        (
            "process.scheduler",
            "/process/scheduler",
            json!({"policy": "SCHED_FIFO", "priority": 1}),
        ),
    ] {
        let mut spec = spec.clone();
        let (parent, key) = pointer.rsplit_once('/').context("a pointer")?;
        let parent = spec.pointer_mut(parent).context("the field's place")?;
        parent[key] = value;
        let create = CreateTaskRequest {
            id: ID.into(),
            bundle: bundle(t, &spec)?,
            rootfs: vec![rootfs(t)?],
            ..CreateTaskRequest::default()
        };
        match tasks.create(call(), &create).await {
            Err(Error::RpcStatus(status)) => {
                same!(status.code(), Code::INVALID_ARGUMENT, "{}", status.message);
                contains!(&status.message, &format!("{name}: "));
            }
            other => bail!("{name} is not refused: {other:?}"),
        }
        fs::remove_dir_all(t.path("rootfs"))?;
    }
    container.exec(["true"]).await?.success().map(drop)
}

async fn direct_sandbox_service_answers_of_its_pod_alone(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    container.shell("echo 0123456789").await?.success()?;
    let client = shim_of(&pod).await?;
    let sandboxes = SandboxClient::new(client);
    let sandbox_id = pod.id().to_owned();

    let ping = PingRequest {
        sandbox_id: sandbox_id.clone(),
        ..PingRequest::default()
    };
    sandboxes
        .ping_sandbox(call(), &ping)
        .await
        .context("Ping")?;
    let platform = PlatformRequest {
        sandbox_id: sandbox_id.clone(),
        ..PlatformRequest::default()
    };
    let platform = sandboxes.platform(call(), &platform).await;
    let platform = platform.context("Platform")?.platform;
    same!((&*platform.os, &*platform.architecture), ("linux", "amd64"));
    let status = SandboxStatusRequest {
        sandbox_id: sandbox_id.clone(),
        verbose: true,
        ..SandboxStatusRequest::default()
    };
    let answer = sandboxes.sandbox_status(call(), &status).await;
    let answer = answer.context("SandboxStatus")?;
    same!(answer.state, "SANDBOX_READY");
    same!(answer.sandbox_id, sandbox_id);
    same!(answer.pid, Processes::of(pod.id())?.pid(Role::Vmm)?);
    ensure!(answer.created_at.seconds > 0, "{answer:?}");
    ensure!(answer.info.contains_key("boot.agent_ready"), "{answer:?}");
    let metrics = SandboxMetricsRequest {
        sandbox_id: sandbox_id.clone(),
        ..SandboxMetricsRequest::default()
    };
    let metrics = sandboxes.sandbox_metrics(call(), &metrics).await;
    let metrics = metrics.context("SandboxMetrics")?.metrics;
    same!(metrics.id, sandbox_id);
    ensure!(!metrics.data.value.is_empty(), "{metrics:?}");

    let other = PingRequest {
        sandbox_id: "somebody-else".into(),
        ..PingRequest::default()
    };
    match sandboxes.ping_sandbox(call(), &other).await {
        Err(Error::RpcStatus(status)) => {
            same!(status.code(), Code::NOT_FOUND, "{}", status.message);
            contains!(&status.message, "somebody-else");
        }
        answer => bail!("another sandbox's Ping: {answer:?}"),
    }

    let wait = WaitSandboxRequest {
        sandbox_id: sandbox_id.clone(),
        ..WaitSandboxRequest::default()
    };
    let waiting = sandboxes.wait_sandbox(call(), &wait);
    tokio::pin!(waiting);
    // It waits for as long as the pod runs.
    let early = tokio::time::timeout(Duration::from_millis(500), &mut waiting).await;
    ensure!(early.is_err(), "answered while the pod runs: {early:?}");
    let (stopped, ended) = tokio::join!(pod.stop(), waiting);
    stopped?;
    let ended = ended.context("WaitSandbox")?;
    ensure!(
        ended.exited_at.seconds >= answer.created_at.seconds,
        "{ended:?}"
    );
    Ok(())
}
