// SPDX-License-Identifier: Apache-2.0
//! A bundle's config.json, and what containerd's CRI plugin says in its
//! annotations (containerd's `internal/cri/annotations`).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use podhull_sandbox::{PodFiles, SandboxError, SandboxSpec, users};
use podhull_types::SandboxId;

use crate::error::ShimError;
use crate::wire;

const CONFIG: &str = "config.json";
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// Reads `bundle`'s config.json; `None` if there is none, as for a sandbox that
/// the shim itself makes.
pub(crate) fn read(bundle: &Path) -> Result<Option<Spec>, ShimError> {
    let path = bundle.join(CONFIG);
    let text = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(ShimError::file("read", &path))?,
    };
    let spec = wire::parse(&text, wire::passed_over(CONFIG));
    spec.map(Some).map_err(|error| ShimError::Garbled {
        path,
        key: error.path().to_string(),
        message: error.inner().to_string(),
    })
}

fn annotation<'a>(spec: &'a Spec, key: &str) -> Option<&'a str> {
    spec.annotations().as_ref()?.get(key).map(String::as_str)
}

/// The sandbox that a container belongs to; its own id if it says nothing.
pub(crate) fn sandbox_of<'a>(spec: Option<&'a Spec>, id: &'a str) -> &'a str {
    spec.and_then(|spec| annotation(spec, SANDBOX_ID))
        .filter(|sandbox| !sandbox.is_empty())
        .unwrap_or(id)
}

/// Whether this is the pod's own container: the one that needs no process.
pub(crate) fn is_sandbox(spec: &Spec) -> bool {
    annotation(spec, CONTAINER_TYPE) == Some("sandbox")
}

/// Refuses a container that belongs to no pod, as `ctr run` makes one: there is
/// no VM to put it into. Without a spec, it is the sandbox that is asked for.
pub(crate) fn refuse_podless(spec: Option<&Spec>, id: &str) -> Result<(), ShimError> {
    match spec {
        Some(found) if !is_sandbox(found) && sandbox_of(spec, id) == id => {
            let reason = format!(
                "container {id} has no pod to run in: its annotation {SANDBOX_ID} is missing"
            );
            Err(SandboxError::refused("annotations", reason).into())
        }
        _ => Ok(()),
    }
}

/// Whole CPUs for a quota within a period, both in microseconds.
pub(crate) fn vcpus(quota: i64, period: u64) -> Option<u32> {
    let quota = u64::try_from(quota).ok().filter(|quota| *quota > 0)?;
    let period = Some(period).filter(|period| *period > 0)?;
    u32::try_from(quota.div_ceil(period)).ok()
}

fn namespace(spec: &Spec, kind: LinuxNamespaceType) -> Option<Option<PathBuf>> {
    let linux = spec.linux().as_ref()?;
    let namespaces = linux.namespaces().as_ref()?;
    namespaces
        .iter()
        .find(|namespace| namespace.typ() == kind)
        .map(|namespace| namespace.path().clone())
}

/// What is refused for the whole pod, by the name that Kubernetes gives it.
pub(crate) fn refuse_host(field: &str, what: &str) -> ShimError {
    let reason = format!("a pod in a VM cannot use the host's {what}");
    SandboxError::refused(field, reason).into()
}

/// The sandbox that the pause container of `spec` stands for.
///
/// # Errors
/// What a VM cannot have, by its field's name.
pub(crate) fn sandbox_spec(
    namespace_name: &str,
    id: &SandboxId,
    spec: &Spec,
    started: Instant,
) -> Result<SandboxSpec, ShimError> {
    use LinuxNamespaceType::{Ipc, Network, Pid};
    for (kind, field, what) in [
        (Network, "hostNetwork", "network"),
        (Pid, "hostPID", "processes"),
        (Ipc, "hostIPC", "IPC objects"),
    ] {
        if namespace(spec, kind).is_none() {
            return Err(refuse_host(field, what));
        }
    }
    let users = users::of_spec(spec)?;
    let netns = namespace(spec, Network).flatten();
    if users.is_some() && netns.is_none() {
        // containerd 1.7 leaves it to the runtime to make the network.
        let reason = "a user namespace needs containerd 2.0 or later, which makes the pod's \
            network before its sandbox";
        return Err(SandboxError::refused("hostUsers", reason).into());
    }
    let linux = spec.linux().as_ref();
    let number = |key| annotation(spec, key).and_then(|text| text.parse::<i64>().ok());
    let memory = number(SANDBOX_MEMORY).and_then(|bytes| u64::try_from(bytes).ok());
    let cpus = number(CPU_QUOTA)
        .zip(number(CPU_PERIOD).and_then(|period| u64::try_from(period).ok()))
        .and_then(|(quota, period)| vcpus(quota, period));
    let sysctls: BTreeMap<_, _> = linux
        .and_then(|linux| linux.sysctl().clone())
        .unwrap_or_default()
        .into_iter()
        .collect();
    Ok(SandboxSpec {
        id: id.clone(),
        namespace: namespace_name.to_owned(),
        hostname: spec.hostname().clone().unwrap_or_default(),
        domainname: spec.domainname().clone().unwrap_or_default(),
        netns,
        users,
        cgroups_path: linux
            .and_then(|linux| linux.cgroups_path().as_ref())
            .map(|path| path.to_string_lossy().into_owned()),
        sysctls,
        memory_limit_bytes: memory.filter(|bytes| *bytes > 0),
        vcpus: cpus,
        shm_size: None,
        files: PodFiles::default(),
        started,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: serde_json::Value) -> Spec {
        serde_json::from_value(json).unwrap()
    }

    fn pause(namespaces: serde_json::Value) -> Spec {
        spec(serde_json::json!({
            "ociVersion": "1.0.2",
            "hostname": "web",
            "annotations": {
                SANDBOX_ID: "s1",
                CONTAINER_TYPE: "sandbox",
                SANDBOX_MEMORY: "134217728",
                CPU_QUOTA: "150000",
                CPU_PERIOD: "100000",
            },
            "linux": {
                "namespaces": namespaces,
                "cgroupsPath": "/kubepods/pod1/s1",
                "sysctl": {"net.core.somaxconn": "1024"},
            },
        }))
    }

    #[test]
    fn a_pause_container_is_the_pod() {
        let spec = pause(serde_json::json!([
            {"type": "network", "path": "/run/netns/x"}, {"type": "pid"}, {"type": "ipc"},
        ]));
        assert!(is_sandbox(&spec));
        assert_eq!(sandbox_of(Some(&spec), "c1"), "s1");
        assert_eq!(sandbox_of(None, "c1"), "c1");
        let id = SandboxId::new("s1").unwrap();
        let made = sandbox_spec("k8s.io", &id, &spec, Instant::now()).unwrap();
        assert_eq!(made.hostname, "web");
        assert_eq!(made.netns, Some("/run/netns/x".into()));
        assert_eq!(made.memory_limit_bytes, Some(128 << 20));
        assert_eq!(made.vcpus, Some(2));
        assert_eq!(made.sysctls["net.core.somaxconn"], "1024");
        assert_eq!(made.cgroups_path.as_deref(), Some("/kubepods/pod1/s1"));
    }

    #[test]
    fn a_user_namespace_needs_a_network_that_is_there() {
        let id = SandboxId::new("s1").unwrap();
        let of = |network: serde_json::Value| {
            let mut pause = serde_json::to_value(pause(serde_json::json!([
                network, {"type": "pid"}, {"type": "ipc"}, {"type": "user"},
            ])))
            .unwrap();
            let ids = serde_json::json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
            pause["linux"]["uidMappings"] = ids.clone();
            pause["linux"]["gidMappings"] = ids;
            sandbox_spec("k8s.io", &id, &spec(pause), Instant::now())
        };
        let made = of(serde_json::json!({"type": "network", "path": "/run/netns/x"})).unwrap();
        assert_eq!(made.users.unwrap().uids.root(), 100_000);
        let error = of(serde_json::json!({"type": "network"})).unwrap_err();
        let error = error.to_string();
        assert!(
            error.starts_with("hostUsers") && error.contains("containerd 2.0"),
            "{error}"
        );
    }

    #[test]
    fn a_container_without_a_pod_is_refused() {
        let of = |annotations| {
            spec(serde_json::json!({"ociVersion": "1.0.2", "annotations": annotations}))
        };
        let lone = of(serde_json::json!({"other": "x"}));
        let error = refuse_podless(Some(&lone), "c1").unwrap_err().to_string();
        assert!(
            error.contains("c1") && error.contains(SANDBOX_ID),
            "{error}"
        );
        let joins = of(serde_json::json!({SANDBOX_ID: "s1", CONTAINER_TYPE: "container"}));
        refuse_podless(Some(&joins), "c1").unwrap();
        refuse_podless(Some(&pause(serde_json::json!([]))), "s1").unwrap();
        refuse_podless(None, "s1").unwrap();
    }

    #[test]
    fn the_hosts_namespaces_are_refused_by_name() {
        let id = SandboxId::new("s1").unwrap();
        let all = [
            ("network", "hostNetwork"),
            ("pid", "hostPID"),
            ("ipc", "hostIPC"),
        ];
        for (missing, field) in all {
            let others: Vec<_> = all
                .iter()
                .filter(|(kind, _)| *kind != missing)
                .map(|(kind, _)| serde_json::json!({"type": kind}))
                .collect();
            let spec = pause(others.into());
            let made = sandbox_spec("k8s.io", &id, &spec, Instant::now());
            let error = made.unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }

    #[test]
    fn a_garbled_bundle_names_key_and_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        assert!(read(folder.path()).unwrap().is_none());
        std::fs::write(
            &path,
            "{\"ociVersion\": \"1\",\n\"process\": {\"cwd\": \"/\",\n\"user\": {\"uid\": \"x\", \"gid\": 0}}}",
        )
        .unwrap();
        let error = read(folder.path()).unwrap_err().to_string();
        assert!(
            error.contains("process.user.uid") && error.contains("line 3"),
            "{error}"
        );
    }

    #[test]
    fn cpus_are_whole() {
        assert_eq!(vcpus(150_000, 100_000), Some(2));
        assert_eq!(vcpus(-1, 100_000), None);
        assert_eq!(vcpus(100_000, 0), None);
    }
}
