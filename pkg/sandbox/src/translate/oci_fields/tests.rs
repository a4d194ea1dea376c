// SPDX-License-Identifier: Apache-2.0
//! The table is whole, and what it refuses is refused.

use std::collections::BTreeSet;

use oci_spec::runtime::{
    Hooks, Linux, LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxPersonality,
    LinuxResources, LinuxSeccomp, Mount, Process, Root, Spec, User,
};
use serde_aux::serde_introspection::serde_introspect;
use serde_json::{Value, json};

use super::OCI_FIELDS;
use crate::fields::{Verdict, check, differences};

/// The structures with entries for their members, and their names.
fn structures() -> Vec<(&'static str, &'static [&'static str])> {
    vec![
        ("", serde_introspect::<Spec>()),
        ("root", serde_introspect::<Root>()),
        ("mounts[]", serde_introspect::<Mount>()),
        ("process", serde_introspect::<Process>()),
        ("process.user", serde_introspect::<User>()),
        ("linux", serde_introspect::<Linux>()),
        ("linux.resources", serde_introspect::<LinuxResources>()),
        ("linux.resources.memory", serde_introspect::<LinuxMemory>()),
        ("linux.resources.cpu", serde_introspect::<LinuxCpu>()),
        (
            "linux.resources.hugepageLimits[]",
            serde_introspect::<LinuxHugepageLimit>(),
        ),
        ("linux.seccomp", serde_introspect::<LinuxSeccomp>()),
        ("linux.personality", serde_introspect::<LinuxPersonality>()),
    ]
}

#[test]
fn every_field_has_exactly_one_entry() {
    assert_eq!(differences(&structures(), OCI_FIELDS), [""; 0]);
}

/// A value that asks for what each refused field is about.
fn asked() -> Vec<(&'static str, Value)> {
    let ids = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    let process = |key: &str, value: Value| json!({ "process": { key: value } });
    let linux = |key: &str, value: Value| json!({ "linux": { key: value } });
    let cpu = |key: &str| json!({ "linux": { "resources": { "cpu": { key: 1 } } } });
    let resources = |key: &str, value: Value| json!({ "linux": { "resources": { key: value } } });
    let seccomp = |key: &str| json!({ "linux": { "seccomp": { key: "x" } } });
    vec![
        (
            "process.user.username",
            process("user", json!({ "username": "x" })),
        ),
        ("process.commandLine", process("commandLine", json!("x"))),
        (
            "process.scheduler",
            process("scheduler", json!({ "policy": "SCHED_FIFO" })),
        ),
        (
            "process.execCPUAffinity",
            process("execCPUAffinity", json!({ "initial": "0" })),
        ),
        (
            "hooks",
            json!({ "hooks": { "poststop": [{ "path": "/bin/true" }] } }),
        ),
        (
            "linux.netDevices",
            linux("netDevices", json!({ "eth0": { "name": "net0" } })),
        ),
        (
            "linux.resources.cpu.realtimeRuntime",
            cpu("realtimeRuntime"),
        ),
        ("linux.resources.cpu.realtimePeriod", cpu("realtimePeriod")),
        (
            "linux.resources.blockIO",
            resources("blockIO", json!({ "weight": 100 })),
        ),
        (
            "linux.resources.hugepageLimits[].limit",
            resources("hugepageLimits", json!([{ "pageSize": "2MB", "limit": 1 }])),
        ),
        (
            "linux.resources.network",
            resources("network", json!({ "classID": 1 })),
        ),
        (
            "linux.resources.rdma",
            resources("rdma", json!({ "mlx5_1": { "hcaHandles": 1 } })),
        ),
        (
            "linux.devices",
            linux("devices", json!([{ "path": "/dev/kmsg" }])),
        ),
        ("linux.seccomp.listenerPath", seccomp("listenerPath")),
        (
            "linux.seccomp.listenerMetadata",
            seccomp("listenerMetadata"),
        ),
        (
            "linux.intelRdt",
            linux("intelRdt", json!({ "closID": "x" })),
        ),
        (
            "linux.memoryPolicy",
            linux("memoryPolicy", json!({ "mode": "MPOL_BIND", "nodes": "0" })),
        ),
        (
            "linux.personality.flags",
            linux("personality", json!({ "flags": ["x"] })),
        ),
        (
            "linux.timeOffsets",
            linux("timeOffsets", json!({ "monotonic": { "secs": 1 } })),
        ),
        ("solaris", json!({ "solaris": { "milestone": "x" } })),
        ("windows", json!({ "windows": { "layerFolders": ["x"] } })),
        (
            "zos",
            json!({ "zos": { "namespaces": [{ "type": "pid" }] } }),
        ),
        ("vm", json!({ "vm": { "kernel": { "path": "/x" } } })),
        ("uidMappings", json!({ "uidMappings": ids.clone() })),
        ("gidMappings", json!({ "gidMappings": ids.clone() })),
    ]
}

#[test]
fn what_is_refused_is_refused_by_its_name() {
    let refused = OCI_FIELDS
        .iter()
        .filter(|(_, verdict)| matches!(verdict, Verdict::Refused(_)))
        .map(|(name, _)| *name);
    let asked = asked();
    let tried: BTreeSet<_> = asked.iter().map(|(name, _)| *name).collect();
    assert_eq!(refused.collect::<BTreeSet<_>>(), tried);
    for (name, request) in asked {
        let error = check(&request, "", OCI_FIELDS).unwrap_err().to_string();
        let named = name.replace("[]", "[0]");
        assert!(error.starts_with(&format!("{named}: ")), "{error}");
    }
}

/// What containerd sends of a container that asks for nothing special.
#[test]
fn what_asks_for_nothing_is_accepted() {
    let request = json!({
        "ociVersion": "1.2.1",
        "hooks": { "prestart": [] },
        "linux": {
            "devices": [],
            "uidMappings": null,
            "resources": {
                "hugepageLimits": [{ "pageSize": "2MB", "limit": 0 }],
                "blockIO": {},
                "network": { "classID": 0, "priorities": [] },
            },
            "seccomp": { "defaultAction": "SCMP_ACT_ERRNO", "listenerPath": "" },
        },
    });
    check(&request, "", OCI_FIELDS).unwrap();
}

#[test]
fn a_part_is_checked_under_its_name() {
    let process = json!({ "cwd": "/", "execCPUAffinity": { "initial": "0" } });
    let error = check(&process, "process", OCI_FIELDS).unwrap_err();
    assert!(error.to_string().starts_with("process.execCPUAffinity"));
    let resources = json!({ "blockIO": { "weight": 10 } });
    let error = check(&resources, "linux.resources", OCI_FIELDS).unwrap_err();
    assert!(error.to_string().starts_with("linux.resources.blockIO"));
}

/// Structures of which an entry stands for all are not in `structures`, so a new
/// member of theirs has what the entry says: these are looked at by hand.
#[test]
fn structures_that_are_refused_whole_are_as_they_were() {
    assert_eq!(serde_introspect::<Hooks>().len(), 6);
    assert_eq!(serde_introspect::<LinuxBlockIo>().len(), 7);
}
