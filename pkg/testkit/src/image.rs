// SPDX-License-Identifier: Apache-2.0
//! The images that the tests run, made on the spot: busybox with all its
//! applets, and a pause image from the same layer. Nothing is pulled.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// The image with busybox.
pub const BUSYBOX: &str = "test.podhull.local/busybox:1";
/// The same, to be stopped by SIGUSR1.
pub const USR1: &str = "test.podhull.local/usr1:1";
/// The pod's own image, for runtimes that need a process to hold a pod.
pub const PAUSE: &str = "test.podhull.local/pause:1";

const BINARY: &str = "/bin/busybox";
const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/:/bin/false
alice:x:1000:1000:Alice:/home/alice:/bin/sh
";
const GROUP: &str = "root:x:0:\ndaemon:x:1:\nalice:x:1000:\nextra:x:2000:alice\n";
/// Ends at SIGTERM and reaps orphans of a shared PID namespace meanwhile.
const PAUSE_SCRIPT: &str = "trap 'exit 0' TERM INT; while :; do sleep 1000000 & wait $!; done";

/// Writes one OCI archive holding the images to `path`.
///
/// # Errors
/// If busybox is missing or the archive cannot be written.
pub fn write_archive(path: &Path) -> Result<()> {
    let layer = layer()?;
    let layer_digest = digest(&layer);
    let mut blobs = BTreeMap::new();
    let mut manifests = Vec::new();
    let mut add = |bytes: Vec<u8>, media_type: &str| {
        let descriptor = json!({
            "mediaType": media_type,
            "digest": digest(&bytes),
            "size": bytes.len(),
        });
        blobs.insert(digest(&bytes), bytes);
        descriptor
    };
    let layer = add(layer, "application/vnd.oci.image.layer.v1.tar");
    for (name, config) in [
        (
            BUSYBOX,
            json!({"Env": ["PATH=/usr/bin:/bin:/usr/sbin:/sbin"], "Cmd": ["sh"]}),
        ),
        (
            USR1,
            json!({"Env": ["PATH=/usr/bin:/bin:/usr/sbin:/sbin"], "Cmd": ["sh"],
                   "StopSignal": "SIGUSR1"}),
        ),
        (
            PAUSE,
            json!({"Entrypoint": ["/bin/sh", "-c", PAUSE_SCRIPT]}),
        ),
    ] {
        let config = add(
            serde_json::to_vec(&json!({
                "architecture": "amd64",
                "os": "linux",
                "config": config,
                "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
            }))?,
            "application/vnd.oci.image.config.v1+json",
        );
        let mut manifest = add(
            serde_json::to_vec(&json!({
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": config,
                "layers": [layer],
            }))?,
            "application/vnd.oci.image.manifest.v1+json",
        );
        manifest["annotations"] = json!({"io.containerd.image.name": name});
        manifest["platform"] = json!({"architecture": "amd64", "os": "linux"});
        manifests.push(manifest);
    }
    write_layout(path, &blobs, &manifests)
}

fn write_layout(path: &Path, blobs: &BTreeMap<String, Vec<u8>>, manifests: &[Value]) -> Result<()> {
    let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    let mut archive = Builder::new(file);
    let index = serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": manifests}))?;
    append(
        &mut archive,
        "oci-layout",
        0o644,
        br#"{"imageLayoutVersion":"1.0.0"}"#,
    )?;
    append(&mut archive, "index.json", 0o644, &index)?;
    for (digest, bytes) in blobs {
        append(
            &mut archive,
            &format!("blobs/{}", digest.replace(':', "/")),
            0o644,
            bytes,
        )?;
    }
    archive.into_inner().context("finish the archive")?;
    Ok(())
}

/// One layer: the binary, a link per applet, and the files that images have.
fn layer() -> Result<Vec<u8>> {
    let binary =
        fs::read(BINARY).with_context(|| format!("read {BINARY} (package busybox-static)"))?;
    let mut tar = Builder::new(Vec::new());
    for (path, mode) in [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("home", 0o755),
        ("proc", 0o755),
        ("root", 0o700),
        ("sbin", 0o755),
        ("sys", 0o755),
        ("tmp", 0o1777),
        ("usr", 0o755),
        ("usr/bin", 0o755),
        ("usr/sbin", 0o755),
        ("var", 0o755),
    ] {
        directory(&mut tar, path, mode, 0)?;
    }
    directory(&mut tar, "home/alice", 0o755, 1000)?;
    append(&mut tar, "bin/busybox", 0o755, &binary)?;
    for applet in applets()? {
        if applet != "bin/busybox" {
            link(&mut tar, &applet, "/bin/busybox")?;
        }
    }
    append(&mut tar, "etc/passwd", 0o644, PASSWD.as_bytes())?;
    append(&mut tar, "etc/group", 0o644, GROUP.as_bytes())?;
    append(&mut tar, "etc/not-executable", 0o644, b"#!/bin/sh\n")?;
    append(
        &mut tar,
        "etc/no-interpreter",
        0o755,
        b"#!/no/such/interpreter\n",
    )?;
    tar.into_inner().context("finish the layer")
}

/// The applets' paths, as busybox itself lists them.
fn applets() -> Result<Vec<String>> {
    let output = Command::new(BINARY)
        .arg("--list-full")
        .output()
        .context("run busybox")?;
    ensure!(
        output.status.success(),
        "busybox --list-full: {}",
        output.status
    );
    let list = String::from_utf8(output.stdout).context("busybox's list")?;
    Ok(list.lines().map(str::to_owned).collect())
}

fn header(kind: EntryType, mode: u32, owner: u64, size: usize) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(owner);
    header.set_gid(owner);
    header.set_mtime(0);
    header.set_size(size as u64);
    header
}

fn append<W: Write>(tar: &mut Builder<W>, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
    let mut header = header(EntryType::Regular, mode, 0, bytes.len());
    tar.append_data(&mut header, path, bytes)
        .with_context(|| format!("add {path}"))
}

fn directory<W: Write>(tar: &mut Builder<W>, path: &str, mode: u32, owner: u64) -> Result<()> {
    let mut header = header(EntryType::Directory, mode, owner, 0);
    tar.append_data(&mut header, format!("{path}/"), &[][..])
        .with_context(|| format!("add {path}"))
}

fn link<W: Write>(tar: &mut Builder<W>, path: &str, target: &str) -> Result<()> {
    let mut header = header(EntryType::Symlink, 0o777, 0, 0);
    tar.append_link(&mut header, path, target)
        .with_context(|| format!("add {path}"))
}

fn digest(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::from("sha256:");
    for byte in Sha256::digest(bytes) {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_the_known_one() {
        assert_eq!(
            digest(b"abc"),
            "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
