// SPDX-License-Identifier: Apache-2.0
//! Pods with a user namespace (`hostUsers: false`).

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use podhull_testkit::Release;
use podhull_testkit::cri::api::{
    IdMapping, Int64Value, NamespaceMode, NamespaceOption, UserNamespace,
};
use podhull_testkit::cri::{ContainerBuilder, Pod, PodBuilder};
use podhull_testkit::oracle::assert_clean;

use super::network::get;
use super::restart::restart;
use crate::case::{cases, contains, same};
use crate::context::{Context, refusal, text_of};
use crate::peer::{Spdy, WebSocket, echoes, serve};
use crate::stream::Session;

cases! {
    ALL_24:
        userns_ids_are_mapped_and_files_have_their_owners,
        userns_root_is_not_the_machines,
        userns_exec_is_in_the_namespace,
        userns_containers_share_their_pods_namespaces;
    // Debian's runc 1.1 cannot map owners of what is mounted.
    PODHULL_24:
        userns_volume_owners_are_the_same_inside_and_outside,
        userns_volume_that_cannot_show_owners_is_named,
        userns_network_is_the_pods,
        userns_ports_are_forwarded,
        userns_pod_goes_on_over_a_restart_and_leaves_nothing,
        userns_that_cannot_be_is_refused_by_name;
    PAUSE_1:
        userns_on_containerd_1_is_refused_or_unknown;
}

const WITHIN: Duration = Duration::from_secs(20);
const HOST: u32 = 100_000;
const SIZE: u32 = 65_536;

fn mapping(container_id: u32, host_id: u32, length: u32) -> Vec<IdMapping> {
    vec![IdMapping {
        host_id,
        container_id,
        length,
    }]
}

fn users() -> Vec<IdMapping> {
    mapping(0, HOST, SIZE)
}

fn in_namespace(options: &mut NamespaceOption) {
    options.userns_options = Some(UserNamespace {
        mode: NamespaceMode::Pod.into(),
        uids: users(),
        gids: users(),
    });
}

/// A pod to be whose root is the host's user 100000.
fn pod(t: &Context, name: &str) -> PodBuilder {
    t.pod(name).namespaces(in_namespace)
}

/// A container to be without a mapped mount: containerd's own files are such.
fn unmapped(t: &Context, pod: &Pod, name: &str) -> Result<ContainerBuilder> {
    let mut builder = t.container(pod, name);
    for file in ["hosts", "hostname", "resolv.conf"] {
        let host = t.new_file(file, "127.0.0.1 localhost\n")?;
        builder = builder.mount(&host, &format!("/etc/{file}"), true);
    }
    Ok(builder)
}

/// A volume whose owners are to be those of the pod, as the kubelet asks for it.
fn volume(builder: ContainerBuilder, host: &str, container: &str) -> ContainerBuilder {
    builder.mount(host, container, false).edit(|config| {
        if let Some(mount) = config.mounts.last_mut() {
            (mount.uid_mappings, mount.gid_mappings) = (users(), users());
        }
    })
}

async fn userns_ids_are_mapped_and_files_have_their_owners(t: &Context) -> Result<()> {
    let pod = pod(t, "pod").run().await?;
    // Who is mapped, whose an image's files are, and those made here: in the image's
    // folders, in one of another user, in shared memory and through a descriptor.
    let script = "tr -s ' ' </proc/self/uid_map; tr -s ' ' </proc/self/gid_map; id; hostname; \
        stat -c '%u %g %n' / /bin/busybox /etc/passwd /proc/self/ /dev/pts; \
        mkdir /made; chown 1000:1000 /made; echo text >/made/file; chown 7:8 /made/file; \
        echo x >/dev/shm/x; cat /made/file; stat -c '%u %g %n' /made /made/file /dev/shm/x; \
        echo through >/dev/stdout; cat /dev/null; head -c 1 /dev/zero | wc -c; \
        chown 70000 /made/file 2>&1; grep CapEff /proc/self/status; ls /sys/fs/cgroup >/dev/null";
    let text = text_of(unmapped(t, &pod, "main")?, script).await?;
    contains!(
        &text,
        "0 100000 65536\n 0 100000 65536\nuid=0",
        "0 0 /\n",
        "0 0 /bin/busybox",
        "0 0 /proc/self/\n",
        "1000 1000 /made\n",
        "7 8 /made/file",
        "0 0 /dev/shm/x",
        "through\n1\n",
        "Invalid argument",
        "00000000a80425fb"
    );
    let user = unmapped(t, &pod, "user")?.security(|security| {
        security.run_as_user = Some(Int64Value { value: 1000 });
        security.supplemental_groups = vec![5000];
    });
    let script = "id; umask 027; echo x >/tmp/mine; stat -c '%u %g %a' /tmp/mine; \
        echo through >/dev/stdout; cat /root/x 2>&1; ls /proc/1/fd | head -1";
    let text = text_of(user, script).await?;
    contains!(&text, "uid=1000", "5000", "1000 1000 640", "through");
    Ok(())
}

/// Even with all capabilities that containerd knows.
async fn userns_root_is_not_the_machines(t: &Context) -> Result<()> {
    let pod = pod(t, "pod").run().await?;
    let builder = unmapped(t, &pod, "main")?.security(|security| {
        let capabilities = security.capabilities.get_or_insert_default();
        capabilities.add_capabilities = vec!["ALL".into()];
        security.readonly_paths.clear();
        security.masked_paths.clear();
    });
    // What is the pod's own, root may change; the machine's it may not. Nothing here
    // does harm where it is allowed, which with runc is on the node.
    let script = "mkdir /m; for try in 'echo 1 >/proc/sys/vm/drop_caches' \
        'mknod /tmp/null c 1 3' 'dmesg -n 7' 'mount -t debugfs x /m' 'nice -n -5 true' \
        'mount -t tmpfs m /m && umount /m' 'hostname other' \
        'echo 5000 >/proc/sys/net/core/somaxconn'; do \
        sh -c \"$try\" >/dev/null 2>&1 && echo \"done: $try\" || echo \"refused: $try\"; done";
    let text = text_of(builder, script).await?;
    for refused in ["drop_caches", "mknod", "dmesg", "debugfs"] {
        let line = text.lines().find(|line| line.contains(refused));
        contains!(line.with_context(|| text.clone())?, "refused: ");
    }
    for own in ["tmpfs", "hostname", "somaxconn"] {
        let line = text.lines().find(|line| line.contains(own));
        contains!(line.with_context(|| text.clone())?, "done: ");
    }
    Ok(())
}

async fn userns_exec_is_in_the_namespace(t: &Context) -> Result<()> {
    let pod = pod(t, "pod").run().await?;
    let container = unmapped(t, &pod, "main")?.idle().start().await?;
    container.wrote("up", WITHIN).await?;
    let script = "for kind in user net uts ipc mnt pid cgroup; do \
        [ \"$(readlink /proc/self/ns/$kind)\" = \"$(readlink /proc/1/ns/$kind)\" ] || echo $kind; \
        done; tr -s ' ' </proc/self/uid_map; id -u; hostname; grep CapEff /proc/self/status; \
        echo err >&2; echo through >/dev/stdout; cat /proc/self/oom_score_adj";
    let output = container.shell(script).await?.success()?;
    let text = output.text();
    crate::compare::see("exec", &text);
    same!(output.error_text(), "err");
    ensure!(
        text.starts_with("0 100000 65536\n0\npod\nCapEff:\t00000000a80425fb\nthrough\n"),
        "{text}"
    );
    let made = container.shell("echo x >/x && stat -c %u /x").await?;
    same!(made.success()?.text(), "0");
    let mut terminal = Session::exec(&container, &["sh"], true).await?;
    terminal
        .ask(
            "tty; stat -c %u $(tty); id -u; tr -s ' ' </proc/self/uid_map\n",
            "0 100000 65536",
        )
        .await?;
    let said = String::from_utf8_lossy(&terminal.stdout).into_owned();
    contains!(said, "/dev/pts/");
    terminal.send("exit\n").await?;
    terminal.ended().await
}

async fn userns_containers_share_their_pods_namespaces(t: &Context) -> Result<()> {
    let shared = |name: &str| {
        let pod = pod(t, name);
        pod.namespaces(|options| options.set_pid(NamespaceMode::Pod))
    };
    let pod = shared("pod").run().await?;
    let one = unmapped(t, &pod, "one")?
        .shell("sleep 1111 & wait")
        .start()
        .await?;
    let user = unmapped(t, &pod, "two")?.shell("sleep 2222 & wait");
    let two = user
        .security(|security| security.run_as_user = Some(Int64Value { value: 1000 }))
        .start()
        .await?;
    let own = "for kind in user net uts ipc pid; do readlink /proc/self/ns/$kind; done";
    let namespaces = one.shell(own).await?.success()?.text();
    same!(two.shell(own).await?.success()?.text(), namespaces);
    same!(namespaces.lines().count(), 5);
    for container in [&one, &two] {
        let text = container.exec(["ps", "-o", "user,args"]).await?.text();
        contains!(&text, "sleep 1111", "sleep 2222");
    }
    one.shell("echo hello >/dev/shm/note; chmod 600 /dev/shm/note")
        .await?
        .success()?;
    ensure!(
        two.shell("cat /dev/shm/note").await?.code != 0,
        "another's note"
    );
    // Root of the pod kills others of it; PID 1 of the pod stays.
    let script = "kill -9 1; kill -9 $(ps -o pid,args | \
        awk '$2 == \"sleep\" && $3 == \"2222\" { print $1 }')";
    one.shell(script).await?.success()?;
    two.exited(WITHIN).await?;
    let target = |options: &mut NamespaceOption| {
        options.set_pid(NamespaceMode::Target);
        options.target_id = one.id().into();
    };
    let third = unmapped(t, &pod, "three")?.security(|security| {
        target(security.namespace_options.get_or_insert_default());
    });
    let third = third.idle().start().await?;
    contains!(third.exec(["ps", "-o", "args"]).await?.text(), "sleep 1111");
    same!(third.shell(own).await?.success()?.text(), namespaces);
    Ok(())
}

async fn userns_volume_owners_are_the_same_inside_and_outside(t: &Context) -> Result<()> {
    let folder = t.new_folder("data")?;
    let file = t.new_file("data/file", "x")?;
    chown(&file, Some(1234), Some(2345))?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640))?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777))?;
    let single = t.new_file("single", "one\n")?;
    let pod = pod(t, "pod").run().await?;
    let builder = volume(t.container(&pod, "main").idle(), &folder, "/data");
    let builder = volume(builder, &single, "/etc/single");
    let container = builder.mount(&folder, "/unmapped", false).start().await?;
    let output = container
        .shell("stat -c '%u %g %a' /data /data/file /etc/single")
        .await?;
    same!(output.success()?.text(), "0 0 777\n1234 2345 640\n0 0 644");
    // The files that containerd, or the shim, makes are root's.
    let files = "for file in hosts hostname resolv.conf; do stat -c %u /etc/$file; done; \
        echo 10.0.0.9 other >>/etc/hosts && tail -1 /etc/hosts";
    let output = container.shell(files).await?.success()?;
    same!(output.text(), "0\n0\n0\n10.0.0.9 other");
    let script = "echo root >/data/roots; mkdir /data/sub; echo two >/etc/single; \
        echo x >/data/users; chown 1000:1001 /data/users; rm /data/file";
    container.shell(script).await?.success()?;
    let owner = |name: &str| -> Result<(u32, u32)> {
        let meta = fs::metadata(t.path(name))?;
        Ok((meta.uid(), meta.gid()))
    };
    same!(owner("data/roots")?, (0, 0));
    same!(owner("data/sub")?, (0, 0));
    same!(owner("data/users")?, (1000, 1001));
    same!(fs::read_to_string(&single)?, "two\n");
    ensure!(!fs::exists(&file)?, "the removed file is there");
    // Without a mapping the owners are the host's, none of whom is in the pod.
    let output = container
        .shell("stat -c '%u' /unmapped/roots; echo x >/unmapped/new")
        .await?;
    contains!(output.text(), "65534");
    same!(owner("data/new")?, (HOST, HOST));
    let cwd = volume(t.container(&pod, "cwd"), &folder, "/data")
        .edit(|config| config.working_dir = "/data/deep/below".into());
    same!(
        text_of(cwd, "pwd; stat -c %u .").await?,
        "/data/deep/below\n0"
    );
    same!(owner("data/deep/below")?, (0, 0));
    Ok(())
}

/// A ramfs, which no kernel maps; gone with this.
#[derive(Debug)]
struct Ramfs(String);

impl Drop for Ramfs {
    fn drop(&mut self) {
        // If it stays, the leak oracle tells.
        let _ = umount2(&*self.0, MntFlags::MNT_DETACH);
    }
}

async fn userns_volume_that_cannot_show_owners_is_named(t: &Context) -> Result<()> {
    let folder = t.new_folder("ram")?;
    mount(
        Some("x"),
        &*folder,
        Some("ramfs"),
        MsFlags::empty(),
        None::<&str>,
    )?;
    let ramfs = Ramfs(folder.clone());
    let pod = pod(t, "pod").run().await?;
    let builder = volume(t.container(&pod, "main").idle(), &folder, "/data");
    let text = refusal(builder.start().await, "a ramfs")?;
    contains!(&text, "mounts[/data].uidMappings", &folder, "owners");
    let good = t.container(&pod, "good").idle().start().await?;
    good.exec(["true"]).await?.success()?;
    pod.remove().await?;
    drop(ramfs);
    Ok(())
}

async fn userns_network_is_the_pods(t: &Context) -> Result<()> {
    let pod = pod(t, "pod");
    let pod = pod.linux(|linux| {
        let sysctl = ("net.ipv4.ping_group_range".into(), "0 1000".into());
        linux
            .sysctls
            .extend([sysctl, ("kernel.shm_rmid_forced".into(), "1".into())]);
    });
    let pod = pod.run().await?;
    // A user may listen on a low port.
    let script = "echo served >/tmp/index.html; exec httpd -f -p 80 -h /tmp";
    let web = t.container(&pod, "web").shell(script);
    let web = web
        .security(|security| security.run_as_user = Some(Int64Value { value: 1000 }))
        .start()
        .await?;
    let (v4, v6) = pod.addresses().await?;
    let links = web
        .shell("ip address; ip route; ip -6 route")
        .await?
        .success()?
        .text();
    contains!(
        &links,
        &format!("inet {v4}/16"),
        &format!("inet6 {v6}/64"),
        "inet 127.0.0.1/8",
        "default via"
    );
    same!(links.matches("LOOPBACK,UP").count(), 1, "{links}");
    for address in [&v4, &v6] {
        same!(get(address, 80).await?, "served");
    }
    // The group that may ping is one of the namespace's.
    let script = "wget -qO- http://127.0.0.1; \
        cat /proc/sys/net/ipv4/ping_group_range /proc/sys/kernel/shm_rmid_forced";
    let output = web.shell(script).await?.success()?;
    same!(output.text(), "served\n0\t1000\n1");
    let gateway = podhull_testkit::containerd::SUBNET_V4.1;
    let root = t.container(&pod, "root");
    let text = text_of(root, &format!("ping -c 1 -W 5 {gateway}")).await?;
    contains!(&text, "1 packets received");
    Ok(())
}

async fn userns_ports_are_forwarded(t: &Context) -> Result<()> {
    let pod = pod(t, "pod").run().await?;
    let servers = ["echo=127.0.0.1:8002", "echo=[::1]:8004"];
    serve(t, &pod, "server", &servers).await?;
    for port in [8002, 8004] {
        let spdy = Spdy::forward(t, &pod, port).await?;
        echoes(&mut spdy.connect().await?, b"over SPDY").await?;
        same!(spdy.end().await?, "");
    }
    let mut socket = WebSocket::forward(t, &pod, &[9]).await?;
    let told = socket
        .until(|ports| ports.first().is_some_and(|port| !port.error.is_empty()))
        .await?;
    ensure!(told, "a closed port is open: {socket:?}");
    Ok(())
}

async fn checked(t: &Context, pod: &Pod) -> Result<()> {
    let container = t.container(pod, "later").idle().start().await?;
    let map = container.shell("tr -s ' ' </proc/self/uid_map").await?;
    same!(map.success()?.text(), "0 100000 65536");
    Ok(())
}

async fn userns_pod_goes_on_over_a_restart_and_leaves_nothing(t: &Context) -> Result<()> {
    let folder = t.new_folder("data")?;
    let pod = pod(t, "pod").run().await?;
    let builder = volume(t.container(&pod, "main").idle(), &folder, "/data");
    let container = builder.start().await?;
    restart(t, Signal::SIGKILL).await?;
    ensure!(pod.is_ready().await?, "the pod is no longer Ready");
    container.exec(["true"]).await?.success()?;
    checked(t, &pod).await?;
    container.stop(10).await?;
    same!(container.status().await?.exit_code, 0);
    pod.stop().await?;
    pod.remove().await?;
    assert_clean(&*t.containerd().await, t.before(), Duration::from_secs(10)).await
}

async fn userns_that_cannot_be_is_refused_by_name(t: &Context) -> Result<()> {
    type Change = fn(&mut NamespaceOption);
    // containerd's own words, where it looks at it first.
    let network: &[&str] = &["hostNetwork", "pin user namespace"];
    let changes: [(&[&str], Change); 3] = [
        (network, |options| options.set_network(NamespaceMode::Node)),
        (&["mapping"], |options| {
            let users = options.userns_options.get_or_insert_default();
            users.uids = [users.uids.clone(), mapping(1, 9, 9)].concat();
        }),
        (&["must begin at ID 0"], |options| {
            options.userns_options.get_or_insert_default().gids = mapping(1, HOST, SIZE);
        }),
    ];
    // containerd 2.1 crashes over a pod in the host's network that the shim makes.
    let (release, by_shim) = (t.setup().release, t.setup().shim_is_sandboxer());
    let first = usize::from(release == Release::V2_1 && by_shim);
    for (words, change) in changes.into_iter().skip(first) {
        let result = pod(t, "pod").namespaces(change).run().await;
        let text = refusal(result, words[0])?;
        ensure!(words.iter().any(|words| text.contains(words)), "{text}");
    }
    let pod = pod(t, "pod").run().await?;
    let other = t.container(&pod, "main").idle().security(|security| {
        let options = security.namespace_options.get_or_insert_default();
        options.userns_options.get_or_insert_default().uids = mapping(0, 5 * HOST, SIZE);
    });
    contains!(
        refusal(other.start().await, "other users")?,
        "user namespace config"
    );
    checked(t, &pod).await
}

/// 1.7 leaves it to the runtime to make the network of such a pod; 1.6 knows of none.
async fn userns_on_containerd_1_is_refused_or_unknown(t: &Context) -> Result<()> {
    let result = pod(t, "pod").run().await;
    if t.is_16() {
        let map = t.container(&result?, "main");
        let text = text_of(map, "tr -s ' ' </proc/self/uid_map").await?;
        same!(text, "0 0 4294967295");
        return Ok(());
    }
    let text = refusal(result, "a user namespace on 1.7")?;
    contains!(&text, "hostUsers", "containerd 2.0 or later");
    assert_clean(&*t.containerd().await, t.before(), Duration::from_secs(10)).await
}
