// SPDX-License-Identifier: Apache-2.0
//! What a container sees of itself: what it writes is compared with what it writes
//! with runc.

use std::time::Duration;

use anyhow::{Result, ensure};
use podhull_testkit::cri::ContainerBuilder;
use podhull_testkit::cri::api::{Int64Value, SecurityProfile, security_profile::ProfileType};

use crate::case::cases;
use crate::compare::see;
use crate::context::Context;

cases! {
    ALL_TWICE:
        view_of_rights_is_that_of_runc,
        view_of_mounts_is_that_of_runc,
        view_of_devices_is_that_of_runc,
        view_of_names_and_environment_is_that_of_runc,
        view_of_limits_and_signals_is_that_of_runc,
        view_of_the_network_is_that_of_runc,
        view_of_a_terminal_is_that_of_runc;
}

/// For a container to start and write.
const WITHIN: Duration = Duration::from_secs(60);

/// What `script` writes in a container's init, and in an exec beside it.
async fn look(builder: ContainerBuilder, what: &str, script: &str) -> Result<()> {
    const END: &str = "-end-of-the-view-";
    let both = format!("{script}\necho {END}\nexec sleep 1000000");
    let container = builder.shell(&both).start().await?;
    let log = container.wrote(END, WITHIN).await?;
    let text = log.text();
    let init = text.split(END).next().unwrap_or_default().trim();
    ensure!(
        !init.is_empty(),
        "{what}: nothing was written: {}",
        log.error_text()
    );
    see(&format!("{what}, init"), init);
    let exec = container.shell(script).await?;
    see(
        &format!("{what}, exec"),
        &format!("{}{}", exec.text(), exec.error_text()),
    );
    Ok(())
}

async fn view_of_rights_is_that_of_runc(t: &Context) -> Result<()> {
    const RIGHTS: &str =
        "grep -E '^(Uid|Gid|Groups|Umask|Cap[A-Za-z]*|NoNewPrivs|Seccomp):' /proc/self/status";
    let pod = t.ready_pod().await?;
    look(t.container(&pod, "default"), "default", RIGHTS).await?;
    let some = |value| Some(Int64Value { value });
    let user = t.container(&pod, "user").security(|security| {
        security.run_as_user = some(1000);
        security.run_as_group = some(3000);
        security.supplemental_groups = vec![4000];
        security.no_new_privs = true;
        security.seccomp = Some(SecurityProfile::default());
    });
    look(user, "a user under the default filter", RIGHTS).await?;
    let unconfined = t.container(&pod, "unconfined").security(|security| {
        security.seccomp = Some(SecurityProfile {
            profile_type: ProfileType::Unconfined.into(),
            ..SecurityProfile::default()
        });
        let capabilities = security.capabilities.get_or_insert_default();
        capabilities.add_capabilities = vec!["NET_ADMIN".into()];
        capabilities.drop_capabilities = vec!["CHOWN".into()];
    });
    look(unconfined, "unconfined with other capabilities", RIGHTS).await
}

async fn view_of_mounts_is_that_of_runc(t: &Context) -> Result<()> {
    // Where, and how it may be used; of the root and of volumes not which file system.
    const MOUNTS: &str = "sort -k2,2 /proc/mounts | while read source at kind options rest; do \
         case $at in /sys/fs/cgroup*) continue;; esac; \
         case $kind in proc|sysfs|tmpfs|devpts|mqueue) ;; *) kind=files;; esac; \
         flags=$(echo $options | tr , '\\n' | grep -xE 'ro|rw|nosuid|nodev|noexec' | tr '\\n' ' '); \
         echo $at $kind $flags; done";
    let volume = t.new_folder("volume")?;
    let file = t.new_file("file", "x")?;
    let pod = t.ready_pod().await?;
    let builder = t
        .container(&pod, "main")
        .mount(&volume, "/volume", false)
        .mount(&volume, "/read-only", true)
        .mount(&file, "/etc/one-file", true);
    look(builder, "mounts", MOUNTS).await?;
    let modes = "cd /; stat -c '%n %a %u:%g %F' / /dev /dev/shm /dev/pts /proc /sys /tmp \
                 /etc/hosts /etc/hostname /etc/resolv.conf /volume /etc/one-file 2>&1";
    let builder = t
        .container(&pod, "modes")
        .mount(&volume, "/volume", false)
        .mount(&file, "/etc/one-file", true);
    look(builder, "modes", modes).await
}

async fn view_of_devices_is_that_of_runc(t: &Context) -> Result<()> {
    // Name, type, owner, and numbers or target; the date is not asked for.
    const DEVICES: &str = "cd /dev; for f in *; do \
         [ -L $f ] && echo \"$f -> $(readlink $f)\" || stat -c '%n %A %u:%g %t:%T' $f; done";
    let pod = t.ready_pod().await?;
    look(t.container(&pod, "main"), "devices", DEVICES).await?;
    let masked = "for f in /proc/kcore /proc/keys /proc/timer_list /proc/sys \
         /sys/firmware; do [ -e $f ] && echo $f $(wc -c <$f 2>&1 | tail -1) \
         $(touch $f 2>&1 | sed 's/.*: //'); done; true";
    look(t.container(&pod, "masked"), "masked", masked).await
}

async fn view_of_names_and_environment_is_that_of_runc(t: &Context) -> Result<()> {
    let pod = t
        .pod("web-0")
        .edit(|config| config.hostname = "web-0".into())
        .run()
        .await?;
    let builder = t.container(&pod, "main").env("GREETING", "good day");
    // $_ and what the shell adds of its own are the same with both.
    look(
        builder,
        "environment",
        "env | sort; pwd; hostname; cat /proc/1/comm; id",
    )
    .await?;
    let user = t.container(&pod, "user").security(|security| {
        security.run_as_username = "alice".into();
    });
    look(
        user,
        "environment of a user",
        "env | sort; pwd; id; stat -c %u:%g /proc/self/fd/1",
    )
    .await?;
    let tree = "cut -d' ' -f2,4,7,8 /proc/1/stat; set -- $(cat /proc/$$/stat); echo $2 $4 $7 $8 $(($1 - $5)) $(($1 - $6)); cat /proc/self/oom_score_adj";
    look(t.container(&pod, "tree"), "processes", tree).await
}

async fn view_of_limits_and_signals_is_that_of_runc(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    // Without 32 and above, which libraries keep for themselves.
    let signals = "grep -E '^Sig(Blk|Ign)' /proc/$$/status | while read name mask; do \
         printf '%s %x\\n' $name $((0x$mask & 0x7fffffff)); done";
    look(t.container(&pod, "signals"), "signals", signals).await?;
    // The others follow the machine, or whoever started containerd.
    let limits = "grep -E 'cpu time|file size|address space|file locks' /proc/self/limits";
    look(t.container(&pod, "limits"), "limits", limits).await
}

async fn view_of_the_network_is_that_of_runc(t: &Context) -> Result<()> {
    const NETWORK: &str = "for l in $(ls /sys/class/net | sort); do echo $l \
         $(cat /sys/class/net/$l/mtu) $(cat /sys/class/net/$l/flags); done; \
         ip -4 route | sort; ip -6 route | grep -vE '^(multicast|fe80)' | sed 's/ expires.*//' | sort; \
         ip -o -4 addr | awk '{print $2, $4}'; ip -o -6 addr | grep -v fe80 | awk '{print $2, $4}'";
    let pod = t.ready_pod().await?;
    look(t.container(&pod, "main"), "network", NETWORK).await?;
    let sysctls = "cd /proc/sys/net/ipv4; for f in ip_unprivileged_port_start ping_group_range \
         ip_local_port_range; do echo $f $(cat $f); done; cat /proc/sys/net/core/somaxconn";
    look(t.container(&pod, "sysctls"), "sysctls", sysctls).await
}

async fn view_of_a_terminal_is_that_of_runc(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let builder = t
        .container(&pod, "main")
        .edit(|config| config.tty = true)
        .shell("tty; env | grep TERM; stty -a | tr ';' '\\n' | grep -vE 'rows|columns|speed' | sort; echo end-; exec sleep 1000000");
    let container = builder.start().await?;
    let log = container.wrote("end-", WITHIN).await?;
    see("terminal", &log.text());
    Ok(())
}
