// SPDX-License-Identifier: Apache-2.0
//! What a container may not do.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use podhull_testkit::cri::ContainerBuilder;
use podhull_testkit::cri::api::{Int64Value, SecurityProfile, security_profile::ProfileType};

use crate::case::{cases, contains, same};
use crate::context::{Context, text_of};
use crate::probe::{PROBE, with_probe};
use crate::procfs;

cases! {
    ALL_TWICE:
        security_read_only_root_cannot_be_written,
        security_capabilities_are_added_and_dropped,
        security_no_new_privileges_is_set_on_demand,
        security_seccomp_profiles_are_applied,
        security_masked_and_read_only_paths_are_closed,
        security_setuid_program_gains_its_owners_rights,
        security_devices_of_the_machine_cannot_be_opened,
        security_seccomp_profile_of_the_node_is_applied,
        security_paths_are_masked_and_read_only_as_asked;
    PODHULL_TWICE:
        security_privileged_container_owns_the_guest_only,
        security_sockets_to_the_host_are_refused_to_everyone;
}

/// What containerd gives by default.
const DEFAULT_CAPABILITIES: u64 = 0xa804_25fb;
const MKNOD: u64 = 1 << 27;
const SYS_PTRACE: u64 = 1 << 19;

/// A field of /proc/self/status in the container that `builder` makes.
async fn status_field(builder: ContainerBuilder, field: &str) -> Result<String> {
    let script = format!("grep '^{field}:' /proc/self/status");
    let line = text_of(builder, &script).await?;
    Ok(line
        .split_whitespace()
        .nth(1)
        .unwrap_or_default()
        .to_owned())
}

async fn security_read_only_root_cannot_be_written(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let folder = t.new_folder("data")?;
    let container = t
        .container(&pod, "main")
        .idle()
        .mount(&folder, "/data", false)
        .security(|security| security.readonly_rootfs = true)
        .start()
        .await?;
    for path in ["/x", "/tmp/x", "/etc/passwd"] {
        let output = container.shell(&format!("echo >{path}")).await?;
        ensure!(output.code != 0, "{path} can be written");
        contains!(output.error_text(), "Read-only file system");
    }
    for path in ["/data/x", "/dev/shm/x"] {
        container.shell(&format!("echo >{path}")).await?.success()?;
    }
    Ok(())
}

async fn security_capabilities_are_added_and_dropped(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let sets = "CapEff";
    let of = async |name: &str, add: &[&str], drop: &[&str]| -> Result<u64> {
        let builder = t.container(&pod, name).security(|security| {
            let capabilities = security.capabilities.get_or_insert_default();
            capabilities.add_capabilities = add.iter().map(|&name| name.into()).collect();
            capabilities.drop_capabilities = drop.iter().map(|&name| name.into()).collect();
        });
        let hex = status_field(builder, sets).await?;
        u64::from_str_radix(&hex, 16).context(hex)
    };
    same!(of("default", &[], &[]).await?, DEFAULT_CAPABILITIES);
    same!(of("none", &[], &["ALL"]).await?, 0);
    same!(
        of("changed", &["SYS_PTRACE"], &["MKNOD"]).await?,
        DEFAULT_CAPABILITIES & !MKNOD | SYS_PTRACE
    );
    same!(of("one", &["SYS_PTRACE"], &["ALL"]).await?, SYS_PTRACE);
    // Another user's are in the bounding set only.
    let user = t.container(&pod, "user").security(|security| {
        security.run_as_user = Some(Int64Value { value: 1000 });
    });
    let text = text_of(user, "grep -E '^Cap(Eff|Bnd)' /proc/self/status").await?;
    contains!(
        &text,
        "CapEff:\t0000000000000000",
        "CapBnd:\t00000000a80425fb"
    );
    Ok(())
}

async fn security_no_new_privileges_is_set_on_demand(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    same!(
        status_field(t.container(&pod, "without"), "NoNewPrivs").await?,
        "0"
    );
    let with = t
        .container(&pod, "with")
        .security(|security| security.no_new_privs = true);
    same!(status_field(with, "NoNewPrivs").await?, "1");
    Ok(())
}

async fn security_setuid_program_gains_its_owners_rights(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let run = "su alice -c '/home/mine uid -'";
    let script = format!("cp {PROBE} /home/mine; {run}; chmod 4755 /home/mine; {run}");
    let container = with_probe(t, t.container(&pod, "main")).await?;
    same!(text_of(container, &script).await?, "1000 1000\n1000 0");
    Ok(())
}

async fn security_seccomp_profiles_are_applied(t: &Context) -> Result<()> {
    // ADDR_NO_RANDOMIZE is not among the personalities of the default profile.
    const PERSONALITY: [&str; 3] = [PROBE, "personality", "0x0040000"];
    let pod = t.ready_pod().await?;
    let with = |name: &str, profile: ProfileType| {
        t.container(&pod, name).idle().security(|security| {
            security.seccomp = Some(SecurityProfile {
                profile_type: profile.into(),
                localhost_ref: String::new(),
            });
        })
    };
    let default = with_probe(t, with("default", ProfileType::RuntimeDefault))
        .await?
        .start()
        .await?;
    let open = with_probe(t, with("unconfined", ProfileType::Unconfined))
        .await?
        .start()
        .await?;
    same!(open.exec(PERSONALITY).await?.text(), "ok", "unconfined");
    same!(
        default.exec(PERSONALITY).await?.text(),
        "EPERM",
        "RuntimeDefault"
    );
    contains!(
        default.exec(["cat", "/proc/self/status"]).await?.text(),
        "Seccomp:\t2"
    );
    let init = default
        .exec(["grep", "^Seccomp", "/proc/1/status"])
        .await?
        .text();
    contains!(init, "Seccomp:\t2");
    Ok(())
}

/// What `localhostProfile` names: a file of the node, by its path.
async fn security_seccomp_profile_of_the_node_is_applied(t: &Context) -> Result<()> {
    let profile = t.new_file(
        "profile.json",
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]}"#,
    )?;
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .shell("mkdir /tmp/by-init; echo done; sleep 1000000")
        .security(|security| {
            security.seccomp = Some(SecurityProfile {
                profile_type: ProfileType::Localhost.into(),
                localhost_ref: profile,
            });
        })
        .start()
        .await?;
    let log = container.wrote("done", Duration::from_secs(20)).await?;
    contains!(log.error_text(), "Function not implemented");
    let exec = container
        .shell("touch /tmp/file && mkdir /tmp/by-exec")
        .await?;
    ensure!(exec.code != 0, "the filter lets an exec through");
    contains!(exec.error_text(), "Function not implemented");
    same!(container.shell("ls /tmp").await?.text(), "file");
    Ok(())
}

async fn security_paths_are_masked_and_read_only_as_asked(t: &Context) -> Result<()> {
    let volume = t.new_folder("volume")?;
    t.new_file("volume/file", "secret")?;
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .mount(&volume, "/volume", false)
        .security(|security| {
            security.masked_paths = ["/etc/passwd", "/home", "/volume/file", "/not/there"]
                .map(str::to_owned)
                .into();
            security.readonly_paths = ["/tmp", "/var/not/there"].map(str::to_owned).into();
        })
        .start()
        .await?;
    for (script, output) in [
        ("wc -c </etc/passwd", "0"),
        ("ls /home | wc -l", "0"),
        ("wc -c </volume/file", "0"),
        (
            "touch /home/x 2>&1 | sed 's/.*: //'",
            "Read-only file system",
        ),
        (
            "touch /tmp/x 2>&1 | sed 's/.*: //'",
            "Read-only file system",
        ),
        ("touch /var/x && echo free", "free"),
        // What is asked for takes the place of the kubelet's list.
        ("wc -c </proc/keys | grep -qx 0 || echo open", "open"),
    ] {
        same!(container.shell(script).await?.text(), output, "{script}");
    }
    same!(fs::read_to_string(t.path("volume/file"))?, "secret");
    Ok(())
}

async fn security_masked_and_read_only_paths_are_closed(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    for path in [
        "/proc/kcore",
        "/proc/keys",
        "/proc/timer_list",
        "/proc/latency_stats",
    ] {
        let output = container
            .shell(&format!("head -c 1 {path} 2>/dev/null | wc -c"))
            .await?;
        same!(output.text(), "0", "bytes of {path}");
    }
    same!(
        container.shell("ls /sys/firmware | wc -l").await?.text(),
        "0",
        "/sys/firmware"
    );
    for path in [
        "/proc/sys/kernel/domainname",
        "/proc/sys/net/ipv4/ip_forward",
    ] {
        let output = container.shell(&format!("echo x >{path}")).await?;
        ensure!(output.code != 0, "{path} can be written");
        contains!(output.error_text(), "Read-only file system");
    }
    let script = "cd /sys/fs/cgroup; [ ! -d memory ] || cd memory; mkdir x";
    let output = container.shell(script).await?;
    contains!(output.error_text(), "Read-only file system");
    Ok(())
}

async fn security_devices_of_the_machine_cannot_be_opened(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = with_probe(t, t.container(&pod, "main").idle())
        .await?
        .start()
        .await?;
    // In /dev: a root filesystem may forbid devices altogether.
    for (name, node) in [
        ("mem", "c 1 1"),
        ("kmsg", "c 1 11"),
        ("disk", "b 8 0"),
        ("loop", "b 7 0"),
    ] {
        container
            .shell(&format!("mknod /dev/{name} {node}"))
            .await?
            .success()?;
        let output = container
            .exec([PROBE, "open", &format!("/dev/{name}")])
            .await?;
        same!(output.text(), "EPERM", "open of a node {node}");
    }
    for device in ["null", "zero", "full", "random", "urandom", "tty"] {
        let output = container
            .exec([PROBE, "open", &format!("/dev/{device}")])
            .await?;
        // There is no controlling terminal.
        let expected = if device == "tty" { "ENXIO" } else { "ok" };
        same!(output.text(), expected, "open of /dev/{device}");
    }
    // A node that is allowed works by any name.
    container
        .shell("mknod /dev/other c 1 3; echo x >/dev/other")
        .await?
        .success()?;
    Ok(())
}

async fn security_privileged_container_owns_the_guest_only(t: &Context) -> Result<()> {
    let privileged = |context: &mut podhull_testkit::cri::api::LinuxPodSandboxConfig| {
        context.security_context.get_or_insert_default().privileged = true;
    };
    let pod = t.pod("pod").linux(privileged).run().await?;
    let container = pod
        .container("main")
        .idle()
        .security(|security| security.privileged = true);
    let container = with_probe(t, container).await?.start().await?;
    // containerd gives what it has itself.
    let containerd = t
        .containerd()
        .await
        .pid()
        .context("containerd does not run")?;
    let all = procfs::status(containerd, "CapEff")?;
    let status = container.exec(["cat", "/proc/self/status"]).await?.text();
    contains!(&status, &format!("CapEff:\t{all}"), "NoNewPrivs:\t0");
    container
        .shell("echo x >/proc/sys/kernel/domainname")
        .await?
        .success()?;
    ensure!(
        fs::read_to_string("/proc/sys/kernel/domainname")?.trim() != "x",
        "the host's domain name was changed"
    );
    // The guest's devices are there, and may be used.
    for device in ["/dev/net/tun", "/dev/fuse", "/dev/kmsg"] {
        let output = container.exec([PROBE, "open", device]).await?;
        same!(output.text(), "ok", "open of {device}");
    }
    contains!(
        container.shell("dmesg | head -50").await?.success()?.text(),
        "Linux version"
    );
    let tap = "tunctl -t tap7 && ip link show tap7 && tunctl -d tap7";
    contains!(container.shell(tap).await?.success()?.text(), "tap7: ");
    // None of the host's disks is there, nor can be reached by its number.
    let mut disks = 0;
    for entry in fs::read_dir("/sys/class/block")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let there = container.shell(&format!("test -e /dev/{name}")).await?.code == 0;
        ensure!(!there, "the host's {name} is in the guest");
        disks += 1;
    }
    let known = container
        .shell("cat /proc/partitions | tail -n +3 | wc -l")
        .await?;
    same!(
        known.text(),
        "0",
        "block devices in the guest ({disks} on the host)"
    );
    let kvm = container.exec([PROBE, "open", "/dev/kvm"]).await?.text();
    same!(kvm, "ENOENT", "/dev/kvm");
    Ok(())
}

async fn security_sockets_to_the_host_are_refused_to_everyone(t: &Context) -> Result<()> {
    const VSOCK: &str = "40";
    const ALG: &str = "38";
    let privileged = |context: &mut podhull_testkit::cri::api::LinuxPodSandboxConfig| {
        context.security_context.get_or_insert_default().privileged = true;
    };
    let pod = t.pod("pod").linux(privileged).run().await?;
    let plain = with_probe(t, t.container(&pod, "plain").idle())
        .await?
        .start()
        .await?;
    let mighty = pod
        .container("mighty")
        .idle()
        .security(|security| security.privileged = true);
    let mighty = with_probe(t, mighty).await?.start().await?;
    for container in [&plain, &mighty] {
        for family in [VSOCK, ALG] {
            let text = container.exec([PROBE, "socket", family]).await?.text();
            ensure!(
                text == "EPERM" || text == "EAFNOSUPPORT",
                "socket({family}) gave {text}"
            );
        }
        same!(
            container.exec([PROBE, "socket", "2"]).await?.text(),
            "ok",
            "socket(AF_INET)"
        );
    }
    let init = plain
        .exec(["grep", "^Seccomp:", "/proc/1/status"])
        .await?
        .text();
    contains!(init, "2");
    Ok(())
}
