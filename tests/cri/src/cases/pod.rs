// SPDX-License-Identifier: Apache-2.0
//! What containers find in their pod.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use podhull_testkit::cri::api::{DnsConfig, Int64Value, NamespaceMode};
use podhull_testkit::cri::{Container, Pod};

use crate::case::{cases, contains, same};
use crate::compare::see;
use crate::context::{Context, text_of};
use crate::probe::{PROBE, with_probe};

cases! {
    ALL_TWICE:
        pod_hostname_and_its_files_are_set,
        pod_dns_settings_are_in_resolv_conf,
        pod_shared_memory_is_shared_and_limited,
        pod_shared_pid_namespace_shows_its_containers,
        pod_target_pid_namespace_shows_the_target,
        pod_sysctls_are_set,
        pod_hostname_may_be_fully_qualified,
        pod_init_containers_run_before_the_others,
        pod_sidecar_runs_beside_and_is_started_again,
        pod_ephemeral_container_looks_into_its_target;
    ALL_24:
        pod_resources_are_updated_as_by_runc;
}

/// For a container to end.
const WITHIN: Duration = Duration::from_secs(30);

async fn pod_hostname_and_its_files_are_set(t: &Context) -> Result<()> {
    let pod = t
        .pod("web-0")
        .edit(|config| config.hostname = "web-0".into())
        .run()
        .await?;
    let script = "hostname; uname -n; cat /etc/hostname; echo $HOSTNAME; \
        echo 10.0.0.9 other >>/etc/hosts; cat /etc/hosts";
    let text = text_of(t.container(&pod, "main"), script).await?;
    let lines: Vec<_> = text.lines().collect();
    same!(lines[..4], ["web-0"; 4]);
    contains!(
        lines[4..].join("\n"),
        "127.0.0.1",
        "localhost",
        "10.0.0.9 other"
    );
    Ok(())
}

async fn pod_dns_settings_are_in_resolv_conf(t: &Context) -> Result<()> {
    let dns = DnsConfig {
        servers: vec!["10.96.0.10".into(), "fd00::10".into()],
        searches: vec!["default.svc.cluster.local".into(), "cluster.local".into()],
        options: vec!["ndots:5".into()],
    };
    let pod = t
        .pod("pod")
        .edit(|config| config.dns_config = Some(dns))
        .run()
        .await?;
    let text = text_of(t.container(&pod, "main"), "cat /etc/resolv.conf").await?;
    let lines: Vec<_> = text.lines().collect();
    same!(
        lines,
        [
            "search default.svc.cluster.local cluster.local",
            "nameserver 10.96.0.10",
            "nameserver fd00::10",
            "options ndots:5"
        ]
    );
    Ok(())
}

async fn pod_shared_memory_is_shared_and_limited(t: &Context) -> Result<()> {
    let (pod, one) = t.idle().await?;
    let two = t.container(&pod, "two").idle().start().await?;
    one.shell("echo hello >/dev/shm/note").await?.success()?;
    same!(
        two.shell("cat /dev/shm/note").await?.success()?.text(),
        "hello"
    );
    let kind = two
        .shell("grep ' /dev/shm ' /proc/mounts | cut -d' ' -f3")
        .await?;
    same!(kind.text(), "tmpfs");
    let size = two
        .shell("df -k /dev/shm | tail -1 | awk '{print $2}'")
        .await?;
    same!(size.text(), "65536", "KiB in /dev/shm");
    Ok(())
}

/// A container that sleeps for a time that tells it apart.
async fn sleeper(
    t: &Context,
    pod: &Pod,
    name: &str,
    seconds: &str,
    mode: NamespaceMode,
    target: &str,
) -> Result<Container> {
    t.container(pod, name)
        .shell(&format!("sleep {seconds} & wait"))
        .security(|security| {
            let options = security.namespace_options.get_or_insert_default();
            options.set_pid(mode);
            options.target_id = target.into();
        })
        .start()
        .await
}

async fn processes(container: &Container) -> Result<String> {
    Ok(container
        .exec(["ps", "-o", "pid,args"])
        .await?
        .success()?
        .text())
}

async fn pod_shared_pid_namespace_shows_its_containers(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let own = sleeper(t, &pod, "own", "1111", NamespaceMode::Container, "").await?;
    let one = sleeper(t, &pod, "one", "2222", NamespaceMode::Pod, "").await?;
    let two = sleeper(t, &pod, "two", "3333", NamespaceMode::Pod, "").await?;
    for container in [&one, &two] {
        let text = processes(container).await?;
        contains!(&text, "sleep 2222", "sleep 3333");
        ensure!(
            !text.contains("sleep 1111"),
            "not of the pod's namespace: {text}"
        );
        let first = container.exec(["cat", "/proc/1/cmdline"]).await?.text();
        ensure!(
            !first.contains("sleep 2222"),
            "the container's process is PID 1: {first}"
        );
    }
    let text = processes(&own).await?;
    contains!(&text, "sleep 1111");
    ensure!(
        !text.contains("sleep 2222"),
        "not of its own namespace: {text}"
    );
    contains!(
        own.exec(["cat", "/proc/1/cmdline"]).await?.text(),
        "sleep 1111"
    );
    // The end of one container is not the end of the namespace.
    one.stop(0).await?;
    contains!(processes(&two).await?, "sleep 3333");
    Ok(())
}

async fn pod_target_pid_namespace_shows_the_target(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let target = sleeper(t, &pod, "target", "1111", NamespaceMode::Container, "").await?;
    let debug = sleeper(t, &pod, "debug", "2222", NamespaceMode::Target, target.id()).await?;
    for container in [&target, &debug] {
        contains!(processes(container).await?, "sleep 1111", "sleep 2222");
    }
    debug.stop(0).await?;
    debug.remove().await?;
    contains!(processes(&target).await?, "sleep 1111");
    Ok(())
}

async fn pod_sysctls_are_set(t: &Context) -> Result<()> {
    let pod = t
        .pod("pod")
        .linux(|linux| {
            for (key, value) in [
                ("net.ipv4.ip_unprivileged_port_start", "81"),
                ("kernel.shm_rmid_forced", "1"),
            ] {
                linux.sysctls.insert(key.into(), value.into());
            }
        })
        .run()
        .await?;
    let container = t.container(&pod, "main").idle().security(|security| {
        security.run_as_user = Some(Int64Value { value: 1000 });
        let capabilities = security.capabilities.get_or_insert_default();
        capabilities.drop_capabilities = vec!["ALL".into()];
    });
    let container = with_probe(t, container).await?.start().await?;
    let value = container
        .exec(["cat", "/proc/sys/kernel/shm_rmid_forced"])
        .await?;
    same!(value.text(), "1");
    for (port, result) in [("80", "EACCES"), ("81", "ok")] {
        let output = container
            .exec([PROBE, "bind", port])
            .await
            .context("bind")?;
        same!(output.text(), result, "bind to port {port}");
    }
    Ok(())
}

/// As with `setHostnameAsFQDN`; at most 64 characters, which is the kernel's limit.
async fn pod_hostname_may_be_fully_qualified(t: &Context) -> Result<()> {
    let short = "web-0.database.production.svc.cluster.local";
    let longest = format!("{}.{}", "h".repeat(45), "default.svc.cluster");
    same!(longest.len(), 65);
    for name in [short, &longest[1..]] {
        let pod = t.pod("pod").edit(|config| config.hostname = name.into());
        let pod = pod.run().await?;
        let script = "hostname; cat /proc/sys/kernel/hostname; cat /etc/hostname; echo $HOSTNAME";
        let text = text_of(t.container(&pod, "main"), script).await?;
        same!(text.lines().collect::<Vec<_>>(), [name; 4]);
        pod.remove().await?;
    }
    Ok(())
}

/// The kubelet starts each once the one before has ended with success.
async fn pod_init_containers_run_before_the_others(t: &Context) -> Result<()> {
    let folder = t.new_folder("shared")?;
    let pod = t.ready_pod().await?;
    for (name, script, code) in [
        ("first", "echo one >/shared/file; hostname >/etc/mine", 0),
        ("fails", "echo lost >>/shared/other; exit 4", 4),
        ("second", "[ ! -e /etc/mine ] && echo two >>/shared/file", 0),
    ] {
        let builder = t.container(&pod, name).mount(&folder, "/shared", false);
        let (_, status) = builder.shell(script).run().await?;
        same!(status.exit_code, code, "{name}");
    }
    let main = t.container(&pod, "main").mount(&folder, "/shared", true);
    let main = main.idle().start().await?;
    let seen = main.shell("cat /shared/file /shared/other").await?;
    same!(seen.success()?.text(), "one\ntwo\nlost");
    Ok(())
}

/// An init container with `restartPolicy: Always`.
async fn pod_sidecar_runs_beside_and_is_started_again(t: &Context) -> Result<()> {
    const SERVER: &str = "echo served >/tmp/index.html; \
        exec httpd -f -p 127.0.0.1:8080 -h /tmp";
    let pod = t.ready_pod().await?;
    let sidecar = t.container(&pod, "sidecar").shell(SERVER).start().await?;
    let main = t.container(&pod, "main").idle().start().await?;
    let ask = "until wget -qO- http://127.0.0.1:8080; do sleep 0.1; done";
    same!(main.shell(ask).await?.success()?.text(), "served");
    sidecar.stop(0).await?;
    let refused = main.shell("wget -qO- http://127.0.0.1:8080 2>&1").await?;
    contains!(refused.text(), "refused");
    let again = t.container(&pod, "sidecar").attempt(1).shell(SERVER);
    again.start().await?;
    same!(main.shell(ask).await?.success()?.text(), "served");
    sidecar.remove().await?;
    same!(main.shell(ask).await?.success()?.text(), "served");
    Ok(())
}

/// `kubectl debug --target`: added to a pod that runs, it sees and signals the
/// target's processes and reads its files.
async fn pod_ephemeral_container_looks_into_its_target(t: &Context) -> Result<()> {
    let (pod, target) = t.idle().await?;
    target.shell("echo mine >/tmp/note").await?.success()?;
    let debug = t.container(&pod, "debugger").idle().security(|security| {
        let options = security.namespace_options.get_or_insert_default();
        options.set_pid(NamespaceMode::Target);
        options.target_id = target.id().into();
        let capabilities = security.capabilities.get_or_insert_default();
        capabilities.add_capabilities = vec!["SYS_PTRACE".into()];
    });
    let debug = debug.start().await?;
    let seen = debug.shell("cat /proc/1/root/tmp/note; tr '\\0' ' ' </proc/1/cmdline");
    contains!(seen.await?.success()?.text(), "mine", "sleep 1000000");
    same!(debug.shell("ls /tmp").await?.text(), "", "its own files");
    // PID 1 of the namespace is the target's: its end is everybody's.
    debug.shell("kill -TERM 1").await?;
    same!(target.exited(WITHIN).await?.exit_code, 0);
    debug.exited(WITHIN).await?;
    ensure!(pod.is_ready().await?, "the pod ended");
    Ok(())
}

/// What the kubelet asks for when it has resized a pod in place.
async fn pod_resources_are_updated_as_by_runc(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let answer = match t.client().update_pod(pod.id()).await {
        Ok(()) => "accepted".to_owned(),
        Err(status) => format!("{:?}", status.code()),
    };
    see("UpdatePodSandboxResources", &answer);
    ensure!(pod.is_ready().await?, "the pod ended");
    container.exec(["true"]).await?.success().map(drop)
}
