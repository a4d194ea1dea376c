// SPDX-License-Identifier: Apache-2.0
//! Finding a program as runc does, and failing in its words.
//!
//! The messages are those of Go's `os/exec` that runc passes on, because people
//! and programs match on them.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::sys;

/// What is looked through if the environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

enum Found {
    Executable,
    Directory,
    NotExecutable,
    Absent(io::Error),
}

fn look(path: &Path) -> Found {
    match fs::metadata(path) {
        Ok(file) if file.is_dir() => Found::Directory,
        Ok(file) if file.permissions().mode() & 0o111 != 0 => Found::Executable,
        Ok(_) => Found::NotExecutable,
        Err(error) => Found::Absent(error),
    }
}

/// The words for an error number, as Go says them.
pub(crate) fn words(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT) => "no such file or directory".into(),
        Some(libc::EACCES) => "permission denied".into(),
        Some(libc::ENOTDIR) => "not a directory".into(),
        Some(libc::ENOEXEC) => "exec format error".into(),
        Some(libc::EISDIR) => "is a directory".into(),
        Some(libc::EPERM) => "operation not permitted".into(),
        Some(number) => nix::errno::Errno::from_raw(number).desc().to_lowercase(),
        None => error.to_string(),
    }
}

/// The program that `name` means, looked up in `env`'s PATH if it has no slash.
///
/// # Errors
/// runc's words.
pub fn program(name: &str, env: &[String]) -> Result<PathBuf, String> {
    let failed = |why: &str| Err(format!("exec: {name:?}: {why}"));
    if name.contains('/') {
        let path = PathBuf::from(name);
        return match look(&path) {
            Found::Executable => Ok(path),
            Found::Directory => failed("is a directory"),
            Found::NotExecutable => failed("permission denied"),
            Found::Absent(error) => failed(&format!("stat {name}: {}", words(&error))),
        };
    }
    let path = env
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="));
    for folder in path.unwrap_or(DEFAULT_PATH).split(':') {
        let folder = if folder.is_empty() { "." } else { folder };
        let candidate = Path::new(folder).join(name);
        if matches!(look(&candidate), Found::Executable) {
            return Ok(candidate);
        }
    }
    failed("executable file not found in $PATH")
}

/// Becomes `program`. Returns only if that fails, with runc's words.
#[must_use]
pub fn execute(program: &Path, args: &[String], env: &[String]) -> String {
    let shown = program.display();
    let c_strings = |texts: &[String]| {
        texts
            .iter()
            .map(|text| CString::new(text.as_str()))
            .collect::<Result<Vec<_>, _>>()
    };
    let path = CString::new(program.to_string_lossy().as_bytes());
    match (path, c_strings(args), c_strings(env)) {
        (Ok(path), Ok(args), Ok(env)) => {
            if let Err(error) = sys::default_broken_pipe() {
                return format!("exec {shown}: {}", words(&error));
            }
            let Err(errno) = nix::unistd::execve(&path, &args, &env);
            format!("exec {shown}: {}", words(&errno.into()))
        }
        _ => format!("exec {shown}: invalid argument"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(path: &str) -> Vec<String> {
        vec![format!("PATH={path}")]
    }

    #[test]
    fn names_are_looked_up_in_the_path() {
        assert_eq!(
            program("sh", &env("/nonexistent:/bin")).unwrap(),
            Path::new("/bin/sh")
        );
        assert!(program("sh", &[]).is_ok(), "a default path is used");
        assert_eq!(program("/bin/sh", &[]).unwrap(), Path::new("/bin/sh"));
    }

    #[test]
    fn failures_have_runcs_words() {
        let says = |name: &str| program(name, &env("/bin:/usr/bin")).unwrap_err();
        assert_eq!(
            says("nope"),
            "exec: \"nope\": executable file not found in $PATH"
        );
        assert_eq!(
            says("/nope"),
            "exec: \"/nope\": stat /nope: no such file or directory"
        );
        assert_eq!(says("/etc"), "exec: \"/etc\": is a directory");
        assert_eq!(
            says("/etc/passwd"),
            "exec: \"/etc/passwd\": permission denied"
        );
    }

    #[test]
    fn what_is_no_program_fails_at_the_execution() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x");
        fs::write(&file, "\x7fELF garbage").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(execute(&file, &["x".into()], &[]).ends_with(": exec format error"));
    }
}
