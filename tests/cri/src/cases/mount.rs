// SPDX-License-Identifier: Apache-2.0
//! Folders and files of the host in containers.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use podhull_testkit::cri::Container;
use podhull_testkit::cri::api::MountPropagation;
use sha2::{Digest as _, Sha256};

use crate::case::{cases, contains, same};
use crate::context::{Context, text_of};

cases! {
    ALL_TWICE:
        mount_volume_is_shared_with_the_host_both_ways,
        mount_read_only_volume_cannot_be_written,
        mount_single_files_are_bound,
        mount_mounts_below_a_volume_are_seen,
        mount_later_mounts_reach_the_container_on_demand,
        mount_absent_source_is_made_by_containerd,
        mount_owners_and_modes_are_the_hosts,
        mount_large_file_is_read_and_written_whole;
}

/// The guest may believe for a second what it has read.
const SEEN_WITHIN: Duration = Duration::from_secs(10);

/// Waits until a line of shell writes `text`.
async fn becomes(container: &Container, script: &str, text: &str) -> Result<()> {
    let by = Instant::now() + SEEN_WITHIN;
    loop {
        let output = container.shell(script).await?;
        if output.text() == text {
            return Ok(());
        }
        ensure!(
            Instant::now() < by,
            "{script:?} still gives {:?} {:?}, not {text:?}",
            output.text(),
            output.error_text()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A tmpfs of the test's on the host, gone with this.
#[derive(Debug)]
struct Tmpfs(String);

impl Tmpfs {
    fn on(folder: &str) -> Result<Self> {
        fs::create_dir_all(folder)?;
        mount(
            Some("test"),
            folder,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("mount a tmpfs on {folder}"))?;
        Ok(Self(folder.into()))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // If it stays, the leak oracle tells.
        let _ = umount2(&*self.0, MntFlags::MNT_DETACH);
    }
}

async fn mount_volume_is_shared_with_the_host_both_ways(t: &Context) -> Result<()> {
    let folder = t.new_folder("data")?;
    t.new_file("data/old", "from the host\n")?;
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .mount(&folder, "/data", false)
        .start()
        .await?;
    same!(
        container.shell("cat /data/old").await?.text(),
        "from the host"
    );
    let script = "mkdir /data/sub; echo from the guest >/data/sub/new; mv /data/old /data/moved; ln -s moved /data/link";
    container.shell(script).await?.success()?;
    same!(
        fs::read_to_string(format!("{folder}/sub/new"))?,
        "from the guest\n"
    );
    ensure!(
        !Path::new(&folder).join("old").exists(),
        "the renamed file is still there"
    );
    same!(fs::read_link(format!("{folder}/link"))?, Path::new("moved"));
    // The host's changes are seen, also one by rename as of a ConfigMap.
    t.new_file("data/added", "more\n")?;
    becomes(&container, "cat /data/added", "more").await?;
    t.new_file("data/added", "changed and longer\n")?;
    becomes(&container, "cat /data/added", "changed and longer").await?;
    t.new_file("data/tmp", "renamed\n")?;
    fs::rename(format!("{folder}/tmp"), format!("{folder}/added"))?;
    becomes(&container, "cat /data/added", "renamed").await?;
    fs::remove_file(format!("{folder}/added"))?;
    becomes(&container, "ls /data", "link\nmoved\nsub").await
}

async fn mount_read_only_volume_cannot_be_written(t: &Context) -> Result<()> {
    let folder = t.new_folder("data")?;
    t.new_file("data/file", "precious\n")?;
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .mount(&folder, "/read", true)
        .mount(&folder, "/write", false)
        .start()
        .await?;
    for script in [
        "echo x >>/read/file",
        "rm /read/file",
        "mkdir /read/x",
        "chmod 0 /read/file",
    ] {
        let output = container.shell(script).await?;
        ensure!(output.code != 0, "{script:?} succeeded");
        contains!(output.error_text(), "Read-only file system");
    }
    same!(fs::read_to_string(format!("{folder}/file"))?, "precious\n");
    container.shell("echo x >/write/new").await?.success()?;
    becomes(&container, "cat /read/new", "x").await
}

async fn mount_single_files_are_bound(t: &Context) -> Result<()> {
    let one = t.new_file("one", "1\n")?;
    let two = t.new_file("two", "2\n")?;
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .mount(&one, "/etc/one.conf", true)
        .mount(&two, "/srv/deep/two", false)
        .start()
        .await?;
    same!(
        container
            .shell("cat /etc/one.conf /srv/deep/two")
            .await?
            .text(),
        "1\n2"
    );
    ensure!(
        container.shell("echo x >/etc/one.conf").await?.code != 0,
        "read-only file was written"
    );
    container
        .shell("echo three >/srv/deep/two")
        .await?
        .success()?;
    same!(fs::read_to_string(&two)?, "three\n");
    same!(fs::read_to_string(&one)?, "1\n");
    Ok(())
}

async fn mount_mounts_below_a_volume_are_seen(t: &Context) -> Result<()> {
    let folder = t.new_folder("data")?;
    let below = Tmpfs::on(&format!("{folder}/below"))?;
    t.new_file("data/below/file", "on the tmpfs\n")?;
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .mount(&folder, "/write", false)
        .mount(&folder, "/read", true)
        .start()
        .await?;
    for view in ["/write", "/read"] {
        let text = container
            .shell(&format!("cat {view}/below/file"))
            .await?
            .text();
        same!(text, "on the tmpfs", "{view}");
    }
    container
        .shell("echo more >/write/below/more")
        .await?
        .success()?;
    same!(
        fs::read_to_string(format!("{folder}/below/more"))?,
        "more\n"
    );
    pod.stop().await?;
    pod.remove().await?;
    ensure!(
        Path::new(&folder).join("below/file").exists(),
        "the host's mount is gone"
    );
    drop(below);
    Ok(())
}

async fn mount_later_mounts_reach_the_container_on_demand(t: &Context) -> Result<()> {
    let folder = t.new_folder("data")?;
    t.new_folder("data/later")?;
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .mount(&folder, "/private", false)
        .mount(&folder, "/slave", false)
        .edit(|config| {
            if let Some(mount) = config.mounts.last_mut() {
                mount.set_propagation(MountPropagation::PropagationHostToContainer);
            }
        })
        .start()
        .await?;
    let later = Tmpfs::on(&format!("{folder}/later"))?;
    t.new_file("data/later/file", "late\n")?;
    becomes(&container, "cat /slave/later/file", "late").await?;
    let private = container.shell("ls /private/later").await?.success()?;
    same!(private.text(), "", "the private mount");
    container
        .shell("echo back >/slave/later/back")
        .await?
        .success()?;
    same!(
        fs::read_to_string(format!("{folder}/later/back"))?,
        "back\n"
    );
    pod.remove().await?;
    ensure!(
        Path::new(&folder).join("later/file").exists(),
        "the host's mount is gone"
    );
    drop(later);
    Ok(())
}

async fn mount_absent_source_is_made_by_containerd(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let absent = t.path("absent/folder");
    let builder = t.container(&pod, "main").mount(&absent, "/data", false);
    same!(
        text_of(builder, "ls -A /data | wc -l; echo x >/data/x").await?,
        "0"
    );
    same!(fs::read_to_string(format!("{absent}/x"))?, "x\n");
    Ok(())
}

async fn mount_owners_and_modes_are_the_hosts(t: &Context) -> Result<()> {
    let folder = t.new_folder("data")?;
    let file = t.new_file("data/file", "x")?;
    chown(&file, Some(1234), Some(2345))?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640))?;
    let secret = t.new_file("data/secret", "x")?;
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600))?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777))?;
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .mount(&folder, "/data", false)
        .security(|security| {
            security.run_as_user = Some(podhull_testkit::cri::api::Int64Value { value: 1000 });
        })
        .start()
        .await?;
    let output = container
        .shell("stat -c '%u %g %a' /data/file")
        .await?
        .success()?;
    same!(output.text(), "1234 2345 640");
    contains!(
        container.shell("cat /data/secret").await?.error_text(),
        "Permission denied"
    );
    container
        .shell("umask 027; echo x >/data/mine")
        .await?
        .success()?;
    let meta = fs::metadata(format!("{folder}/mine"))?;
    use std::os::unix::fs::MetadataExt as _;
    same!(
        (meta.uid(), meta.gid(), meta.mode() & 0o777),
        (1000, 1000, 0o640)
    );
    Ok(())
}

async fn mount_large_file_is_read_and_written_whole(t: &Context) -> Result<()> {
    let folder = t.new_folder("data")?;
    let bytes: Vec<u8> = (0..2_u32 << 20).flat_map(u32::to_le_bytes).collect();
    fs::write(format!("{folder}/large"), &bytes)?;
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .mount(&folder, "/data", false)
        .start()
        .await?;
    let script = "sha256sum </data/large; cp /data/large /data/copy; rm /data/large";
    let output = container.shell(script).await?.success()?;
    contains!(output.text(), &hex(&Sha256::digest(&bytes)));
    ensure!(
        fs::read(format!("{folder}/copy"))? == bytes,
        "the copy differs"
    );
    ensure!(
        !Path::new(&folder).join("large").exists(),
        "the removed file is there"
    );
    Ok(())
}

/// Bytes as hexadecimal digits.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
