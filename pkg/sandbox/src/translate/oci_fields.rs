// SPDX-License-Identifier: Apache-2.0
//! Every field of an OCI container specification (runtime-spec 1.3) and what
//! becomes of it in a guest.

use crate::fields::Field;
use crate::fields::Verdict::{Honoured, NoMeaning, Refused};
use crate::fields::reasons::{HUGE_PAGES, LSM, NOT_LINUX, PAGE_SIZE, SWAP};

const HOOKS: &str = "OCI hooks run programs of the host, which a guest does not have";
const HOST_DEVICES: &str = "a guest has no device of the host; for privileged pods set \
     privileged_without_host_devices in containerd's runtime handler";
const IDS: &str = "it is no field of the specification; a pod's user namespace is in `linux`";
const IO: &str = "a pod's files come over virtio-fs: there is no block device to limit";
const CGROUP_V1: &str = "a guest has cgroup v2 only, which has no such control";
const IGNORED_V2: &str = "cgroup v2, which a guest has, knows no such limit, and runc passes it \
     over there";
const LISTENER: &str = "a seccomp listener is a program of the host, which a guest cannot reach";

/// The fields, in the specification's order.
pub const OCI_FIELDS: &[Field] = &[
    ("ociVersion", Honoured),
    ("root.path", NoMeaning("the shared tree's takes its place")),
    ("root.readonly", Honoured),
    ("mounts[].destination", Honoured),
    ("mounts[].type", Honoured),
    ("mounts[].source", Honoured),
    ("mounts[].options", Honoured),
    ("mounts[].uidMappings", Honoured),
    ("mounts[].gidMappings", Honoured),
    ("process.terminal", Honoured),
    ("process.consoleSize", Honoured),
    ("process.user.uid", Honoured),
    ("process.user.gid", Honoured),
    ("process.user.umask", Honoured),
    ("process.user.additionalGids", Honoured),
    ("process.user.username", Refused(NOT_LINUX)),
    ("process.args", Honoured),
    ("process.commandLine", Refused(NOT_LINUX)),
    ("process.env", Honoured),
    ("process.cwd", Honoured),
    ("process.capabilities", Honoured),
    ("process.rlimits", Honoured),
    ("process.noNewPrivileges", Honoured),
    ("process.apparmorProfile", NoMeaning(LSM)),
    ("process.oomScoreAdj", Honoured),
    ("process.selinuxLabel", NoMeaning(LSM)),
    (
        "process.ioPriority",
        NoMeaning("virtio-fs, over which a pod's files come, knows none"),
    ),
    (
        "process.scheduler",
        Refused("a guest's processes run under its kernel's default policy"),
    ),
    (
        "process.execCPUAffinity",
        Refused("an exec runs on any CPU of its container"),
    ),
    (
        "hostname",
        NoMeaning("a container has its pod's, which the sandbox is given"),
    ),
    (
        "domainname",
        NoMeaning("a container has its pod's, which the sandbox is given"),
    ),
    ("hooks", Refused(HOOKS)),
    (
        "annotations",
        NoMeaning("they are containerd's and the kubelet's"),
    ),
    (
        "linux.netDevices",
        Refused("a guest has no network device of the host"),
    ),
    ("linux.uidMappings", Honoured),
    ("linux.gidMappings", Honoured),
    ("linux.sysctl", Honoured),
    ("linux.resources.devices", Honoured),
    ("linux.resources.memory.limit", Honoured),
    ("linux.resources.memory.reservation", Honoured),
    ("linux.resources.memory.swap", NoMeaning(SWAP)),
    ("linux.resources.memory.kernel", NoMeaning(IGNORED_V2)),
    ("linux.resources.memory.kernelTCP", NoMeaning(IGNORED_V2)),
    ("linux.resources.memory.swappiness", NoMeaning(IGNORED_V2)),
    (
        "linux.resources.memory.disableOOMKiller",
        NoMeaning(IGNORED_V2),
    ),
    ("linux.resources.memory.useHierarchy", NoMeaning(IGNORED_V2)),
    ("linux.resources.memory.checkBeforeUpdate", Honoured),
    ("linux.resources.cpu.shares", Honoured),
    ("linux.resources.cpu.quota", Honoured),
    ("linux.resources.cpu.idle", Honoured),
    ("linux.resources.cpu.burst", Honoured),
    ("linux.resources.cpu.period", Honoured),
    ("linux.resources.cpu.realtimeRuntime", Refused(CGROUP_V1)),
    ("linux.resources.cpu.realtimePeriod", Refused(CGROUP_V1)),
    ("linux.resources.cpu.cpus", Honoured),
    ("linux.resources.cpu.mems", Honoured),
    ("linux.resources.pids", Honoured),
    ("linux.resources.blockIO", Refused(IO)),
    (
        "linux.resources.hugepageLimits[].pageSize",
        NoMeaning(PAGE_SIZE),
    ),
    (
        "linux.resources.hugepageLimits[].limit",
        Refused(HUGE_PAGES),
    ),
    ("linux.resources.network", Refused(CGROUP_V1)),
    ("linux.resources.rdma", Refused(HOST_DEVICES)),
    ("linux.resources.unified", Honoured),
    (
        "linux.cgroupsPath",
        NoMeaning("a container's cgroup is the agent's to name"),
    ),
    ("linux.namespaces", Honoured),
    ("linux.devices", Refused(HOST_DEVICES)),
    ("linux.seccomp.defaultAction", Honoured),
    ("linux.seccomp.defaultErrnoRet", Honoured),
    ("linux.seccomp.architectures", Honoured),
    ("linux.seccomp.flags", Honoured),
    ("linux.seccomp.listenerPath", Refused(LISTENER)),
    ("linux.seccomp.listenerMetadata", Refused(LISTENER)),
    ("linux.seccomp.syscalls", Honoured),
    (
        "linux.rootfsPropagation",
        NoMeaning("it is said of the host's mounts; what the guest shows of them follows"),
    ),
    ("linux.maskedPaths", Honoured),
    ("linux.readonlyPaths", Honoured),
    ("linux.mountLabel", NoMeaning(LSM)),
    (
        "linux.intelRdt",
        Refused("a guest does not see the CPU's caches as the host does"),
    ),
    (
        "linux.memoryPolicy",
        Refused("a guest's memory is one node, of which there is nothing to choose"),
    ),
    ("linux.personality.domain", Honoured),
    (
        "linux.personality.flags",
        Refused("no flag of a personality is supported"),
    ),
    (
        "linux.timeOffsets",
        Refused("time namespaces are not supported"),
    ),
    ("solaris", Refused(NOT_LINUX)),
    ("windows", Refused(NOT_LINUX)),
    ("zos", Refused(NOT_LINUX)),
    (
        "vm",
        Refused("a pod's VM is described by podhull's configuration"),
    ),
    ("uidMappings", Refused(IDS)),
    ("gidMappings", Refused(IDS)),
];

#[cfg(test)]
mod tests;
