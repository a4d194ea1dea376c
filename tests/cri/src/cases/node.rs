// SPDX-License-Identifier: Apache-2.0
//! A node that is not as it should be: the CRI reply says what is wrong, and
//! nothing is left. The runner restores the configuration.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use podhull_testkit::containerd::podhull_config;
use podhull_testkit::oracle::assert_clean;

use crate::case::{Skip, cases, contains};
use crate::context::{Context, refusal};

cases! {
    PODHULL_TWICE:
        node_missing_files_are_named,
        node_files_of_the_wrong_kind_are_named,
        node_vsock_daemon_missing_or_of_the_wrong_kind_is_named,
        node_qemu_that_ends_at_once_is_quoted,
        node_guest_that_panics_is_quoted,
        node_guest_that_stays_silent_is_quoted,
        node_without_memory_for_the_vm_says_so,
        node_wrong_settings_are_named_with_their_line;
    PODHULL:
        node_without_kvm_is_refused_unless_emulation_is_allowed;
}

/// podhull's configuration, which the runner restores.
pub(super) const CONFIG: &str = "/etc/podhull/config.toml";

/// The node's configuration with one key changed.
pub(super) fn with(t: &Context, key: &str, value: &str) -> String {
    let config = podhull_config(t.node().programs());
    let mut lines: Vec<_> = config
        .lines()
        .filter(|line| line.split('=').next().is_none_or(|name| name.trim() != key))
        .map(str::to_owned)
        .collect();
    lines.push(format!("{key} = {value}"));
    lines.join("\n") + "\n"
}

/// What is looked at before a guest boots is refused within this.
fn at_once() -> Duration {
    Duration::from_secs(if boots_slowly() { 20 } else { 5 })
}

/// Whether guests are given more time than podhull's own, as in a node whose KVM
/// is itself emulated.
fn boots_slowly() -> bool {
    env::var_os("PODHULL_BOOT_TIMEOUT").is_some()
}

/// With this configuration, a pod is refused with these words.
async fn refused(t: &Context, config: impl AsRef<[u8]>, words: &[&str]) -> Result<()> {
    refused_within(t, Duration::from_secs(30), config, words).await
}

async fn refused_within(
    t: &Context,
    within: Duration,
    config: impl AsRef<[u8]>,
    words: &[&str],
) -> Result<()> {
    fs::write(CONFIG, config).context("write podhull's configuration")?;
    let begin = Instant::now();
    let text = refusal(t.pod("pod").run().await, &words.join(" "))?;
    for word in words {
        contains!(&text, word);
    }
    let took = begin.elapsed();
    ensure!(took < within, "refused only after {took:?}");
    assert_clean(&*t.containerd().await, t.before(), Duration::from_secs(10)).await
}

/// With the node's own configuration, a pod runs.
async fn works_again(t: &Context) -> Result<()> {
    fs::write(CONFIG, podhull_config(t.node().programs()))?;
    let (_pod, container) = t.idle().await?;
    container.exec(["true"]).await?.success()?;
    Ok(())
}

async fn node_missing_files_are_named(t: &Context) -> Result<()> {
    for key in ["kernel", "initramfs", "qemu"] {
        missing_is_named(t, key).await.context(key)?;
    }
    works_again(t).await
}

async fn missing_is_named(t: &Context, key: &str) -> Result<()> {
    let path = format!("/nonexistent/{key}");
    let config = with(t, key, &format!("{path:?}"));
    refused_within(t, at_once(), &config, &[key, &path, "No such file"]).await
}

async fn node_files_of_the_wrong_kind_are_named(t: &Context) -> Result<()> {
    let text = t.new_file("text", "#!/bin/sh\nexit 1\n")?;
    for (key, file, says) in [
        ("kernel", &*text, "neither an ELF file nor a bzImage"),
        ("kernel", "/bin/busybox", "an ELF file without a PVH note"),
        (
            "initramfs",
            &text,
            "neither a cpio archive nor a compressed one",
        ),
        ("qemu", &text, "not a program"),
    ] {
        let config = with(t, key, &format!("{file:?}"));
        refused_within(t, at_once(), &config, &[key, file, says])
            .await
            .with_context(|| format!("{key} = {file:?}"))?;
    }
    works_again(t).await
}

async fn node_vsock_daemon_missing_or_of_the_wrong_kind_is_named(t: &Context) -> Result<()> {
    if Path::new("/dev/vhost-vsock").exists() {
        let reason = "this machine has /dev/vhost-vsock and needs no daemon";
        return Err(Skip(reason.into()).into());
    }
    missing_is_named(t, "vsock_daemon").await?;
    let text = t.new_file("text", "#!/bin/sh\nexit 1\n")?;
    let config = with(t, "vsock_daemon", &format!("{text:?}"));
    refused_within(
        t,
        at_once(),
        &config,
        &["vsock_daemon", &text, "not a program"],
    )
    .await?;
    works_again(t).await
}

async fn node_qemu_that_ends_at_once_is_quoted(t: &Context) -> Result<()> {
    // A program that the VMM's confinement shows, and that knows none of QEMU's options.
    let config = with(t, "qemu", "\"/bin/ls\"");
    let words = ["qemu ended", "exit status: 2", "/bin/ls: invalid option"];
    refused_within(t, at_once(), &config, &words).await?;
    works_again(t).await
}

async fn node_guest_that_panics_is_quoted(t: &Context) -> Result<()> {
    // An archive by its first bytes only: no /init, no root, a panic.
    let garbage = t.new_file("initramfs", "070701 and then nothing of use")?;
    let config = with(t, "initramfs", &format!("{garbage:?}"));
    let words = [
        "qemu ended",
        "last console lines",
        "Kernel panic - not syncing",
    ];
    refused(t, &config, &words).await?;
    works_again(t).await
}

async fn node_guest_that_stays_silent_is_quoted(t: &Context) -> Result<()> {
    // A PID 1 that says a word and then nothing: the agent never comes up.
    let source = "#include <unistd.h>\n#include <fcntl.h>\n\
        int main(void) { int c = open(\"/dev/console\", O_WRONLY);\
        write(c, \"lost in thought\\n\", 16); for (;;) pause(); }\n";
    let folder = t.new_folder("silent")?;
    let program = t.new_file("silent.c", source)?;
    run(
        "gcc",
        &["-static", "-o", &format!("{folder}/init"), &program],
    )?;
    fs::create_dir(format!("{folder}/dev"))?;
    // The kernel makes no device files for an initramfs.
    run("mknod", &[&format!("{folder}/dev/console"), "c", "5", "1"])?;
    let archive = t.path("silent.cpio");
    let pack = format!("cd {folder} && find . | cpio --quiet -o -H newc >{archive}");
    run("sh", &["-c", &pack])?;
    let key = "boot_timeout_seconds";
    let config: String = with(t, "initramfs", &format!("{archive:?}"))
        .lines()
        .filter(|line| !line.starts_with(key))
        .map(|line| format!("{line}\n"))
        .collect();
    // Time for its word, but less than the refusal may take.
    let (seconds, within) = if boots_slowly() { (30, 60) } else { (2, 30) };
    let config = config + &format!("{key} = {seconds}\n");
    let (words, within) = (
        ["did not come up", "lost in thought"],
        Duration::from_secs(within),
    );
    refused_within(t, within, &config, &words).await?;
    works_again(t).await
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let output = Command::new(program).args(args).output().context("run")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program}: {stderr}");
    Ok(())
}

async fn node_without_memory_for_the_vm_says_so(t: &Context) -> Result<()> {
    let config = with(t, "default_memory_mib", "1000000");
    refused(t, &config, &["1000000 MiB", "available"]).await?;
    works_again(t).await
}

async fn node_wrong_settings_are_named_with_their_line(t: &Context) -> Result<()> {
    let good = podhull_config(t.node().programs());
    // The last line is the one that is wrong.
    let last = |text: &[u8]| [good.as_bytes(), text, b"\n"].concat();
    for (config, words) in [
        (last(b"alow_emulation = true"), &["alow_emulation"][..]),
        (last(b"default_vcpus = \"two\""), &["default_vcpus"]),
        (last(b"this is no TOML"), &[]),
        (
            last(b"default_memory_mib = 8"),
            &["default_memory_mib = 8", "expected"],
        ),
        (
            last(b"run_dir = \"relative\""),
            &["run_dir = relative", "absolute"],
        ),
        (last(b"first_vm_uid = 1"), &["first_vm_uid = 1", "expected"]),
        (
            last(b"run_dir = \"/run/\xff\""),
            &["run_dir = ", "not UTF-8"],
        ),
        (
            with(t, "log", "\"podhull_shim=loud\"").into_bytes(),
            &["log = podhull_shim=loud", "expected a filter"],
        ),
    ] {
        let lines = config.iter().filter(|byte| **byte == b'\n').count();
        let line = format!("line {lines}");
        let mut words = words.to_vec();
        words.extend([CONFIG, &line]);
        let text = String::from_utf8_lossy(&config).into_owned();
        refused(t, config, &words).await.context(text)?;
    }
    works_again(t).await
}

/// A file of the node's with another in its place, until this goes.
#[derive(Debug)]
struct Instead(&'static str);

impl Instead {
    fn of(file: &'static str, other: &str) -> Result<Self> {
        let none = None::<&str>;
        mount(Some(other), file, none, MsFlags::MS_BIND, none)
            .with_context(|| format!("{other} instead of {file}"))?;
        Ok(Self(file))
    }
}

impl Drop for Instead {
    fn drop(&mut self) {
        // If it stays, the leak oracle tells.
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

/// Both reasons, on a node with KVM as well: a CPU that cannot, and a device that
/// does not do what it is for.
async fn node_without_kvm_is_refused_unless_emulation_is_allowed(t: &Context) -> Result<()> {
    let config = with(t, "allow_emulation", "false");
    for (flags, reason) in [
        ("fpu svme", &["the CPU shows neither vmx nor svm"][..]),
        ("fpu vmx", &["a probe VM did not run: ", "/dev/kvm: "]),
    ] {
        let cpuinfo = t.new_file("cpuinfo", &format!("flags\t\t: {flags}\n"))?;
        let instead = Instead::of("/proc/cpuinfo", &cpuinfo)?;
        let no_kvm = Path::new("/dev/kvm").exists();
        let no_kvm = no_kvm.then(|| Instead::of("/dev/kvm", "/dev/null"));
        let no_kvm = no_kvm.transpose()?;
        fs::write(CONFIG, &config)?;
        let begin = Instant::now();
        let text = refusal(t.pod("pod").run().await, flags)?;
        let took = begin.elapsed();
        drop((no_kvm, instead));
        contains!(&text, "KVM cannot be used: ", "allow_emulation");
        for words in reason {
            contains!(&text, *words);
        }
        ensure!(took < at_once(), "{flags}: refused only after {took:?}");
        assert_clean(&*t.containerd().await, t.before(), Duration::from_secs(10)).await?;
    }
    works_again(t).await
}
