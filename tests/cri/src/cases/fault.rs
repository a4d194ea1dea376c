// SPDX-License-Identifier: Apache-2.0
//! Processes of a pod die or hang.

use std::fs::{self, File};
use std::io::Read as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use podhull_testkit::containerd::podhull_config;
use podhull_testkit::cri::{Container, Pod};
use podhull_testkit::oracle::assert_clean;

use super::lifecycle::boot_id;
use super::node::{CONFIG, with};
use crate::case::{Skip, cases, contains, same};
use crate::context::{Context, refusal};
use crate::held::run_folder;
use crate::procfs::{Processes, Role, signal};

cases! {
    PODHULL:
        fault_killed_shim_takes_its_pod_along,
        fault_killed_vmm_ends_its_pod_only;
    PODHULL_TWICE:
        fault_terminated_shim_ends_its_pod_in_order,
        fault_killed_file_server_ends_its_pod,
        fault_killed_vsock_daemon_ends_its_pod,
        fault_panic_of_the_guest_ends_its_pod,
        fault_frozen_guest_comes_back,
        fault_guest_frozen_for_good_ends_its_pod,
        fault_killed_vmm_answers_a_running_exec,
        fault_killed_shim_leaves_nothing_whatever_became_of_its_configuration;
}

/// A dead VM is noticed within a second; the rest is for a slow machine.
const NOTICED_WITHIN: Duration = Duration::from_secs(10);

/// The pod has ended: not Ready, its container killed, no process left, and it
/// can be removed.
async fn ends(pod: &Pod, container: &Container, processes: &Processes) -> Result<()> {
    same!(has_ended(pod, container, processes).await?, 137);
    Ok(())
}

/// The same; gives the container's exit code.
pub(super) async fn has_ended(
    pod: &Pod,
    container: &Container,
    processes: &Processes,
) -> Result<i32> {
    // The shim may stay until the pod is removed: somebody may ask it.
    processes.vm_gone(NOTICED_WITHIN).await?;
    let status = container.exited(NOTICED_WITHIN).await?;
    pod.not_ready(NOTICED_WITHIN).await?;
    ensure!(
        container.exec(["true"]).await.is_err(),
        "an exec in a dead pod succeeded"
    );
    pod.stop().await?;
    container.remove().await?;
    pod.remove().await?;
    processes.gone(NOTICED_WITHIN).await?;
    Ok(status.exit_code)
}

/// containerd has noticed that a pod was killed. Until then its answers
/// about the pod are errors, to a stop as well.
pub(super) async fn killed_pod_is_noticed(pod: &Pod) -> Result<()> {
    let by = Instant::now() + NOTICED_WITHIN;
    loop {
        match pod.is_ready().await {
            Ok(false) => return Ok(()),
            answer => ensure!(Instant::now() < by, "not noticed: {answer:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn kill_and_watch(t: &Context, role: Role) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let processes = Processes::of(pod.id())?;
    signal(processes.pid(role)?, Signal::SIGKILL)?;
    ends(&pod, &container, &processes).await
}

async fn fault_killed_shim_takes_its_pod_along(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let processes = Processes::of(pod.id())?;
    signal(processes.pid(Role::Shim)?, Signal::SIGKILL)?;
    let code = has_ended(&pod, &container, &processes).await?;
    // 255 is containerd's own word if its waiting call fails before `delete` answers.
    ensure!([137, 255].contains(&code), "exit code {code}");
    Ok(())
}

/// SIGTERM is an end in order: nothing is cut, and containerd hears of it from
/// the shim, before that is gone.
async fn fault_terminated_shim_ends_its_pod_in_order(t: &Context) -> Result<()> {
    const STEPS: [&str; 9] = [
        "processes",
        "sessions",
        "agent",
        "grpc",
        "transport",
        "vm",
        "network",
        "tree",
        "folder",
    ];
    let (pod, container) = t.idle().await?;
    let processes = Processes::of(pod.id())?;
    let shim = processes.pid(Role::Shim)?;
    // The file goes with the shim; who has it open can still read it.
    let mut log = File::open(run_folder(shim)?.join("shim.log"))?;
    let begin = Instant::now();
    signal(shim, Signal::SIGTERM)?;
    same!(container.exited(NOTICED_WITHIN).await?.exit_code, 137);
    ensure!(
        Processes::of(pod.id()).is_ok(),
        "told only after the shim's end"
    );
    pod.not_ready(NOTICED_WITHIN).await?;
    processes.gone(NOTICED_WITHIN).await?;
    let took = begin.elapsed();
    let mut text = String::new();
    log.read_to_string(&mut text)?;
    ensure!(text.contains("terminated"), "it does not know why: {text}");
    let report = text
        .lines()
        .find_map(|line| line.split_once("released report="));
    let (_, report) = report.with_context(|| format!("no report in: {text}"))?;
    // `step: outcome`, as many as there were.
    let steps: Vec<_> = report.split(", ").collect();
    let expected = STEPS.map(|step| format!("{step}: clean"));
    same!(steps, expected, "{report}");
    ensure!(took < Duration::from_secs(8), "it took {took:?}");
    pod.stop().await?;
    container.remove().await?;
    pod.remove().await?;
    assert_clean(&*t.containerd().await, t.before(), Duration::from_secs(10)).await
}

async fn fault_killed_shim_leaves_nothing_whatever_became_of_its_configuration(
    t: &Context,
) -> Result<()> {
    const RUN: &str = "/run/podhull-of-the-pod";
    let elsewhere = podhull_config(t.node().programs());
    for changed in ["this is no TOML", &elsewhere] {
        fs::write(CONFIG, with(t, "run_dir", &format!("{RUN:?}")))?;
        let (pod, container) = t.idle().await?;
        let processes = Processes::of(pod.id())?;
        fs::write(CONFIG, changed).context("write podhull's configuration")?;
        signal(processes.pid(Role::Shim)?, Signal::SIGKILL)?;
        has_ended(&pod, &container, &processes).await?;
        fs::remove_dir(RUN).with_context(|| format!("{RUN} after {changed:?}"))?;
        fs::write(CONFIG, &elsewhere)?;
        assert_clean(&*t.containerd().await, t.before(), Duration::from_secs(10))
            .await
            .with_context(|| format!("after {changed:?}"))?;
    }
    Ok(())
}

async fn fault_killed_vmm_ends_its_pod_only(t: &Context) -> Result<()> {
    let (other, neighbour) = t.idle().await?;
    kill_and_watch(t, Role::Vmm).await?;
    ensure!(other.is_ready().await?, "the other pod ended too");
    neighbour.exec(["true"]).await?.success()?;
    Ok(())
}

async fn fault_killed_file_server_ends_its_pod(t: &Context) -> Result<()> {
    kill_and_watch(t, Role::FileServer).await
}

async fn fault_killed_vsock_daemon_ends_its_pod(t: &Context) -> Result<()> {
    kill_and_watch(t, Role::VsockDaemon).await
}

async fn fault_killed_vmm_answers_a_running_exec(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let processes = Processes::of(pod.id())?;
    let exec = container.shell("echo begun >/dev/shm/begun; sleep 1000");
    let killing = async {
        while container.shell("cat /dev/shm/begun").await?.text() != "begun" {}
        signal(processes.pid(Role::Vmm)?, Signal::SIGKILL)
    };
    let waited = async { tokio::try_join!(async { anyhow::Ok(exec.await) }, killing) };
    let (exec, ()) = tokio::time::timeout(Duration::from_secs(20), waited)
        .await
        .context("the exec is not answered")??;
    if let Ok(output) = exec {
        same!(output.code, 137, "the exec");
    }
    ends(&pod, &container, &processes).await
}

async fn fault_panic_of_the_guest_ends_its_pod(t: &Context) -> Result<()> {
    let pod = t
        .pod("pod")
        .linux(|linux| linux.security_context.get_or_insert_default().privileged = true)
        .run()
        .await?;
    let builder = pod.container("main").idle();
    let container = builder
        .security(|security| security.privileged = true)
        .start()
        .await?;
    if container
        .exec(["test", "-e", "/proc/sysrq-trigger"])
        .await?
        .code
        != 0
    {
        return Err(Skip("the guest's kernel has no SysRq".into()).into());
    }
    let processes = Processes::of(pod.id())?;
    // Nobody answers this one.
    let trigger = container.shell("echo c >/proc/sysrq-trigger");
    let answered = tokio::time::timeout(Duration::from_secs(20), trigger).await;
    ensure!(answered.is_ok(), "the exec is not answered");
    ends(&pod, &container, &processes).await?;
    // The shim's words are in containerd's log; its own went with it.
    let log = fs::read_to_string(t.node().folder().join("containerd.log"))?;
    let mut told = log
        .lines()
        .filter(|line| line.contains("the VM ended by itself") && line.contains(pod.id()));
    let told = told.next().context("nothing is said of the VM's end")?;
    contains!(told, "last console lines", "Kernel panic - not syncing");
    Ok(())
}

async fn fault_frozen_guest_comes_back(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let boot = boot_id(&container).await?;
    let vmm = Processes::of(pod.id())?.pid(Role::Vmm)?;
    signal(vmm, Signal::SIGSTOP)?;
    let exec = container.exec(["echo", "late"]);
    let thaw = async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        signal(vmm, Signal::SIGCONT)
    };
    let (exec, thawed) = tokio::join!(exec, thaw);
    thawed?;
    same!(exec?.text(), "late");
    ensure!(pod.is_ready().await?, "the pod was given up");
    same!(boot_id(&container).await?, boot);
    Ok(())
}

async fn fault_guest_frozen_for_good_ends_its_pod(t: &Context) -> Result<()> {
    const DEAD_AFTER: Duration = Duration::from_secs(8);
    let config = podhull_config(t.node().programs());
    let seconds = DEAD_AFTER.as_secs();
    let text = format!("{config}heartbeat_seconds = 1\ndead_after_seconds = {seconds}\n");
    fs::write(CONFIG, text).context("write podhull's configuration")?;
    let (pod, container) = t.idle().await?;
    let processes = Processes::of(pod.id())?;
    let running = container.shell("echo begun >/dev/shm/begun; sleep 1000");
    let frozen = async {
        while container.shell("cat /dev/shm/begun").await?.text() != "begun" {}
        let begin = Instant::now();
        signal(processes.pid(Role::Vmm)?, Signal::SIGSTOP)?;
        // Who comes before the guest is suspect is answered at the end.
        let (early, stopped, late) = tokio::join!(
            container.exec(["true"]),
            container.stop(100),
            late(&pod, &container, begin)
        );
        late?;
        for answer in [early.map(drop), stopped] {
            contains!(&refusal(answer, "a call to a silent guest")?, "silent");
        }
        anyhow::Ok(begin)
    };
    let waited = async { tokio::join!(running, frozen) };
    let (running, begin) = tokio::time::timeout(Duration::from_secs(30), waited)
        .await
        .context("not everybody who waits is answered")?;
    let begin = begin?;
    if let Ok(output) = running {
        same!(output.code, 137, "the exec that ran");
    }
    same!(container.exited(NOTICED_WITHIN).await?.exit_code, 137);
    let took = begin.elapsed();
    let given_up = DEAD_AFTER - Duration::from_secs(1)..DEAD_AFTER + Duration::from_secs(4);
    ensure!(given_up.contains(&took), "given up after {took:?}");
    ends(&pod, &container, &processes).await
}

/// Suspect after two seconds at most: whoever comes then is told at once.
async fn late(pod: &Pod, container: &Container, begin: Instant) -> Result<()> {
    tokio::time::sleep(Duration::from_secs(3)).await;
    let text = refusal(container.exec(["true"]).await, "an exec in a frozen guest")?;
    contains!(&text, "heartbeat");
    let took = begin.elapsed();
    ensure!(took < Duration::from_secs(5), "told only after {took:?}");
    ensure!(pod.is_ready().await?, "given up too early");
    Ok(())
}
