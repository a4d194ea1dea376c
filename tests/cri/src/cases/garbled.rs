// SPDX-License-Identifier: Apache-2.0
//! Specs that nobody can read: what is wrong with them is named, and nothing of
//! them stays. containerd writes none itself, so a shim is asked as it asks one.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CreateTaskRequest, ExecProcessRequest, StateRequest,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::ttrpc::context::{self, Context as Call};
use containerd_shim_protos::ttrpc::{Code, Error};
use podhull_testkit::cri::api::{SecurityProfile, security_profile::ProfileType};

use crate::case::{cases, contains, same};
use crate::context::{Context, refusal};
use crate::held::{Held, run_folder};
use crate::procfs::{Processes, Role};

cases! {
    ALL_TWICE:
        garbled_seccomp_profile_is_named;
    PODHULL_ONCE:
        garbled_specs_are_named_and_leave_nothing;
}

/// Nothing of these waits for anything.
const AT_ONCE: Duration = Duration::from_secs(5);
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// What CRI passes on as it is: containerd does not know the actions.
async fn garbled_seccomp_profile_is_named(t: &Context) -> Result<()> {
    let profile = t.new_file("profile", r#"{"defaultAction": "SCMP_ACT_BOGUS"}"#)?;
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .security(|security| {
            security.seccomp = Some(SecurityProfile {
                profile_type: ProfileType::Localhost.into(),
                localhost_ref: profile,
            });
        })
        .create()
        .await?;
    let begin = Instant::now();
    let text = refusal(container.start().await, "an unknown action")?;
    let took = begin.elapsed();
    contains!(&text, "SCMP_ACT_BOGUS");
    contains!(text.to_lowercase(), "seccomp");
    ensure!(took < AT_ONCE, "refused only after {took:?}");
    same!(container.status().await?.reason, "StartError");
    container.remove().await?;
    let good = t.container(&pod, "good").idle().start().await?;
    good.exec(["true"]).await?.success()?;
    Ok(())
}

fn call() -> Call {
    context::with_timeout(i64::try_from(AT_ONCE.as_nanos()).unwrap_or(i64::MAX))
}

/// Code and words of a refusal.
fn refused<T>(answer: Result<T, Error>, what: &str) -> Result<(Code, String)> {
    match answer {
        Ok(_) => bail!("{what} was taken"),
        Err(Error::RpcStatus(status)) => Ok((status.code(), status.message)),
        Err(other) => bail!("{what}: {other}"),
    }
}

fn names(folder: &Path) -> Result<BTreeSet<OsString>> {
    let entries = fs::read_dir(folder).context("read a folder")?;
    entries.map(|entry| Ok(entry?.file_name())).collect()
}

async fn garbled_specs_are_named_and_leave_nothing(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    container.exec(["true"]).await?.success()?;
    let shim = Processes::of(pod.id())?.pid(Role::Shim)?;
    let run = run_folder(shim)?;
    let address = format!("unix://{}", run.join("shim.sock").display());
    let client = Client::connect(&address).await?;
    let tasks = TaskClient::new(client);
    // With its first request a connection gets what it keeps.
    garbled_processes(&tasks, container.id()).await?;
    let (held, files) = (Held::at_rest(shim).await?, names(&run)?);
    garbled_processes(&tasks, container.id()).await?;
    garbled_bundles(t, &tasks).await?;
    // Nothing is wrong with this one, but what it asks for is not offered.
    let request = CheckpointTaskRequest {
        id: container.id().into(),
        path: t.path("checkpoint"),
        ..CheckpointTaskRequest::default()
    };
    let (code, text) = refused(tasks.checkpoint(call(), &request).await, "a checkpoint")?;
    same!(code, Code::UNIMPLEMENTED, "{text}");
    contains!(&text, "Checkpoint");
    held.again(shim).await?;
    same!(names(&run)?, files, "the run folder");
    same!(
        container.shell("exit 3").await?.code,
        3,
        "an exec afterwards"
    );
    let next = t.container(&pod, "next").idle().start().await?;
    next.exec(["true"]).await?.success().map(drop)
}

async fn garbled_processes(tasks: &TaskClient, container: &str) -> Result<()> {
    for (spec, words) in [
        ("", &["line 1 column 0"][..]),
        ("\u{1}\u{2} no JSON", &["line 1 column 1"]),
        (
            "{\"cwd\": \"/\",\n\"args\": \"true\"}",
            &["args: ", "line 2 column "],
        ),
        (
            "{\"cwd\": \"/\", \"args\": [\"true\"], \"user\": {\"uid\": -1, \"gid\": 0}}",
            &["user.uid: "],
        ),
        (
            "{\"cwd\": \"/\", \"args\": [\"true\"], \"user\": {\"uid\": 0, \"gid\": 0},\
             \"rlimits\": [{\"type\": \"RLIMIT_BOGUS\", \"soft\": 1, \"hard\": 1}]}",
            &["rlimits[0].type: ", "RLIMIT_BOGUS"],
        ),
    ] {
        let any = Any {
            type_url: PROCESS.into(),
            value: spec.as_bytes().to_vec(),
            ..Any::default()
        };
        let request = ExecProcessRequest {
            id: container.into(),
            exec_id: "garbled".into(),
            spec: MessageField::some(any),
            ..ExecProcessRequest::default()
        };
        let (code, text) = refused(tasks.exec(call(), &request).await, spec)?;
        same!(code, Code::INVALID_ARGUMENT, "{text}");
        contains!(&text, "spec: ");
        for word in words {
            contains!(&text, *word);
        }
        is_unknown(tasks, container, "garbled").await?;
    }
    Ok(())
}

async fn garbled_bundles(t: &Context, tasks: &TaskClient) -> Result<()> {
    let bundle = t.new_folder("bundle")?;
    let file = t.path("bundle/config.json");
    for (spec, words) in [
        ("", &["line 1 column 0"][..]),
        (
            "{\"ociVersion\": \"1.0.2\",\n\"process\":",
            &["line 2 column "],
        ),
        (
            "{\"ociVersion\": \"1.0.2\", \"process\": {\"cwd\": \"/\",\n\
             \"user\": {\"uid\": \"x\", \"gid\": 0}}}",
            &["process.user.uid: ", "line 2 column "],
        ),
        (
            "{\"ociVersion\": \"1.0.2\", \"linux\": {\"namespaces\": [{\"type\": \"bogus\"}]}}",
            &["linux.namespaces[0].type: ", "bogus"],
        ),
    ] {
        fs::write(&file, spec)?;
        let (code, text) = refused(create(tasks, &bundle).await, spec)?;
        same!(code, Code::INVALID_ARGUMENT, "{text}");
        contains!(&text, &file);
        for word in words {
            contains!(&text, *word);
        }
        same!(names(Path::new(&bundle))?.len(), 1, "files in the bundle");
        is_unknown(tasks, "garbled", "").await?;
    }
    fs::remove_file(&file)?;
    let (_, text) = refused(create(tasks, &bundle).await, "an empty bundle")?;
    contains!(&text, &file);
    is_unknown(tasks, "garbled", "").await
}

async fn create(tasks: &TaskClient, bundle: &str) -> Result<(), Error> {
    let request = CreateTaskRequest {
        id: "garbled".into(),
        bundle: bundle.into(),
        ..CreateTaskRequest::default()
    };
    tasks.create(call(), &request).await.map(drop)
}

/// The shim does not know the process.
async fn is_unknown(tasks: &TaskClient, id: &str, exec_id: &str) -> Result<()> {
    let request = StateRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        ..StateRequest::default()
    };
    let (code, text) = refused(tasks.state(call(), &request).await, "its state")?;
    same!(code, Code::NOT_FOUND, "{text}");
    Ok(())
}
