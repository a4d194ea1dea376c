// SPDX-License-Identifier: Apache-2.0
//! The floor: the same kernel and initramfs under the same QEMU, without the
//! shim, without containerd and without the devices that have a backend.
//!
//! The command is made from that of a running pod's VMM, so that the two
//! cannot come apart. The agent finds no port for READY on its command line,
//! says so on the console and ends the VM: its first line is the end of the
//! boot.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podhull_testkit::evidence;
use podhull_testkit::programs::Programs;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

/// A guest that says nothing in this time does not boot.
const BOOT_WITHIN: Duration = Duration::from_secs(120);
/// What the values of options that have a backend of their own contain.
const BACKENDS: [&str; 5] = ["vhost-", "socket,", "tap,", "virtio-net", "qmp"];
/// Of the kernel's words this one tells the agent whom to dial.
const READY_PORT: &str = podhull_types::VsockPort::READY_WORD;

/// A QEMU command that boots a guest and ends with it.
#[derive(Debug)]
pub(crate) struct Floor {
    program: PathBuf,
    args: Vec<String>,
}

/// The moments of one boot, since QEMU was started.
#[derive(Debug)]
pub(crate) struct Boot {
    /// The agent's first line on the console.
    pub(crate) first_line: Duration,
    /// QEMU's end.
    pub(crate) end: Duration,
}

impl Floor {
    /// The command of a VMM as it was found, less what it cannot have alone.
    pub(crate) fn like(vmm: &[String], programs: &Programs) -> Result<Self> {
        let args = bare(vmm, programs);
        ensure!(
            args.iter().any(|arg| arg == "-kernel") && args.iter().any(|arg| arg == "-append"),
            "the VMM's command is not understood: {vmm:?}"
        );
        Ok(Self {
            program: programs.qemu.clone(),
            args,
        })
    }

    /// `kvm` or `tcg`.
    pub(crate) fn acceleration(&self) -> &'static str {
        if self.args.iter().any(|arg| arg.contains("accel=kvm")) {
            "kvm"
        } else {
            "tcg"
        }
    }

    /// As it would be typed.
    pub(crate) fn shell_command(&self) -> String {
        let mut line = self.program.display().to_string();
        for arg in &self.args {
            line.push(' ');
            if arg.contains(' ') {
                line += &format!("'{arg}'");
            } else {
                line += arg;
            }
        }
        line
    }

    /// Boots once.
    pub(crate) async fn boot(&self) -> Result<Boot> {
        tokio::time::timeout(BOOT_WITHIN, self.boot_without_limit())
            .await
            .with_context(|| format!("no end of the guest after {BOOT_WITHIN:?}"))?
    }

    async fn boot_without_limit(&self) -> Result<Boot> {
        let begin = Instant::now();
        let mut child = Command::new(&self.program)
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {}", self.program.display()))?;
        let stdout = child.stdout.take().context("QEMU's console")?;
        let mut lines = BufReader::new(stdout).lines();
        let mut first_line = None;
        let mut console = String::new();
        while let Some(line) = lines.next_line().await.context("read the console")? {
            if line.contains("podhull-agent") {
                first_line.get_or_insert_with(|| begin.elapsed());
            }
            console += &line;
            console.push('\n');
        }
        let output = child.wait_with_output().await.context("wait for QEMU")?;
        let end = begin.elapsed();
        let first_line = first_line.with_context(|| {
            format!(
                "the agent said nothing; QEMU: {} {}\nconsole: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim(),
                evidence::last(&console, 20)
            )
        })?;
        Ok(Boot { first_line, end })
    }
}

fn bare(vmm: &[String], programs: &Programs) -> Vec<String> {
    let mut args = Vec::new();
    let mut rest = vmm.iter().skip(1).peekable();
    while let Some(option) = rest.next() {
        let value = rest.next_if(|next| !next.starts_with('-'));
        let value = match (option.as_str(), value) {
            // The jail shows these under other names.
            ("-kernel", _) => Some(programs.kernel.display().to_string()),
            ("-initrd", _) => Some(programs.initramfs.display().to_string()),
            ("-append", Some(words)) => {
                let words: Vec<&str> = words
                    .split_whitespace()
                    .filter(|word| !word.starts_with(READY_PORT))
                    .collect();
                Some(words.join(" "))
            }
            ("-name", _) => Some("podhull-floor".into()),
            (_, Some(value)) if BACKENDS.iter().any(|backend| value.contains(backend)) => continue,
            (_, value) => value.cloned(),
        };
        args.push(option.clone());
        args.extend(value);
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_backend_is_left_out_and_the_rest_stays() {
        let vmm = "qemu|-nodefaults|-name|podhull-x|-M|microvm,accel=tcg|-kernel|/vm-kernel|-append|\
            quiet podhull.ready_port=1024 panic=-1|-chardev|stdio,id=console|-chardev|socket,id=fs,fd=4|\
            -device|vhost-user-fs-device,chardev=fs|-netdev|tap,id=net,fd=6|-device|virtio-net-device,netdev=net|\
            -device|virtconsole,chardev=console|-no-reboot";
        let vmm: Vec<String> = vmm.split('|').map(str::to_owned).collect();
        let mut programs = Programs::find();
        programs.kernel = "/k".into();
        let floor = Floor::like(&vmm, &programs).unwrap();
        assert_eq!(
            floor.args.join("|"),
            "-nodefaults|-name|podhull-floor|-M|microvm,accel=tcg|-kernel|/k|-append|quiet panic=-1|\
             -chardev|stdio,id=console|-device|virtconsole,chardev=console|-no-reboot"
        );
        assert_eq!(floor.acceleration(), "tcg");
        assert!(floor.shell_command().contains(" -append 'quiet panic=-1' "));
        assert!(Floor::like(&vmm[..3], &programs).is_err());
    }
}
