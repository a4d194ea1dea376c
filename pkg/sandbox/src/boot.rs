// SPDX-License-Identifier: Apache-2.0
//! From nothing to an agent that answers.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use podhull_agent_client::{AgentError, Connected, wait_for_agent};
use podhull_api::agent;
use podhull_network::{LoopbackListener, NetworkError, PodNetwork};
use podhull_storage::SharedTree;
use podhull_types::{BootPhase, BootTimes, Deadline, Token, chain};
use podhull_vmm::{
    AccelPolicy, Acceleration, CgroupPlacement, Launched, Programs, SHARE_TAG, Vm, VmConfig,
    VmNetwork, VmUser,
};
use tokio_util::sync::CancellationToken;

use crate::calls::VM_ENDS;
use crate::error::SandboxError;
use crate::rundir::{Record, RunDir};
use crate::sandbox::{Booted, Sandbox};
use crate::spec::{Runtime, SandboxSpec};
use crate::teardown::{Parts, tear_down};
use crate::users;

/// Time for setting up what the host needs before the VM starts.
const HOST_SETUP: Duration = Duration::from_secs(10);
const MIB: u64 = 1 << 20;
/// Least memory with which a guest boots and runs a small container, in MiB.
const MEMORY_FLOOR_MIB: u32 = 96;

/// Boots a sandbox; on failure everything made until then is released.
pub(crate) async fn boot(
    runtime: &Arc<Runtime>,
    spec: &SandboxSpec,
    give_up: &CancellationToken,
) -> Result<Booted, SandboxError> {
    let config = &runtime.config;
    let run_dir = RunDir::of(&config.run_dir, &spec.namespace, &spec.id);
    let mut parts = Parts::new(run_dir, runtime.metrics.clone());
    let mut times = BootTimes::default();
    times.note(BootPhase::StartCalled, Duration::ZERO);
    match bring_up(runtime, spec, &mut parts, &mut times, give_up).await {
        Ok((connected, token, emulated, loopback)) => {
            let vm = parts.vm.clone().ok_or_else(|| gone(spec))?;
            Ok(Booted {
                channel: connected.channel,
                loopback,
                token,
                address: vm.address().clone(),
                leases: vm.leases().clone(),
                vmm_pid: vm.pid(),
                emulated,
                parts,
                times,
            })
        }
        Err(error) => {
            let phase = times
                .iter()
                .last()
                .map_or("none", |(phase, _)| phase.name());
            runtime
                .metrics
                .start_failures
                .with_label_values(&[phase])
                .inc();
            tracing::error!(sandbox = %spec.id, error = chain(&error), after = phase, "boot failed");
            let report = tear_down(parts, None, Deadline::after(config.stop_timeout())).await;
            tracing::info!(sandbox = %spec.id, %report, "released what a failed boot had made");
            Err(error)
        }
    }
}

fn gone(spec: &SandboxSpec) -> SandboxError {
    SandboxError::VmDied {
        id: spec.id.clone(),
        reason: "no VM".into(),
    }
}

async fn bring_up(
    runtime: &Runtime,
    spec: &SandboxSpec,
    parts: &mut Parts,
    times: &mut BootTimes,
    give_up: &CancellationToken,
) -> Result<(Connected, Token, bool, Option<LoopbackListener>), SandboxError> {
    let config = &runtime.config;
    let policy = AccelPolicy {
        allow_emulation: config.allow_emulation,
    };
    let acceleration = podhull_vmm::probe_acceleration(policy, &config.qemu).await?;
    let emulated = acceleration == Acceleration::Emulation;
    runtime
        .metrics
        .emulation
        .with_label_values(&["qemu"])
        .set(i64::from(emulated));
    let (memory_mib, vcpus) = size(runtime, spec)?;

    parts.run_dir.create()?;
    parts.run_dir.write_record(&Record {
        namespace: spec.namespace.clone(),
        id: spec.id.to_string(),
        netns: spec.netns.clone(),
        cgroups_path: spec.cgroups_path.clone(),
    })?;
    let share = parts.run_dir.share();
    parts.tree = Some(Arc::new(SharedTree::create(&share)?));
    if let Some(netns) = &spec.netns {
        parts.network = Some(attach(netns, Deadline::after(HOST_SETUP)).await?);
    }
    let network = parts
        .network
        .as_ref()
        .map(|network| {
            Ok::<_, SandboxError>(VmNetwork {
                tap: network.tap()?,
                mac: network.mac(),
            })
        })
        .transpose()?;
    times.note(BootPhase::HostReady, spec.started.elapsed());

    let vm = VmConfig {
        name: spec.id.to_string(),
        run_dir: parts.run_dir.vm(),
        kernel: config.kernel.clone(),
        initramfs: config.initramfs.clone(),
        memory_mib,
        vcpus,
        network,
        share,
        mapped_users: spec.users.is_some(),
        acceleration,
        cgroup: spec
            .cgroups_path
            .as_deref()
            .map_or_else(CgroupPlacement::none, CgroupPlacement::from_oci),
        programs: Programs {
            qemu: config.qemu.clone(),
            vsock_daemon: config.vsock_daemon.clone(),
            helper: runtime.helper.clone(),
        },
        user: (config.first_vm_uid != 0).then_some(VmUser {
            first: config.first_vm_uid,
        }),
        console_bytes: config.console_bytes,
    };
    let by = Deadline::after(config.boot_timeout(emulated));
    let Launched {
        vm,
        ready,
        spawned_at,
    } = podhull_vmm::launch(vm, by).await?;
    parts.vm = Some(Arc::clone(&vm));
    parts.ready = Some(ready);
    let spawned = spawned_at.saturating_duration_since(spec.started);
    times.note(BootPhase::VmmSpawned, spawned);

    let token = random_token()?;
    let connecting = ready_or_gone(parts, spec, &token, by, give_up);
    let (connected, loopback) = tokio::join!(connecting, listen_on_loopback(parts));
    let connected = connected?;
    // Nobody else is to connect.
    if let Some(listener) = parts.ready.take() {
        let report = listener.close();
        tracing::debug!(%report, "the guest has connected");
    }
    let ready = spec.started.elapsed();
    let agent_started = ready.saturating_sub(connected.times.agent_to_ready);
    times.note(BootPhase::AgentReady, ready);
    times.note(BootPhase::AgentStarted, agent_started);
    let kernel = agent_started.saturating_sub(connected.times.kernel_to_agent);
    times.note(BootPhase::KernelEntered, kernel.max(spawned));

    let configured = configure(parts, spec, &connected, by, give_up).await;
    match configured {
        Ok(()) => {
            times.note(BootPhase::Configured, spec.started.elapsed());
            Ok((connected, token, emulated, loopback))
        }
        Err(error) => {
            let report = connected.channel.close(by).await;
            tracing::debug!(%report, "closed the channel of a failed boot");
            Err(error)
        }
    }
}

/// Ties the pod's network to a tap. What is half done at the deadline is removed:
/// nobody would have it.
async fn attach(netns: &Path, by: Deadline) -> Result<PodNetwork, NetworkError> {
    let attached = PodNetwork::attach(netns, by).await;
    if let Err(NetworkError::Deadline | NetworkError::Lost) = attached {
        let swept = podhull_network::sweep(netns, Deadline::after(HOST_SETUP)).await;
        if let Err(error) = swept {
            let error = chain(&error);
            tracing::error!(netns = %netns.display(), error, "a redirect may be left");
        }
    }
    attached
}

/// Memory in MiB and vCPUs of the VM.
fn size(runtime: &Runtime, spec: &SandboxSpec) -> Result<(u32, u32), SandboxError> {
    let config = &runtime.config;
    let memory = match spec.memory_limit_bytes {
        None => config.default_memory_mib,
        Some(limit) => {
            let mib = u32::try_from(limit.div_ceil(MIB)).unwrap_or(u32::MAX);
            mib.saturating_add(config.guest_overhead_mib)
        }
    };
    if memory < MEMORY_FLOOR_MIB {
        return Err(SandboxError::refused(
            "resources.limits.memory",
            format!("a VM of {memory} MiB cannot boot; the floor is {MEMORY_FLOOR_MIB} MiB"),
        ));
    }
    let vcpus = spec
        .vcpus
        .unwrap_or(config.default_vcpus)
        .clamp(1, config.max_vcpus);
    Ok((memory, vcpus))
}

fn random_token() -> Result<Token, SandboxError> {
    let mut bytes = [0; Token::LEN];
    let path = Path::new("/dev/urandom");
    std::fs::File::open(path)
        .and_then(|mut random| random.read_exact(&mut bytes))
        .map_err(|source| SandboxError::File {
            what: "read",
            path: path.into(),
            source,
        })?;
    Ok(Token::from_bytes(bytes))
}

/// Ports can be forwarded only where the kernel can redirect; a pod runs without.
async fn listen_on_loopback(parts: &Parts) -> Option<LoopbackListener> {
    let network = parts.network.as_ref()?;
    let by = Deadline::after(HOST_SETUP);
    match network.listen_on_loopback(by).await {
        Ok(listener) => Some(listener),
        Err(error) => {
            tracing::warn!(
                error = chain(&error),
                "ports of this pod cannot be forwarded"
            );
            None
        }
    }
}

/// Waits for READY, for the end of the VM, or until the boot is given up,
/// whichever comes first.
async fn ready_or_gone(
    parts: &Parts,
    spec: &SandboxSpec,
    token: &Token,
    by: Deadline,
    give_up: &CancellationToken,
) -> Result<Connected, SandboxError> {
    let (Some(vm), Some(ready)) = (&parts.vm, &parts.ready) else {
        return Err(gone(spec));
    };
    let mut died = vm.died();
    let nobody_comes = async {
        tokio::select! {
            // Its supervisor's end is one, too.
            _ = died.wait_for(Option::is_some) => {}
            () = give_up.cancelled() => {}
        }
    };
    match wait_for_agent(ready, token, by, nobody_comes).await {
        Ok(connected) => Ok(connected),
        Err(error) => Err(explained(vm.as_ref(), spec, give_up, error).await),
    }
}

/// Why a guest does not come up, or does not go on: what it answered, what its VM
/// ended with, or else what its console shows.
async fn explained(
    vm: &dyn Vm,
    spec: &SandboxSpec,
    give_up: &CancellationToken,
    source: AgentError,
) -> SandboxError {
    let mut died = vm.died();
    match &source {
        AgentError::Rpc { .. } => return source.into(),
        AgentError::Deadline { .. } | AgentError::NotReady(_) => {}
        _ if give_up.is_cancelled() => {}
        // The connection ends before the VM is seen to.
        _ => {
            let ended = died.wait_for(Option::is_some);
            let ended = Deadline::after(VM_ENDS).run(ended).await.is_ok();
            tracing::debug!(ended, "the connection to the guest ended");
        }
    }
    let id = spec.id.clone();
    match &*died.borrow() {
        Some(death) => {
            let reason = death.to_string();
            SandboxError::VmDied { id, reason }
        }
        None if give_up.is_cancelled() => SandboxError::Stopping(id),
        None => {
            let console = vm.console_tail();
            SandboxError::NotReady { source, console }
        }
    }
}

/// Tells the guest what it is, or fails as [`ready_or_gone`] does.
async fn configure(
    parts: &Parts,
    spec: &SandboxSpec,
    connected: &Connected,
    by: Deadline,
    give_up: &CancellationToken,
) -> Result<(), SandboxError> {
    let vm = parts.vm.as_ref().ok_or_else(|| gone(spec))?;
    let network = parts
        .network
        .as_ref()
        .map(PodNetwork::guest)
        .cloned()
        .unwrap_or_default();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let request = agent::ConfigureRequest {
        wall_clock_ns: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
        hostname: spec.hostname.clone(),
        domainname: spec.domainname.clone(),
        interfaces: network
            .interfaces
            .into_iter()
            .map(|interface| agent::Interface {
                name: interface.name,
                mac: interface.mac.to_vec(),
                mtu: interface.mtu,
                addresses: interface.addresses,
            })
            .collect(),
        routes: network
            .routes
            .into_iter()
            .map(|route| agent::Route {
                interface: route.interface,
                destination: route.destination,
                gateway: route.gateway,
                family: route.family,
                metric: route.metric,
                scope: route.scope,
                source: route.source,
                onlink: route.onlink,
            })
            .collect(),
        neighbours: network
            .neighbours
            .into_iter()
            .map(|neighbour| agent::Neighbour {
                interface: neighbour.interface,
                address: neighbour.address,
                mac: neighbour.mac.to_vec(),
            })
            .collect(),
        sysctls: spec.sysctls.clone().into_iter().collect(),
        share_tag: SHARE_TAG.to_owned(),
        shm_size: spec.shm_size.unwrap_or(0),
        user_namespace: spec.users.map(users::to_wire),
    };
    let asked = connected.channel.call("Configure", by, async |mut client| {
        client.configure(request).await
    });
    match give_up.run_until_cancelled(asked).await {
        Some(Ok(_)) => Ok(()),
        Some(Err(error)) => Err(explained(vm.as_ref(), spec, give_up, error).await),
        None => Err(SandboxError::Stopping(spec.id.clone())),
    }
}

/// Logs the boot's phases, and keeps them for whoever looks.
pub(crate) fn show(sandbox: &Sandbox, times: &BootTimes) {
    let run_dir = RunDir::of(
        &sandbox.runtime.config.run_dir,
        &sandbox.spec.namespace,
        &sandbox.spec.id,
    );
    run_dir.write_boot(times);
    let phases: Vec<String> = times
        .iter()
        .map(|(phase, at)| format!("{phase}={}ms", at.as_millis()))
        .collect();
    tracing::info!(sandbox = %sandbox.spec.id, phases = %phases.join(" "), "booted");
}

#[cfg(test)]
mod tests;
