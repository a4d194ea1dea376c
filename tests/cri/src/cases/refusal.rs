// SPDX-License-Identifier: Apache-2.0
//! What a pod in a VM cannot have is refused by the name of its field.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use podhull_testkit::containerd::FORGETFUL;
use podhull_testkit::cri::api::{Device, HugepageLimit, MountPropagation, NamespaceMode};
use podhull_testkit::cri::{ContainerBuilder, Pod};
use podhull_testkit::oracle::assert_clean;

use crate::case::{cases, contains};
use crate::context::{Context, refusal};

cases! {
    PODHULL:
        refusal_of_host_namespaces_names_them;
    PODHULL_TWICE:
        refusal_of_a_host_device_names_it,
        refusal_of_the_hosts_devices_names_the_setting,
        refusal_of_bidirectional_mounts_names_them,
        refusal_of_the_hosts_kernel_folders_names_them,
        refusal_of_too_little_memory_names_the_floor;
    PODHULL_ONCE:
        refusal_of_huge_pages_names_them;
}

async fn refusal_of_host_namespaces_names_them(t: &Context) -> Result<()> {
    type Change = fn(&mut podhull_testkit::cri::api::NamespaceOption);
    let changes: [(&str, Change); 3] = [
        ("hostNetwork", |options| {
            options.set_network(NamespaceMode::Node)
        }),
        ("hostPID", |options| options.set_pid(NamespaceMode::Node)),
        ("hostIPC", |options| options.set_ipc(NamespaceMode::Node)),
    ];
    for (field, change) in changes {
        let result = t.pod("pod").namespaces(change).run().await;
        contains!(refusal(result, field)?, field);
    }
    ensure!(
        t.client().pod_ids(None).await?.is_empty(),
        "a refused pod is listed"
    );
    Ok(())
}

/// A container is refused with these words, and its pod goes on.
async fn refused(t: &Context, pod: &Pod, builder: ContainerBuilder, words: &[&str]) -> Result<()> {
    let text = refusal(builder.start().await, &words.join(" "))?;
    for word in words {
        contains!(&text, word);
    }
    let good = t.container(pod, "good").idle().start().await?;
    good.exec(["true"]).await?.success()?;
    good.stop(0).await?;
    good.remove().await
}

async fn refusal_of_a_host_device_names_it(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let builder = t.container(&pod, "main").idle().edit(|config| {
        config.devices.push(Device {
            host_path: "/dev/null".into(),
            container_path: "/dev/mine".into(),
            permissions: "rw".into(),
        });
    });
    refused(t, &pod, builder, &["devices", "/dev/mine"]).await
}

/// Without `privileged_without_host_devices`, containerd gives a privileged
/// container every device of the node.
async fn refusal_of_the_hosts_devices_names_the_setting(t: &Context) -> Result<()> {
    let pod = t.pod("pod").handler(FORGETFUL).linux(|linux| {
        linux.security_context.get_or_insert_default().privileged = true;
    });
    let pod = pod.run().await?;
    let builder = t.container(&pod, "main").idle().security(|security| {
        security.privileged = true;
        security.masked_paths.clear();
        security.readonly_paths.clear();
    });
    let words = [
        "linux.devices",
        "/dev/",
        "privileged_without_host_devices",
        "containerd's runtime handler",
    ];
    refused(t, &pod, builder, &words).await?;
    pod.stop().await?;
    pod.remove().await?;
    assert_clean(&*t.containerd().await, t.before(), Duration::from_secs(10)).await
}

async fn refusal_of_bidirectional_mounts_names_them(t: &Context) -> Result<()> {
    let folder = t.new_folder("data")?;
    let pod = t.ready_pod().await?;
    let builder = t
        .container(&pod, "main")
        .idle()
        .mount(&folder, "/data", false)
        .edit(|config| {
            if let Some(mount) = config.mounts.last_mut() {
                mount.set_propagation(MountPropagation::PropagationBidirectional);
            }
        });
    refused(t, &pod, builder, &["/data", "Bidirectional"]).await
}

async fn refusal_of_the_hosts_kernel_folders_names_them(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let link = t.path("link");
    std::os::unix::fs::symlink("/sys", &link)?;
    let below_link = format!("{link}/kernel");
    let sources = [
        ("/dev", "/dev"),
        ("/proc", "/proc"),
        ("/sys/kernel", "/sys"),
        ("/run/../proc", "/proc"),
        (&link, "/sys"),
        (&below_link, "/sys"),
        ("/", "/dev"),
    ];
    for (attempt, (source, folder)) in sources.into_iter().enumerate() {
        let builder = t.container(&pod, "main").attempt(u32::try_from(attempt)?);
        let builder = builder.idle().mount(source, "/of-the-host", true);
        let text = refusal(builder.start().await, source)?;
        contains!(
            &text,
            "mounts[/of-the-host]",
            &format!("shows the host's {folder}")
        );
    }
    let builder = t.container(&pod, "main").attempt(9).idle();
    builder.start().await?.exec(["true"]).await?.success()?;
    Ok(())
}

async fn refusal_of_too_little_memory_names_the_floor(t: &Context) -> Result<()> {
    let pod = t.pod("pod").linux(|linux| {
        linux
            .resources
            .get_or_insert_default()
            .memory_limit_in_bytes = 16 << 20;
    });
    let text = refusal(pod.run().await, "a pod with 16 MiB")?;
    contains!(&text, "resources.limits.memory", "MiB");
    Ok(())
}

/// True if the node limits `what` by cgroups.
fn has_controller(what: &str) -> Result<bool> {
    let of_v1 = fs::read_to_string("/proc/self/cgroup")?;
    let of_v2 = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    Ok(of_v1.split([':', ',', '\n']).any(|name| name == what)
        || of_v2.split_whitespace().any(|name| name == what))
}

/// The kubelet sends a limit for each size that the node has, zero if the pod asks
/// for none.
async fn refusal_of_huge_pages_names_them(t: &Context) -> Result<()> {
    let limit = |limit| {
        vec![HugepageLimit {
            page_size: "2MB".into(),
            limit,
        }]
    };
    let pod = t.ready_pod().await?;
    let none = t.container(&pod, "none").idle();
    let none = none.resources(|resources| resources.hugepage_limits = limit(0));
    let none = none.start().await?;
    none.exec(["true"]).await?.success()?;
    let some = t.container(&pod, "some").idle();
    let some = some.resources(|resources| resources.hugepage_limits = limit(64 << 20));
    // Where the node has no controller for them, containerd leaves the limit out.
    if has_controller("hugetlb")? {
        refused(t, &pod, some, &["linux.resources.hugepageLimits[0].limit"]).await?;
    }
    let pod = t.pod("huge").linux(|linux| {
        let resources = linux.resources.get_or_insert_default();
        resources.hugepage_limits = limit(64 << 20);
    });
    let text = refusal(pod.run().await, "a pod with huge pages")?;
    contains!(&text, "linux.resources.hugepage_limits[0].limit");
    Ok(())
}
