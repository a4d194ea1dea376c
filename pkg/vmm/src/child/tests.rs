// SPDX-License-Identifier: Apache-2.0
//! Helpers that do not do as they should.

use std::os::unix::fs::PermissionsExt;

use super::*;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(10))
}

fn is_there(pid: Pid) -> bool {
    Path::new(&format!("/proc/{}", pid.as_raw_nonzero())).exists()
}

async fn start(helper: &Path, by: Deadline) -> Result<Child, VmmError> {
    Child::start("test", helper, "1000", &(), Streams::default(), by).await
}

/// A helper that is a shell script.
fn helper(folder: &Path, script: &str) -> std::path::PathBuf {
    let path = folder.join("helper");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[tokio::test]
async fn a_child_that_cannot_be_watched_is_killed_and_reaped() {
    let mut command = Command::new("sleep");
    command.arg("1000");
    let pid = spawn_on_lasting_thread(command).await.unwrap();
    let refused = Unreaped::adopt_with(pid, |_| Err(io::ErrorKind::Other.into()));
    assert!(refused.is_err());
    assert!(!is_there(pid));
}

#[tokio::test]
async fn a_helper_that_greets_is_the_child() {
    let folder = tempfile::tempdir().unwrap();
    let helper = helper(
        folder.path(),
        "printf x >&4; head -c 1 <&4 >/dev/null; exit 7",
    );
    let child = start(&helper, soon()).await.unwrap();
    assert_eq!(child.ended().await, "exit status: 7");
    assert!(child.has_ended());
}

#[tokio::test]
async fn a_helper_that_ends_without_a_word_is_named_with_its_last_words() {
    let folder = tempfile::tempdir().unwrap();
    let helper = helper(folder.path(), "echo no root >&2; exit 3");
    let error = start(&helper, soon()).await.unwrap_err().to_string();
    assert!(
        error.contains("exit status: 3") && error.contains("no root"),
        "{error}"
    );
}

#[tokio::test]
async fn a_helper_that_says_nothing_is_not_waited_for_ever() {
    let by = Deadline::after(Duration::from_millis(50));
    let error = start(Path::new("/bin/sleep"), by).await.unwrap_err();
    assert!(matches!(error, VmmError::ChildSlow { .. }), "{error}");
}

/// As a jail does before it greets: another child of ours, of the same group.
#[tokio::test]
async fn the_second_process_of_a_helper_that_says_nothing_is_reaped() {
    let folder = tempfile::tempdir().unwrap();
    let noted = folder.path().join("pid");
    let clone = libc::SYS_clone;
    let flags = libc::CLONE_PARENT | libc::SIGCHLD;
    let second = "open(F, '>', shift); print F $$; close F; sleep 1000";
    let script = format!(
        "exec perl -e \"if (syscall({clone}, {flags}, 0, 0, 0, 0) == 0) {{ {second} }}\" '{}'",
        noted.display()
    )
    .replace('$', "\\$");
    let helper = helper(folder.path(), &script);
    let by = Deadline::after(Duration::from_secs(4));
    let error = start(&helper, by).await.unwrap_err();
    assert!(matches!(error, VmmError::ChildSlow { .. }), "{error}");
    let pid = std::fs::read_to_string(&noted).unwrap();
    let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
    assert!(!is_there(pid), "it runs, or is a zombie");
}

#[tokio::test]
async fn a_child_that_the_kernel_does_not_end_is_not_waited_for() {
    let pid = Pid::from_raw(i32::MAX).unwrap();
    let reaping = in_time(pid, tokio::spawn(std::future::pending()));
    let reaped = soon().run(reaping).await.expect("it is waited for");
    assert_eq!(reaped.unwrap_err().kind(), io::ErrorKind::TimedOut);
}
