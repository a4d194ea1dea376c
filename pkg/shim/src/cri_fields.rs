// SPDX-License-Identifier: Apache-2.0
//! Every field by which the CRI describes a pod and a Linux container, and what
//! becomes of it. Names are those of the CRI's .proto.
//!
//! A shim sees a pod's fields only where it makes sandboxes itself, and checks them
//! there ([`crate::cri`]); elsewhere, and always for containers, containerd turns
//! them into an OCI specification, whose fields podhull checks.

use podhull_sandbox::fields::Field;
use podhull_sandbox::fields::Verdict::{Honoured, NoMeaning, Refused};
use podhull_sandbox::fields::reasons::{HUGE_PAGES, LSM, NOT_LINUX, PAGE_SIZE};

const NO_PAUSE: &str = "it is said of the pause container, which a VM does not need";
const OF_THE_POD: &str = "the kubelet sets it on the pod's cgroup, in which the VM is";

/// A pod sandbox's fields.
pub(crate) const POD_FIELDS: &[Field] = &[
    ("metadata", Honoured),
    ("hostname", Honoured),
    ("log_directory", Honoured),
    ("dns_config", Honoured),
    ("port_mappings", Honoured),
    ("labels", Honoured),
    ("annotations", Honoured),
    ("linux.cgroup_parent", Honoured),
    ("linux.security_context.namespace_options", Honoured),
    ("linux.security_context.selinux_options", NoMeaning(LSM)),
    ("linux.security_context.run_as_user", NoMeaning(NO_PAUSE)),
    ("linux.security_context.run_as_group", NoMeaning(NO_PAUSE)),
    (
        "linux.security_context.readonly_rootfs",
        NoMeaning(NO_PAUSE),
    ),
    (
        "linux.security_context.supplemental_groups",
        NoMeaning(NO_PAUSE),
    ),
    (
        "linux.security_context.supplemental_groups_policy",
        NoMeaning(NO_PAUSE),
    ),
    ("linux.security_context.privileged", NoMeaning(NO_PAUSE)),
    ("linux.security_context.seccomp", NoMeaning(NO_PAUSE)),
    ("linux.security_context.apparmor", NoMeaning(LSM)),
    (
        "linux.security_context.seccomp_profile_path",
        NoMeaning(NO_PAUSE),
    ),
    ("linux.sysctls", Honoured),
    ("linux.overhead", NoMeaning(OF_THE_POD)),
    ("linux.resources.cpu_period", Honoured),
    ("linux.resources.cpu_quota", Honoured),
    ("linux.resources.cpu_shares", NoMeaning(OF_THE_POD)),
    ("linux.resources.memory_limit_in_bytes", Honoured),
    ("linux.resources.oom_score_adj", NoMeaning(NO_PAUSE)),
    ("linux.resources.cpuset_cpus", NoMeaning(OF_THE_POD)),
    ("linux.resources.cpuset_mems", NoMeaning(OF_THE_POD)),
    (
        "linux.resources.hugepage_limits[].page_size",
        NoMeaning(PAGE_SIZE),
    ),
    (
        "linux.resources.hugepage_limits[].limit",
        Refused(HUGE_PAGES),
    ),
    ("linux.resources.unified", NoMeaning(OF_THE_POD)),
    (
        "linux.resources.memory_swap_limit_in_bytes",
        NoMeaning(OF_THE_POD),
    ),
    ("windows", Refused(NOT_LINUX)),
];

/// A Linux container's fields (`LinuxContainerConfig`). What is refused here is
/// refused as the field of the OCI specification that containerd makes of it.
#[cfg(test)]
const CONTAINER_FIELDS: &[Field] = &[
    ("resources.cpu_period", Honoured),
    ("resources.cpu_quota", Honoured),
    ("resources.cpu_shares", Honoured),
    ("resources.memory_limit_in_bytes", Honoured),
    ("resources.oom_score_adj", Honoured),
    ("resources.cpuset_cpus", Honoured),
    ("resources.cpuset_mems", Honoured),
    (
        "resources.hugepage_limits[].page_size",
        NoMeaning(PAGE_SIZE),
    ),
    ("resources.hugepage_limits[].limit", Refused(HUGE_PAGES)),
    ("resources.unified", Honoured),
    (
        "resources.memory_swap_limit_in_bytes",
        NoMeaning(podhull_sandbox::fields::reasons::SWAP),
    ),
    ("security_context.capabilities", Honoured),
    ("security_context.privileged", Honoured),
    ("security_context.namespace_options", Honoured),
    ("security_context.selinux_options", NoMeaning(LSM)),
    ("security_context.run_as_user", Honoured),
    ("security_context.run_as_group", Honoured),
    ("security_context.run_as_username", Honoured),
    ("security_context.readonly_rootfs", Honoured),
    ("security_context.supplemental_groups", Honoured),
    ("security_context.supplemental_groups_policy", Honoured),
    ("security_context.no_new_privs", Honoured),
    ("security_context.masked_paths", Honoured),
    ("security_context.readonly_paths", Honoured),
    ("security_context.seccomp", Honoured),
    ("security_context.apparmor", NoMeaning(LSM)),
    ("security_context.apparmor_profile", NoMeaning(LSM)),
    ("security_context.seccomp_profile_path", Honoured),
];

#[cfg(test)]
mod tests {
    use k8s_cri::v1::{
        HugepageLimit, LinuxContainerConfig, LinuxContainerResources,
        LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
        PodSandboxConfig,
    };
    use podhull_sandbox::OCI_FIELDS;
    use podhull_sandbox::fields::{differences, table};
    use serde_aux::serde_introspection::serde_introspect;

    use super::*;

    const NONE: [&str; 0] = [];

    #[test]
    fn every_field_of_a_pod_has_exactly_one_entry() {
        let structures = [
            ("", serde_introspect::<PodSandboxConfig>()),
            ("linux", serde_introspect::<LinuxPodSandboxConfig>()),
            (
                "linux.security_context",
                serde_introspect::<LinuxSandboxSecurityContext>(),
            ),
            (
                "linux.resources",
                serde_introspect::<LinuxContainerResources>(),
            ),
            (
                "linux.resources.hugepage_limits[]",
                serde_introspect::<HugepageLimit>(),
            ),
        ];
        assert_eq!(differences(&structures, POD_FIELDS), NONE);
    }

    #[test]
    fn every_field_of_a_linux_container_has_exactly_one_entry() {
        let structures = [
            ("", serde_introspect::<LinuxContainerConfig>()),
            ("resources", serde_introspect::<LinuxContainerResources>()),
            (
                "resources.hugepage_limits[]",
                serde_introspect::<HugepageLimit>(),
            ),
            (
                "security_context",
                serde_introspect::<LinuxContainerSecurityContext>(),
            ),
        ];
        assert_eq!(differences(&structures, CONTAINER_FIELDS), NONE);
    }

    /// Written instead of compared with `PODHULL_UPDATE_DOCS` in the environment.
    #[test]
    fn the_page_is_what_the_tables_say() {
        let page = format!(
            "# Fields\n\n\
             Every field of a request and what becomes of it, made from the tables that podhull itself uses, by\n\
             `make compatibility`. What is refused fails the request, by the field's name and with its value. A field\n\
             that is null, false, zero or empty asks for nothing. A field that is not here is newer than podhull: it is\n\
             passed over, as runc does it, and a warning in the shim's log names it.\n\n\
             ## OCI specification of a container\n\n{}\n\
             ## CRI: `PodSandboxConfig`\n\n{}\n\
             ## CRI: `LinuxContainerConfig`\n\n\
             containerd makes an OCI specification of these.\n\n{}",
            table(OCI_FIELDS),
            table(POD_FIELDS),
            table(CONTAINER_FIELDS)
        );
        // Not where it was built: checkouts may share that.
        let here = std::env::var("CARGO_MANIFEST_DIR").unwrap();
        let path = std::path::Path::new(&here).join("../../docs/fields.md");
        if std::env::var_os("PODHULL_UPDATE_DOCS").is_some() {
            std::fs::write(&path, page).unwrap();
            return;
        }
        let written = std::fs::read_to_string(path).unwrap();
        assert!(written == page, "docs/fields.md is old: make compatibility");
    }
}
