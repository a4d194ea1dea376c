// SPDX-License-Identifier: Apache-2.0
//! What is said of specs, and of single fields of them.

use super::*;

fn spec(json: serde_json::Value) -> Spec {
    serde_json::from_value(json).unwrap()
}

fn with_namespaces(namespaces: serde_json::Value) -> Spec {
    spec(serde_json::json!({
        "ociVersion": "1.0.2",
        "hostname": "x",
        "process": { "cwd": "/", "user": { "uid": 0, "gid": 0 }, "args": ["true"],
                     "apparmorProfile": "cri-containerd.apparmor.d" },
        "linux": { "namespaces": namespaces, "cgroupsPath": "/kubepods/x" },
    }))
}

#[test]
fn pid_namespaces_are_found_by_the_pid_that_was_reported() {
    let sidecar = ContainerId::new("c2").unwrap();
    let targets = [(100, None), (4_194_305, Some(sidecar.clone()))];
    let at = |path: &str| {
        let oci = with_namespaces(serde_json::json!([{ "type": "pid", "path": path }]));
        pid_namespace(&oci, &targets)
    };
    assert_eq!(at("/proc/100/ns/pid").unwrap(), PidNamespace::Pod);
    assert_eq!(
        at("/proc/4194305/ns/pid").unwrap(),
        PidNamespace::Of(sidecar)
    );
    assert!(
        at("/proc/1/ns/pid")
            .unwrap_err()
            .to_string()
            .contains("/proc/1/ns/pid")
    );
    let own = with_namespaces(serde_json::json!([{ "type": "pid" }]));
    assert_eq!(pid_namespace(&own, &targets).unwrap(), PidNamespace::Own);
    let host = with_namespaces(serde_json::json!([{ "type": "mount" }]));
    assert!(
        pid_namespace(&host, &targets)
            .unwrap_err()
            .to_string()
            .contains("hostPID")
    );
}

#[test]
fn what_is_the_hosts_is_stripped() {
    let mut oci = with_namespaces(serde_json::json!([
        { "type": "pid" }, { "type": "ipc", "path": "/proc/9/ns/ipc" },
        { "type": "uts" }, { "type": "network", "path": "/run/netns/x" },
        { "type": "mount" },
    ]));
    strip_host(&mut oci);
    let linux = oci.linux().as_ref().unwrap();
    let left: Vec<_> = linux
        .namespaces()
        .as_ref()
        .unwrap()
        .iter()
        .map(|ns| ns.typ())
        .collect();
    assert_eq!(left, [LinuxNamespaceType::Mount]);
    assert_eq!(linux.cgroups_path(), &None);
    assert_eq!(oci.hostname(), &None);
    assert_eq!(oci.process().as_ref().unwrap().apparmor_profile(), &None);
}

#[test]
fn only_a_privileged_container_may_use_every_device() {
    let of = |options: &[&str]| {
        let mut oci = spec(serde_json::json!({
            "ociVersion": "1.0.2",
            "mounts": [{ "type": "sysfs", "destination": "/sys", "options": options }],
            "linux": { "resources": { "devices": [{ "allow": false, "access": "rwm" }] } },
        }));
        open_devices(&mut oci);
        let resources = oci.linux().as_ref().unwrap().resources().clone().unwrap();
        let rules = resources.devices().clone().unwrap();
        assert_eq!(rules.len(), 1);
        rules[0].allow()
    };
    assert!(of(&["nosuid", "noexec", "nodev", "rw"]));
    assert!(!of(&["nosuid", "noexec", "nodev", "ro"]));
}

#[test]
fn swap_that_a_guest_does_not_have_is_not_limited() {
    let memory = serde_json::json!({ "limit": 1000, "swap": 1000 });
    let mut oci = spec(serde_json::json!({
        "ociVersion": "1.0.2",
        "linux": { "resources": { "memory": memory } },
    }));
    strip_host(&mut oci);
    let linux = oci.linux().as_ref().unwrap();
    let memory = linux.resources().as_ref().unwrap().memory().unwrap();
    assert_eq!((memory.limit(), memory.swap()), (Some(1000), None));
}

#[test]
fn only_files_that_were_given_replace_sources() {
    let files = PodFiles {
        hosts: Some("127.0.0.1 x".into()),
        ..PodFiles::default()
    };
    let found = made_by_shim(&files, Path::new("/etc/hosts"));
    assert_eq!(found, Some(("hosts", "127.0.0.1 x")));
    assert_eq!(made_by_shim(&files, Path::new("/etc/hostname")), None);
    assert_eq!(made_by_shim(&files, Path::new("/data")), None);
}

#[test]
fn a_source_must_not_lead_to_the_hosts_kernel() {
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink("/sys", &link).unwrap();
    for (source, shown) in [
        (Path::new("/proc"), "/proc"),
        (Path::new("/dev/absent"), "/dev"),
        (Path::new("/run/../proc"), "/proc"),
        (&link, "/sys"),
        (&link.join("kernel"), "/sys"),
        (Path::new("/"), "/dev"),
    ] {
        let reason = bindable(source, true).unwrap_err();
        assert!(reason.ends_with(&format!("the host's {shown}")), "{reason}");
    }
    // Without what is mounted below it, it is a folder as others are.
    assert_eq!(bindable(Path::new("/"), false).unwrap(), Path::new("/"));
    let absent = Path::new("/devices/absent");
    assert_eq!(bindable(absent, true).unwrap(), absent);
}

#[test]
fn the_pods_shared_memory_is_told_from_a_volume() {
    let sandbox = SandboxId::new("s1").unwrap();
    let mount = |typ: &str, source: &str| -> Mount {
        serde_json::from_value(serde_json::json!({
            "destination": "/dev/shm", "type": typ, "source": source, "options": ["rbind"],
        }))
        .unwrap()
    };
    for pods in [
        mount("tmpfs", "shm"),
        mount(
            "bind",
            "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/s1/shm",
        ),
    ] {
        assert!(is_pod_shm(&pods, &sandbox));
        assert_eq!(pod_shm(pods).source().as_deref(), Some(Path::new(SHM)));
    }
    let volume = mount("bind", "/var/lib/kubelet/pods/x/volumes/empty-dir/shm");
    assert!(!is_pod_shm(&volume, &sandbox));
}

#[test]
fn files_that_containerd_leaves_out_are_added_unless_the_container_has_its_own() {
    let files = PodFiles {
        hosts: Some("x".into()),
        hostname: Some("web".into()),
        ..PodFiles::default()
    };
    let mut own = Mount::default();
    own.set_destination("/etc/hosts".into());
    let added = missing_files(&files, &[own]);
    let destinations: Vec<_> = added.iter().map(Mount::destination).collect();
    assert_eq!(destinations, [Path::new("/etc/hostname")]);
}
