// SPDX-License-Identifier: Apache-2.0
//! What a container's process is started with.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use podhull_testkit::cri::api::{Int64Value, SupplementalGroupsPolicy};
use podhull_testkit::image::USR1;

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
        container_with_a_terminal_has_one,
        container_score_for_the_oom_killer_is_set,
        container_is_stopped_by_its_images_signal,
        container_message_of_its_end_is_left_on_the_node;
    ALL_24:
        container_groups_of_the_image_are_left_out_if_strict;
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

async fn container_groups_of_the_image_are_left_out_if_strict(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    for (name, policy, groups) in [
        ("merge", SupplementalGroupsPolicy::Merge, "1000 2000 5001"),
        ("strict", SupplementalGroupsPolicy::Strict, "1000 5001"),
    ] {
        let container = t.container(&pod, name).idle().security(|security| {
            security.run_as_user = Some(Int64Value { value: 1000 });
            security.supplemental_groups = vec![5001];
            security.set_supplemental_groups_policy(policy);
        });
        let container = container.start().await?;
        let init = "grep ^Groups: /proc/1/status | cut -f2 | tr ' ' '\\n' | sort -n | xargs";
        let exec = "id -G | tr ' ' '\\n' | sort -n | xargs";
        same!(container.shell(init).await?.text(), groups, "{name}, init");
        same!(container.shell(exec).await?.text(), groups, "{name}, exec");
        let user = container.status().await?.user.and_then(|user| user.linux);
        let reported = user.map(|mut user| {
            user.supplemental_groups.sort_unstable();
            (user.uid, user.gid, user.supplemental_groups)
        });
        let expected = groups.split(' ').map(str::parse);
        let expected = expected.collect::<Result<Vec<i64>, _>>()?;
        same!(reported, Some((1000, 1000, expected)), "{name}, reported");
    }
    Ok(())
}

async fn container_score_for_the_oom_killer_is_set(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    for (attempt, score) in [(0, 0), (1, 937)] {
        let builder = t.container(&pod, "main").attempt(attempt).idle();
        let builder = builder.resources(|resources| resources.oom_score_adj = score);
        let container = builder.start().await?;
        for process in ["1", "self"] {
            let file = format!("/proc/{process}/oom_score_adj");
            let seen = container.exec(["cat", &file]).await?.success()?.text();
            same!(seen, score.to_string(), "of {process}");
        }
        container.stop(0).await?;
    }
    Ok(())
}

async fn container_is_stopped_by_its_images_signal(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .edit(|config| config.image.get_or_insert_default().image = USR1.into())
        .shell("trap 'echo usr1; exit 8' USR1; trap 'echo term; exit 9' TERM; echo up; while :; do sleep 1000 & wait $!; done")
        .start()
        .await?;
    container.wrote("up", Duration::from_secs(20)).await?;
    container.stop(20).await?;
    same!(container.status().await?.exit_code, 8);
    same!(container.log()?.text(), "up\nusr1");
    Ok(())
}

/// The kubelet makes a file, mounts it where the container's message is to be, and
/// reads it when the container has ended.
async fn container_message_of_its_end_is_left_on_the_node(t: &Context) -> Result<()> {
    let message = t.new_file("message", "")?;
    fs::set_permissions(&message, fs::Permissions::from_mode(0o666))?;
    let pod = t.ready_pod().await?;
    let builder = t
        .container(&pod, "main")
        .mount(&message, "/dev/termination-log", false)
        .security(|security| security.run_as_user = Some(Int64Value { value: 1000 }))
        .shell("printf 'no %s left' space >/dev/termination-log; exit 3");
    let (_, status) = builder.run().await?;
    same!(status.exit_code, 3);
    same!(fs::read_to_string(&message)?, "no space left");
    let listed = status
        .mounts
        .iter()
        .find(|mount| mount.host_path == message);
    same!(
        listed.map(|mount| &*mount.container_path),
        Some("/dev/termination-log")
    );
    Ok(())
}
