// SPDX-License-Identifier: Apache-2.0
//! A pod as the CRI describes it, which is all that a shim gets that makes
//! sandboxes itself (`sandboxer = "shim"`).

use std::path::PathBuf;
use std::time::Instant;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use k8s_cri::v1::{
    DnsConfig, IdMapping as CriMapping, NamespaceMode, PodSandboxConfig,
    UserNamespace as CriUserNamespace,
};
use podhull_sandbox::{PodFiles, SandboxError, SandboxSpec, fields};
use podhull_types::{IdMapping, SandboxId, UserNamespace};
use prost::Message;

use crate::bundle::{refuse_host, vcpus};
use crate::cri_fields::POD_FIELDS;
use crate::error::ShimError;

/// How containerd calls the type in an Any.
const TYPE: &str = "runtime.v1.PodSandboxConfig";
/// Where a pod's user namespace is described.
const USERNS: &str = "linux.security_context.namespace_options.userns_options";
/// What a pod without an own one gets, as from containerd.
const HOST_FILES: [&str; 2] = ["/etc/hosts", "/etc/resolv.conf"];
/// What containerd 2.x gives a pod that says nothing else (its settings
/// `enable_unprivileged_ports` and `enable_unprivileged_icmp`, which are on and do
/// not reach a shim): users may listen on low ports, and ping.
const SYSCTLS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    (PING, "0 2147483647"),
];
const PING: &str = "net.ipv4.ping_group_range";

/// The pod's configuration out of CreateSandbox's options.
pub(crate) fn decode(options: Option<&Any>) -> Result<PodSandboxConfig, ShimError> {
    let refused = |reason: String| ShimError::from(SandboxError::refused("options", reason));
    let any = options.ok_or_else(|| refused("no PodSandboxConfig was given".into()))?;
    // A type's name may have a host before a slash.
    if any.type_url.rsplit('/').next() != Some(TYPE) {
        return Err(refused(format!("expected {TYPE}, found {}", any.type_url)));
    }
    PodSandboxConfig::decode(any.value.as_slice()).map_err(|error| refused(error.to_string()))
}

/// The sandbox that `config` describes.
///
/// # Errors
/// What a VM cannot have, by its field's name.
pub(crate) fn sandbox_spec(
    namespace: &str,
    id: &SandboxId,
    config: &PodSandboxConfig,
    netns: &str,
    started: Instant,
) -> Result<SandboxSpec, ShimError> {
    let fields = serde_json::to_value(config)
        .map_err(|error| SandboxError::refused("options", error.to_string()))?;
    fields::check(&fields, "", POD_FIELDS)?;
    let linux = config.linux.clone().unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    let modes = security.namespace_options.unwrap_or_default();
    for (mode, field, what) in [
        (modes.network(), "hostNetwork", "network"),
        (modes.pid(), "hostPID", "processes"),
        (modes.ipc(), "hostIPC", "IPC objects"),
    ] {
        if mode == NamespaceMode::Node {
            return Err(refuse_host(field, what));
        }
    }
    let users = users(modes.userns_options.as_ref())?;
    let resources = linux.resources.unwrap_or_default();
    let memory = u64::try_from(resources.memory_limit_in_bytes).unwrap_or(0);
    let period = u64::try_from(resources.cpu_period).unwrap_or(0);
    let parent = Some(linux.cgroup_parent).filter(|parent| !parent.is_empty());
    let defaults = SYSCTLS
        .into_iter()
        // Not all of its groups are in a user namespace.
        .filter(|(name, _)| users.is_none() || *name != PING)
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let hostname = hostname(config)?;
    Ok(SandboxSpec {
        id: id.clone(),
        namespace: namespace.to_owned(),
        files: files(config, &hostname)?,
        hostname,
        domainname: String::new(),
        netns: Some(netns)
            .filter(|path| !path.is_empty())
            .map(PathBuf::from),
        users,
        cgroups_path: Some(cgroup(parent.as_deref(), namespace, id)),
        sysctls: defaults.chain(linux.sysctls).collect(),
        memory_limit_bytes: Some(memory).filter(|bytes| *bytes > 0),
        vcpus: vcpus(resources.cpu_quota, period),
        shm_size: None,
        started,
    })
}

/// What the pod's user namespace maps, if it has one.
fn users(options: Option<&CriUserNamespace>) -> Result<Option<UserNamespace>, ShimError> {
    let Some(options) = options.filter(|options| options.mode() == NamespaceMode::Pod) else {
        return Ok(None);
    };
    let ids = |mappings: &[CriMapping], field: &str| {
        let all = mappings.iter();
        IdMapping::only(all.map(|ids| (ids.container_id, ids.host_id, ids.length))).map_err(
            |error| {
                let field = format!("{USERNS}.{field}");
                ShimError::from(SandboxError::refused(field, error.to_string()))
            },
        )
    };
    Ok(Some(UserNamespace {
        uids: ids(&options.uids, "uids")?,
        gids: ids(&options.gids, "gids")?,
    }))
}

/// The sandbox's cgroup, named as containerd names a pause container's: systemd
/// has slices and a name of three parts.
fn cgroup(parent: Option<&str>, namespace: &str, id: &SandboxId) -> String {
    match parent {
        None => format!("/{namespace}/{id}"),
        Some(parent) if parent.ends_with(".slice") => {
            let slice = parent.rsplit('/').next().unwrap_or(parent);
            format!("{slice}:cri-containerd:{id}")
        }
        Some(parent) => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

/// The pod's name, or that of the node if it has none.
fn hostname(config: &PodSandboxConfig) -> Result<String, ShimError> {
    if !config.hostname.is_empty() {
        return Ok(config.hostname.clone());
    }
    let name = nix::unistd::gethostname().map_err(ShimError::system("ask for the hostname"))?;
    Ok(name.to_string_lossy().into_owned())
}

/// As containerd 2.x writes them (setupSandboxFiles): settings that are there and
/// empty give an empty resolv.conf, and only none at all give the node's.
fn files(config: &PodSandboxConfig, hostname: &str) -> Result<PodFiles, ShimError> {
    let host = |path: &'static str| match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        read => read.map_err(ShimError::file("read", path)),
    };
    let [hosts, resolv_conf] = HOST_FILES;
    let dns = config.dns_config.as_ref().map(resolv).map(Ok);
    Ok(PodFiles {
        resolv_conf: Some(dns.unwrap_or_else(|| host(resolv_conf))?),
        hosts: Some(host(hosts)?),
        hostname: Some(format!("{hostname}\n")),
    })
}

/// resolv.conf(5) for the pod's DNS settings; empty if it has none.
fn resolv(dns: &DnsConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    text
}

#[cfg(test)]
mod tests {
    use k8s_cri::v1::{LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption};

    use super::*;

    fn id() -> SandboxId {
        SandboxId::new("s1").unwrap()
    }

    #[test]
    fn a_pod_is_decoded_from_its_any() {
        let config = PodSandboxConfig {
            hostname: "web".into(),
            ..PodSandboxConfig::default()
        };
        let any = Any {
            type_url: TYPE.into(),
            value: config.encode_to_vec(),
            ..Any::default()
        };
        let decoded = decode(Some(&any)).unwrap();
        let spec = sandbox_spec("k8s.io", &id(), &decoded, "/run/netns/x", Instant::now());
        let spec = spec.unwrap();
        assert_eq!(spec.hostname, "web");
        assert_eq!(spec.cgroups_path.as_deref(), Some("/k8s.io/s1"));
        assert_eq!(spec.files.hostname.as_deref(), Some("web\n"));
        assert!(decode(None).is_err());
        let other = Any::default();
        assert!(decode(Some(&other)).is_err());
    }

    #[test]
    fn what_a_pod_does_not_say_is_as_from_containerd() {
        let of = |config: &PodSandboxConfig| {
            sandbox_spec("k8s.io", &id(), config, "", Instant::now()).unwrap()
        };
        let bare = of(&PodSandboxConfig::default());
        let node = nix::unistd::gethostname().unwrap();
        assert_eq!(bare.hostname, node.to_str().unwrap());
        assert_eq!(bare.sysctls["net.ipv4.ip_unprivileged_port_start"], "0");
        assert_eq!(bare.sysctls["net.ipv4.ping_group_range"], "0 2147483647");
        let nodes = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        assert_eq!(bare.files.resolv_conf, Some(nodes));
        let said = of(&PodSandboxConfig {
            dns_config: Some(DnsConfig::default()),
            linux: Some(LinuxPodSandboxConfig {
                sysctls: [("net.ipv4.ip_unprivileged_port_start".into(), "80".into())].into(),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        });
        assert_eq!(said.files.resolv_conf.as_deref(), Some(""));
        assert_eq!(said.sysctls["net.ipv4.ip_unprivileged_port_start"], "80");
    }

    fn with_namespaces(options: NamespaceOption) -> Result<SandboxSpec, ShimError> {
        let config = PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        };
        sandbox_spec("k8s.io", &id(), &config, "", Instant::now())
    }

    #[test]
    fn the_hosts_namespaces_are_refused_by_name() {
        let node = i32::from(NamespaceMode::Node);
        for (options, field) in [
            (
                NamespaceOption {
                    network: node,
                    ..NamespaceOption::default()
                },
                "hostNetwork",
            ),
            (
                NamespaceOption {
                    pid: node,
                    ..NamespaceOption::default()
                },
                "hostPID",
            ),
            (
                NamespaceOption {
                    ipc: node,
                    ..NamespaceOption::default()
                },
                "hostIPC",
            ),
        ] {
            let error = with_namespaces(options).unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }

    #[test]
    fn a_user_namespace_is_one_mapping_of_each_kind() {
        let of = |uids: Vec<CriMapping>, gids| {
            with_namespaces(NamespaceOption {
                userns_options: Some(CriUserNamespace {
                    mode: NamespaceMode::Pod.into(),
                    uids,
                    gids,
                }),
                ..NamespaceOption::default()
            })
        };
        let ids = |container_id, host_id| CriMapping {
            host_id,
            container_id,
            length: 65_536,
        };
        let spec = of(vec![ids(0, 100_000)], vec![ids(0, 200_000)]).unwrap();
        let users = spec.users.unwrap();
        assert_eq!((users.uids.root(), users.gids.root()), (100_000, 200_000));
        // As from containerd: not all of the groups are in it.
        assert!(!spec.sysctls.contains_key(PING));
        for (uids, gids, field) in [
            (vec![], vec![ids(0, 5)], "uids"),
            (vec![ids(0, 5)], vec![ids(1, 5)], "gids"),
            (vec![ids(0, 5), ids(0, 9)], vec![ids(0, 5)], "uids"),
        ] {
            let error = of(uids, gids).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{USERNS}.{field}")), "{error}");
        }
    }

    #[test]
    fn cgroups_are_named_as_containerd_names_them() {
        assert_eq!(
            cgroup(Some("/kubepods/pod1"), "k8s.io", &id()),
            "/kubepods/pod1/s1"
        );
        assert_eq!(
            cgroup(Some("/kubepods.slice/kubepods-pod1.slice"), "k8s.io", &id()),
            "kubepods-pod1.slice:cri-containerd:s1"
        );
    }

    #[test]
    fn dns_settings_become_a_file() {
        let dns = DnsConfig {
            servers: vec!["10.0.0.10".into()],
            searches: vec!["a.local".into(), "b.local".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            resolv(&dns),
            "search a.local b.local\nnameserver 10.0.0.10\noptions ndots:5\n"
        );
    }
}
