// SPDX-License-Identifier: Apache-2.0
//! What a container's process is started with.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use podhull_testkit::cri::api::Int64Value;

use crate::case::{cases, contains, same};
use crate::context::{Context, refusal, text_of};

cases! {
    ALL_TWICE:
        container_environment_arguments_and_folder_are_set,
        container_absent_folder_is_created,
        container_absent_folder_is_created_in_its_volume,
        container_folder_of_root_is_entered_for_others,
        container_users_and_groups_are_applied,
        container_unknown_user_is_refused,
        container_with_a_terminal_has_one;
    ALL:
        container_entrypoint_that_cannot_run_is_refused,
        container_without_a_command_runs_the_images;
}

async fn container_environment_arguments_and_folder_are_set(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let builder = t
        .container(&pod, "main")
        .env("GREETING", "good day = \"fine\"")
        .env("EMPTY", "")
        .edit(|config| {
            config.command = [
                "sh",
                "-c",
                "printf '%s|' \"$@\" \"$GREETING\" \"${EMPTY-unset}\"; pwd",
            ]
            .map(str::to_owned)
            .into();
            config.args = ["sh", "one", "two words", "", "*"]
                .map(str::to_owned)
                .into();
            config.working_dir = "/home/alice".into();
        });
    let container = builder.start().await?;
    let log = container.wrote("alice", Duration::from_secs(20)).await?;
    same!(
        log.text(),
        "one|two words||*|good day = \"fine\"||/home/alice"
    );
    let path = text_of(
        t.container(&pod, "path"),
        "echo $PATH; ls -d /proc/self/fd/* | wc -l",
    )
    .await?;
    contains!(path, "/usr/bin:/bin:/usr/sbin:/sbin");
    Ok(())
}

async fn container_absent_folder_is_created(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let builder = t
        .container(&pod, "main")
        .edit(|config| config.working_dir = "/new/folder/below".into());
    let text = text_of(builder, "pwd; stat -c '%u %a' .").await?;
    same!(text, "/new/folder/below\n0 755");
    Ok(())
}

async fn container_absent_folder_is_created_in_its_volume(t: &Context) -> Result<()> {
    let volume = t.new_folder("work")?;
    let pod = t.ready_pod().await?;
    let builder = t
        .container(&pod, "main")
        .mount(&volume, "/work", false)
        .edit(|config| config.working_dir = "/work/source/deep".into());
    let text = text_of(builder, "pwd; stat -c '%u %a' .; touch here").await?;
    same!(text, "/work/source/deep\n0 755");
    same!(
        Path::new(&volume).join("source/deep/here").exists(),
        true,
        "it is in the volume"
    );
    Ok(())
}

/// As runc: the folder is entered before the user is set.
async fn container_folder_of_root_is_entered_for_others(t: &Context) -> Result<()> {
    let folder = t.new_folder("roots")?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))?;
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .mount(&folder, "/roots", false)
        .edit(|config| config.working_dir = "/roots".into())
        .security(|security| security.run_as_user = Some(Int64Value { value: 1000 }))
        .shell("readlink /proc/self/cwd; ls || sleep 1000000")
        .start()
        .await?;
    container.wrote("/roots", Duration::from_secs(20)).await?;
    let exec = container
        .shell("id -u; readlink /proc/self/cwd; ls")
        .await?;
    same!(exec.text(), "1000\n/roots");
    contains!(exec.error_text(), "Permission denied");
    Ok(())
}

async fn container_users_and_groups_are_applied(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let mut number = 0;
    let mut builder = || {
        number += 1;
        t.container(&pod, "main").attempt(number)
    };
    const SCRIPT: &str = "echo $(id -u) $(id -g) $(id -G); whoami 2>/dev/null || true";
    let some = |value| Some(Int64Value { value });
    let root = text_of(builder(), SCRIPT).await?;
    same!(root, "0 0 0\nroot");
    let by_number = builder().security(|security| security.run_as_user = some(1000));
    same!(
        text_of(by_number, SCRIPT).await?,
        "1000 1000 1000 2000\nalice"
    );
    let by_name = builder().security(|security| security.run_as_username = "alice".into());
    same!(
        text_of(by_name, SCRIPT).await?,
        "1000 1000 1000 2000\nalice"
    );
    let nobody = builder().security(|security| {
        security.run_as_user = some(4242);
        security.run_as_group = some(4343);
        security.supplemental_groups = vec![5001, 5002];
    });
    same!(
        text_of(nobody, "id -u; id -g; id -G").await?,
        "4242\n4343\n4343 5001 5002"
    );
    Ok(())
}

async fn container_unknown_user_is_refused(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let builder = t
        .container(&pod, "main")
        .idle()
        .security(|security| security.run_as_username = "mallory".into());
    let text = refusal(builder.start().await, "an unknown user")?;
    contains!(&text, "no users found");
    Ok(())
}

async fn container_with_a_terminal_has_one(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let builder = t.container(&pod, "main").edit(|config| {
        config.tty = true;
        config.stdin = true;
    });
    let script = "for fd in 0 1 2; do test -t $fd && echo tty; done; tty; echo err >&2; sleep 0.1";
    let container = builder.shell(script).start().await?;
    let log = container.wrote("err", Duration::from_secs(20)).await?;
    // A terminal is one stream, with its own line ends.
    let text = String::from_utf8_lossy(&log.stdout).replace('\r', "");
    same!(text, "tty\ntty\ntty\n/dev/pts/0\nerr\n");
    ensure!(log.stderr.is_empty(), "{:?}", log.error_text());
    same!(
        container.exited(Duration::from_secs(20)).await?.exit_code,
        0
    );
    Ok(())
}

async fn container_entrypoint_that_cannot_run_is_refused(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    for (attempt, (command, says)) in [
        (
            "no-such-command",
            &["executable file not found in $path"][..],
        ),
        ("/no/such/file", &["no such file or directory"]),
        ("/etc/not-executable", &["permission denied"]),
        // runc before and since 1.2.
        ("/etc", &["permission denied", "is a directory"]),
    ]
    .into_iter()
    .enumerate()
    {
        let builder = t.container(&pod, "main").attempt(u32::try_from(attempt)?);
        let container = builder.command([command]).create().await?;
        let text = refusal(container.start().await, command)?;
        let text = text.to_lowercase();
        contains!(&text, command);
        ensure!(
            says.iter().any(|words| text.contains(words)),
            "none of {says:?} in: {text}"
        );
        let status = container.status().await?;
        same!(status.exit_code, 128, "exit code of {command}");
        same!(status.reason, "StartError", "reason of {command}");
        container.remove().await?;
    }
    let last = t.container(&pod, "last").idle().start().await?;
    last.exec(["true"]).await?.success()?;
    Ok(())
}

async fn container_without_a_command_runs_the_images(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    // The image's command is a shell, which ends at the end of its input.
    let container = t.container(&pod, "main").start().await?;
    let status = container.exited(Duration::from_secs(20)).await?;
    same!(status.exit_code, 0);
    let container = t
        .container(&pod, "arguments")
        .edit(|config| config.args = ["echo", "from", "args"].map(str::to_owned).into())
        .start()
        .await?;
    container
        .wrote("from args", Duration::from_secs(20))
        .await?;
    Ok(())
}
