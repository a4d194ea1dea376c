// SPDX-License-Identifier: Apache-2.0
//! The shim's program, as containerd calls it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim_protos::protobuf::Message as _;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use podhull_testkit::containerd::podhull_config;
use podhull_testkit::cri::api::{RuntimeHandler, StatusRequest};
use podhull_testkit::oracle::assert_clean;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::process::Command;

use super::node::{CONFIG, with};
use crate::case::{cases, contains, same};
use crate::context::Context;
use crate::procfs::{Processes, Role, is_emulated};

cases! {
    PODHULL:
        shim_is_found_by_new_containers_whatever_became_of_its_configuration;
    PODHULL_TWICE:
        shim_metrics_of_a_running_pod_are_read,
        shim_boot_is_told_and_emulation_is_said;
    PODHULL_ONCE:
        shim_version_and_info_are_printed,
        shim_info_is_understood_by_containerd,
        shim_delete_of_an_unknown_sandbox_succeeds,
        shim_wrong_arguments_are_named,
        shim_garbled_bundles_are_named_with_their_line;
}

/// The runtime's name in containerd's configuration.
const RUNTIME: &str = "io.containerd.podhull.v2";
/// What containerd calls the type of the features.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

async fn shim(t: &Context, args: &[&str]) -> Result<Output> {
    let bundle = t.new_folder("bundle")?;
    let output = Command::new(&t.node().programs().shim)
        .args(args)
        .current_dir(bundle)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .output()
        .await?;
    Ok(output)
}

async fn shim_version_and_info_are_printed(t: &Context) -> Result<()> {
    const VERSION: &str = env!("CARGO_PKG_VERSION");
    for flag in ["-v", "-version", "--version"] {
        let output = shim(t, &[flag]).await?;
        ensure!(output.status.success(), "{flag}: {output:?}");
        let text = String::from_utf8_lossy(&output.stdout);
        contains!(&text, "containerd-shim-podhull-v2", RUNTIME);
        let version = text.lines().find_map(|line| line.split_once("Version:"));
        let (_, version) = version.with_context(|| format!("{flag}: no version: {text}"))?;
        same!(version.trim(), VERSION, "{flag}");
    }
    for flag in ["-info", "--info"] {
        let output = shim(t, &[flag]).await?;
        ensure!(output.status.success(), "{flag}: {output:?}");
        let info = RuntimeInfo::parse_from_bytes(&output.stdout);
        let info = info.with_context(|| format!("{flag}: no RuntimeInfo"))?;
        same!(info.name, RUNTIME, "{flag}");
        same!(info.version.version, VERSION, "{flag}");
        same!(info.features.type_url, FEATURES, "{flag}");
        features(&serde_json::from_slice(&info.features.value)?)?;
    }
    Ok(())
}

/// What the runtime specification's `features.md` has, as it is for a guest.
fn features(features: &Value) -> Result<()> {
    for (pointer, expected) in [
        ("/ociVersionMin", json!("1.0.0")),
        ("/linux/cgroup/v1", json!(false)),
        ("/linux/cgroup/v2", json!(true)),
        ("/linux/cgroup/systemd", json!(false)),
        ("/linux/seccomp/enabled", json!(true)),
        ("/linux/apparmor/enabled", json!(false)),
        ("/linux/selinux/enabled", json!(false)),
        ("/linux/mountExtensions/idmap/enabled", json!(true)),
    ] {
        same!(
            features.pointer(pointer),
            Some(&expected),
            "{pointer} in {features}"
        );
    }
    let list = |pointer: &str| -> Result<Vec<&str>> {
        let words = features.pointer(pointer).and_then(Value::as_array);
        let words = words.with_context(|| format!("{pointer} in {features}"))?;
        Ok(words.iter().filter_map(Value::as_str).collect())
    };
    let namespaces = list("/linux/namespaces")?;
    for kind in ["pid", "user"] {
        ensure!(namespaces.contains(&kind), "{namespaces:?}");
    }
    let options = list("/mountOptions")?;
    for option in ["rbind", "ro", "rro", "rslave"] {
        ensure!(options.contains(&option), "no {option} among {options:?}");
    }
    Ok(())
}

/// What containerd reads of it, and tells its own clients and the kubelet.
async fn shim_info_is_understood_by_containerd(t: &Context) -> Result<()> {
    let inspect = ["plugins", "inspect-runtime", "--runtime", RUNTIME];
    let text = t.containerd().await.ctr(&inspect).await?;
    let told: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    same!(told["Name"], RUNTIME, "{text}");
    same!(
        told["Version"]["Version"],
        env!("CARGO_PKG_VERSION"),
        "{text}"
    );
    features(&told["Features"])?;
    let status = StatusRequest { verbose: false };
    let status = t.client().runtime().status(status).await?.into_inner();
    let ours = |handler: &&RuntimeHandler| handler.name == t.setup().handler;
    let handler = status.runtime_handlers.iter().find(ours);
    let features = handler.and_then(|handler| handler.features);
    let features = features.with_context(|| format!("{:?}", status.runtime_handlers))?;
    same!(features.user_namespaces, true, "user namespaces");
    same!(
        features.recursive_read_only_mounts,
        true,
        "recursive read-only mounts"
    );
    Ok(())
}

async fn shim_delete_of_an_unknown_sandbox_succeeds(t: &Context) -> Result<()> {
    let bundle = t.new_folder("bundle")?;
    for _ in 0..2 {
        let args = [
            "-namespace",
            "k8s.io",
            "-id",
            "nobody-knows-this-one",
            "-bundle",
            &bundle,
            "-address",
            "/run/containerd/containerd.sock",
            "delete",
        ];
        let output = shim(t, &args).await?;
        ensure!(output.status.success(), "{output:?}");
        // A DeleteResponse: at least its exit status or its time.
        ensure!(!output.stdout.is_empty(), "no response: {output:?}");
    }
    Ok(())
}

async fn shim_wrong_arguments_are_named(t: &Context) -> Result<()> {
    for (args, named) in [
        (
            &["-namespace", "k8s.io", "-colour", "red", "start"][..],
            "colour",
        ),
        (&["-namespace", "k8s.io", "-id", "x", "restart"], "restart"),
        (&["-namespace", "k8s.io", "start"], "id"),
    ] {
        let output = shim(t, args).await?;
        ensure!(!output.status.success(), "{args:?} succeeded");
        contains!(String::from_utf8_lossy(&output.stderr), named);
    }
    Ok(())
}

async fn shim_garbled_bundles_are_named_with_their_line(t: &Context) -> Result<()> {
    let bundle = t.new_folder("bundle")?;
    let file = t.path("bundle/config.json");
    let args = [
        "-namespace",
        "k8s.io",
        "-id",
        "garbled",
        "-address",
        "/run/containerd/containerd.sock",
        "start",
    ];
    for (text, words) in [
        (
            "{\"ociVersion\": \"1.0.2\",\n \"process\":",
            &["line 2 column "][..],
        ),
        (
            "{\n \"process\": {\n  \"args\": \"true\"\n }\n}",
            &["process.args: ", "line 3 column 16"],
        ),
        (
            "{\"ociVersion\": \"1.0.2\",\n \"mounts\": [{}, 7]\n}",
            &["mounts[", "line 2 column "],
        ),
        ("no JSON", &["line 1 column "]),
        ("", &["line 1 column 0"]),
    ] {
        fs::write(&file, text)?;
        let output = shim(t, &args).await?;
        ensure!(!output.status.success(), "{text:?} was taken");
        same!(output.stdout, b"", "an answer to {text:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        contains!(&said, &file);
        for word in words {
            contains!(&said, *word);
        }
        assert_clean(&*t.containerd().await, t.before(), Duration::from_secs(10)).await?;
        same!(fs::read_dir(&bundle)?.count(), 1, "files in the bundle");
    }
    Ok(())
}

/// The run folder of the only pod.
fn run_folder() -> Result<PathBuf> {
    let folders = fs::read_dir("/run/podhull").context("podhull's run folder")?;
    let folders = folders.flatten().map(|pod| pod.path());
    let folders: Vec<_> = folders
        .filter(|folder| folder.join("metrics.sock").exists())
        .collect();
    match <[_; 1]>::try_from(folders) {
        Ok([folder]) => Ok(folder),
        Err(folders) => bail!("one pod runs: {folders:?}"),
    }
}

/// Asks for the shim's metrics.
async fn ask(socket: &Path) -> Result<UnixStream> {
    let mut reader = UnixStream::connect(socket).await?;
    let request = b"GET /metrics HTTP/1.1\r\nHost: shim\r\nConnection: close\r\n\r\n";
    reader.write_all(request).await?;
    Ok(reader)
}

async fn answer(reader: &mut UnixStream) -> Result<String> {
    let mut text = String::new();
    let read = tokio::time::timeout(Duration::from_secs(10), reader.read_to_string(&mut text));
    read.await.context("not answered")??;
    Ok(text)
}

async fn shim_metrics_of_a_running_pod_are_read(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    container.shell("echo 0123456789").await?.success()?;
    let socket = run_folder()?.join("metrics.sock");
    // One who asks nothing takes nobody's place for long.
    let silent = UnixStream::connect(&socket).await?;
    let mut reader = ask(&socket).await?;
    container.exec(["true"]).await?.success()?;
    contains!(
        answer(&mut reader).await?,
        "HTTP/1.1 200 OK",
        "podhull_sandbox_start_duration_seconds_count 1\n",
        "podhull_boot_phase_duration_seconds_count{phase=\"agent_ready\"} 1\n",
        "podhull_agent_rpc_duration_seconds_count{method=\"",
        "podhull_session_bytes_total{direction=\"stdout\",kind=\"stdio\"} "
    );
    drop(silent);
    Ok(())
}

async fn shim_boot_is_told_and_emulation_is_said(t: &Context) -> Result<()> {
    const PHASES: [&str; 8] = [
        "start_called",
        "host_ready",
        "vmm_spawned",
        "kernel_entered",
        "agent_started",
        "agent_ready",
        "configured",
        "container_started",
    ];
    let (pod, _container) = t.idle().await?;
    let folder = run_folder()?;
    let boot: Value = serde_json::from_slice(&fs::read(folder.join("boot.json"))?)?;
    let phases = boot["phases"].as_array().context("no phases")?;
    let names: Vec<_> = phases
        .iter()
        .filter_map(|phase| phase["name"].as_str())
        .collect();
    same!(names, PHASES, "phases");
    let times: Vec<_> = phases
        .iter()
        .filter_map(|phase| phase["ms"].as_f64())
        .collect();
    let ascend = times.len() == PHASES.len() && times.is_sorted();
    ensure!(ascend, "the phases' times: {boot}");

    let log = fs::read_to_string(folder.join("shim.log"))?;
    let mut booted = log.lines().filter(|line| line.contains("booted"));
    let booted = booted
        .next_back()
        .context("the log says nothing of the boot")?;
    for phase in PHASES {
        contains!(booted, &format!("{phase}="));
    }
    let emulated = is_emulated(Processes::of(pod.id())?.pid(Role::Vmm)?)?;
    let warnings = log
        .lines()
        .filter(|line| line.contains("WARN") && line.contains("guests are emulated"));
    same!(warnings.count(), usize::from(emulated), "warnings");
    let mut reader = ask(&folder.join("metrics.sock")).await?;
    let gauge = format!(
        "podhull_emulation_in_use{{vmm=\"qemu\"}} {}\n",
        u8::from(emulated)
    );
    contains!(answer(&mut reader).await?, &gauge);
    if t.setup().shim_is_sandboxer() {
        let info = pod.full_status().await?.info;
        same!(info.get("emulated"), Some(&emulated.to_string()));
    }
    Ok(())
}

/// containerd 1.6 runs `start` for each container, with the configuration of that
/// moment.
async fn shim_is_found_by_new_containers_whatever_became_of_its_configuration(
    t: &Context,
) -> Result<()> {
    const RUN: &str = "/run/podhull-of-the-pod";
    let elsewhere = podhull_config(t.node().programs());
    fs::write(CONFIG, with(t, "run_dir", &format!("{RUN:?}")))?;
    let (pod, mut container) = t.idle().await?;
    for (changed, name) in [("this is no TOML", "second"), (&elsewhere, "third")] {
        fs::write(CONFIG, changed).context("write podhull's configuration")?;
        container.stop(1).await?;
        container.remove().await?;
        let new = t.container(&pod, name).idle().start().await;
        container = new.with_context(|| format!("a container after {changed:?}"))?;
        container.exec(["true"]).await?.success()?;
    }
    pod.stop().await?;
    container.remove().await?;
    pod.remove().await?;
    fs::remove_dir(RUN).with_context(|| format!("remove {RUN}"))?;
    assert_clean(&*t.containerd().await, t.before(), Duration::from_secs(10)).await
}
