// SPDX-License-Identifier: Apache-2.0
//! Limits of containers, what happens at them, and where a pod's own processes
//! are.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use podhull_testkit::cri::Container;
use podhull_testkit::cri::api::{LinuxContainerResources, UpdateContainerResourcesRequest};

use super::fault::killed_pod_is_noticed;
use crate::case::{cases, contains, same};
use crate::context::{Context, refusal};
use crate::procfs::{Processes, Role, signal};

cases! {
    TWICE_BUT_RUNC_16:
        cgroup_out_of_memory_is_reported;
    ALL_TWICE:
        cgroup_limits_are_those_of_the_container,
        cgroup_limits_are_updated_in_place;
    PODHULL:
        cgroup_below_a_systemd_slice_holds_the_pod_and_goes_with_it;
    PODHULL_TWICE:
        cgroup_unified_limits_reach_the_guest,
        cgroup_out_of_memory_of_a_child_spares_the_container,
        cgroup_memory_limit_of_the_pod_sizes_the_guest,
        cgroup_too_small_for_the_vm_is_named;
}

const MIB: i64 = 1 << 20;

/// A limit as either version of cgroups has it.
async fn limit(container: &Container, v2: &str, v1: &str) -> Result<String> {
    let script = format!(
        "cat /proc/self/cgroup >&2; cd /sys/fs/cgroup; \
         if [ -e {v2} ]; then cat {v2}; else cat {v1} || (ls >&2; false); fi"
    );
    Ok(container.shell(&script).await?.success()?.text())
}

async fn memory_limit(container: &Container) -> Result<String> {
    limit(container, "memory.max", "memory/memory.limit_in_bytes").await
}

async fn cgroup_limits_are_those_of_the_container(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .resources(|resources| {
            resources.memory_limit_in_bytes = 48 * MIB;
            resources.cpu_period = 100_000;
            resources.cpu_quota = 50_000;
            resources.cpu_shares = 512;
        })
        .start()
        .await?;
    same!(memory_limit(&container).await?, (48 * MIB).to_string());
    let cpu = limit(
        &container,
        "cpu.max",
        "cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us",
    )
    .await?;
    same!(cpu.replace('\n', " "), "50000 100000");
    // 512 of 1024 shares are a weight of 59 in runc's newer curve.
    let weight = limit(&container, "cpu.weight", "cpu/cpu.shares").await?;
    ensure!(["59", "512"].contains(&&*weight), "{weight}");
    let other = t.container(&pod, "other").idle().start().await?;
    let other = memory_limit(&other).await?;
    ensure!(
        other == "max" || other.len() > 12,
        "a container without a limit has {other}"
    );
    Ok(())
}

async fn cgroup_unified_limits_reach_the_guest(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .resources(|resources| {
            resources.unified.insert("pids.max".into(), "12".into());
            resources
                .unified
                .insert("memory.high".into(), "33554432".into());
        })
        .start()
        .await?;
    let limits = container
        .shell("cd /sys/fs/cgroup; cat pids.max memory.high")
        .await?;
    same!(limits.text(), "12\n33554432");
    let bomb = container
        .shell("for i in $(seq 30); do sleep 5 & done; wait")
        .await?;
    ensure!(
        bomb.error_text().contains("fork"),
        "30 processes where 12 may be: {bomb:?}"
    );
    container.exec(["true"]).await?.success()?;
    Ok(())
}

async fn cgroup_limits_are_updated_in_place(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .resources(|resources| resources.memory_limit_in_bytes = 32 * MIB)
        .start()
        .await?;
    let request = UpdateContainerResourcesRequest {
        container_id: container.id().into(),
        linux: Some(LinuxContainerResources {
            memory_limit_in_bytes: 64 * MIB,
            cpu_period: 100_000,
            cpu_quota: 30_000,
            ..LinuxContainerResources::default()
        }),
        ..UpdateContainerResourcesRequest::default()
    };
    t.client()
        .runtime()
        .update_container_resources(request)
        .await?;
    same!(memory_limit(&container).await?, (64 * MIB).to_string());
    let cpu = limit(
        &container,
        "cpu.max",
        "cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us",
    )
    .await?;
    same!(cpu.replace('\n', " "), "30000 100000");
    Ok(())
}

async fn cgroup_out_of_memory_is_reported(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .command(["dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"])
        .resources(|resources| resources.memory_limit_in_bytes = 24 * MIB)
        .start()
        .await?;
    let status = container.exited(Duration::from_secs(60)).await?;
    same!(status.exit_code, 137);
    // Its event may come after that of the end.
    let by = Instant::now() + Duration::from_secs(10);
    while container.status().await?.reason != "OOMKilled" {
        ensure!(
            Instant::now() < by,
            "reason {:?}, expected OOMKilled",
            status.reason
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    ensure!(pod.is_ready().await?, "the pod ended with the container");
    Ok(())
}

async fn cgroup_out_of_memory_of_a_child_spares_the_container(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .resources(|resources| resources.memory_limit_in_bytes = 24 * MIB)
        .start()
        .await?;
    let output = container
        .shell("dd if=/dev/zero of=/dev/null bs=100M count=1; echo $?")
        .await?;
    // With memory.oom.group the whole exec, or the container, would end.
    same!(output.text(), "137");
    container.exec(["true"]).await?.success()?;
    Ok(())
}

async fn cgroup_memory_limit_of_the_pod_sizes_the_guest(t: &Context) -> Result<()> {
    let total = async |limit_mib: i64| -> Result<u64> {
        let pod = t
            .pod("pod")
            .linux(|linux| {
                let resources = linux.resources.get_or_insert_default();
                resources.memory_limit_in_bytes = limit_mib * MIB;
            })
            .run()
            .await?;
        let container = t.container(&pod, "main").idle().start().await?;
        let text = container
            .shell("awk '/MemTotal/ {print $2}' /proc/meminfo")
            .await?
            .text();
        pod.remove().await?;
        Ok(text.parse::<u64>().context(text)? / 1024)
    };
    let (small, large) = (total(128).await?, total(512).await?);
    ensure!(
        small >= 128 && (small + 300..small + 400).contains(&large),
        "pods with 128 and 512 MiB have guests with {small} and {large} MiB"
    );
    Ok(())
}

/// A pod's slice as the kubelet makes it with systemd's cgroup driver, and
/// those above it.
const SLICES: [&str; 3] = [
    "kubepods.slice",
    "kubepods-besteffort.slice",
    "kubepods-besteffort-pod4d1b7c8e.slice",
];

/// These slices, which are the kubelet's to remove.
struct Slices {
    roots: Vec<PathBuf>,
}

impl Slices {
    fn make() -> Result<Self> {
        let root = PathBuf::from("/sys/fs/cgroup");
        if !root.join("cgroup.controllers").exists() {
            // Version 1: podhull makes what is missing in each hierarchy, since a
            // cpuset there takes nobody in before it is filled.
            let roots = fs::read_dir(&root)?.map(|entry| Ok(entry?.path()));
            let roots = roots.collect::<Result<_>>()?;
            return Ok(Self { roots });
        }
        let made = Self {
            roots: vec![root.clone()],
        };
        let mut folder = root;
        for name in SLICES {
            folder.push(name);
            fs::create_dir(&folder).with_context(|| format!("make {}", folder.display()))?;
            let controllers = fs::read_to_string(folder.join("cgroup.controllers"))?;
            for controller in controllers.split_whitespace() {
                fs::write(
                    folder.join("cgroup.subtree_control"),
                    format!("+{controller}"),
                )
                .with_context(|| format!("enable {controller} in {name}"))?;
            }
        }
        Ok(made)
    }

    fn path() -> PathBuf {
        SLICES.iter().collect()
    }

    /// Where `path` is a cgroup.
    fn with(&self, path: &Path) -> Vec<PathBuf> {
        let folders = self.roots.iter().map(|root| root.join(path));
        folders.filter(|folder| folder.is_dir()).collect()
    }
}

impl Drop for Slices {
    fn drop(&mut self) {
        // What stays is the leak oracle's to name.
        let path = Self::path();
        for below in path.ancestors().filter(|path| *path != Path::new("")) {
            for folder in self.with(below) {
                drop(fs::remove_dir(folder));
            }
        }
    }
}

async fn cgroup_below_a_systemd_slice_holds_the_pod_and_goes_with_it(t: &Context) -> Result<()> {
    let slices = Slices::make()?;
    for killed in [false, true] {
        let parent = format!("/{}", Slices::path().display());
        let pod = t
            .pod("pod")
            .linux(|linux| linux.cgroup_parent = parent)
            .run()
            .await?;
        let processes = Processes::of(pod.id())?;
        let scope = Slices::path().join(format!("cri-containerd-{}.scope", pod.id()));
        for role in [Role::Vmm, Role::FileServer] {
            let cgroups = fs::read_to_string(format!("/proc/{}/cgroup", processes.pid(role)?))?;
            let memory = cgroups
                .lines()
                .find(|line| line.contains(":memory:") || line.starts_with("0::"))
                .context("no memory cgroup")?;
            let path = memory.rsplit(':').next().unwrap_or_default();
            same!(Path::new(path), Path::new("/").join(&scope), "{role:?}");
        }
        ensure!(!slices.with(&scope).is_empty(), "no cgroup {scope:?}");
        if killed {
            signal(processes.pid(Role::Shim)?, Signal::SIGKILL)?;
            processes.gone(Duration::from_secs(10)).await?;
            killed_pod_is_noticed(&pod).await?;
        }
        pod.stop().await?;
        pod.remove().await?;
        same!(slices.with(&scope), Vec::<PathBuf>::new(), "{scope:?}");
        // The pod's slice is not podhull's.
        ensure!(!slices.with(&Slices::path()).is_empty(), "no slice is left");
    }
    Ok(())
}

/// A pod's cgroup whose limit counts without what the VM needs.
async fn cgroup_too_small_for_the_vm_is_named(t: &Context) -> Result<()> {
    const PARENT: &str = "too-small";
    let root = Path::new("/sys/fs/cgroup");
    let v2 = root.join("cgroup.controllers").exists();
    let (memory, limit) = match v2 {
        true => (root.join(PARENT), "memory.max"),
        false => (root.join("memory").join(PARENT), "memory.limit_in_bytes"),
    };
    fs::create_dir(&memory).with_context(|| format!("make {}", memory.display()))?;
    let refused = async {
        if v2 {
            fs::write(memory.join("cgroup.subtree_control"), "+memory")?;
        }
        fs::write(memory.join(limit), (48 * MIB).to_string()).context("set the limit")?;
        let parent = format!("/{PARENT}");
        let pod = t.pod("pod").linux(|linux| linux.cgroup_parent = parent);
        let text = refusal(pod.run().await, "a VM of 256 MiB in a cgroup of 48")?;
        contains!(
            &text,
            "qemu ended",
            "for want of memory",
            "overhead.podFixed"
        );
        anyhow::Ok(())
    };
    let refused = refused.await;
    // Made in the other hierarchies by podhull, and as with any parent not its own.
    for entry in fs::read_dir(root)? {
        let folder = entry?.path().join(PARENT);
        if folder.is_dir() {
            fs::remove_dir(&folder).with_context(|| format!("remove {}", folder.display()))?;
        }
    }
    if v2 {
        fs::remove_dir(&memory).context("remove the cgroup")?;
    }
    refused
}
