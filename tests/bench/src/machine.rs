// SPDX-License-Identifier: Apache-2.0
//! Where the figures were taken.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use podhull_testkit::cri::api;
use podhull_testkit::{Containerd, Node};

use crate::floor::Floor;

const VERSION: &[&str] = &["--version"];

/// The machine and the programs.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) date: String,
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory: String,
    pub(crate) kernel: String,
    pub(crate) load: String,
    pub(crate) containerd: String,
    pub(crate) runc: String,
    /// QEMU, its acceleration, and the guest's files; none without a VM.
    pub(crate) vmm: Option<String>,
    qemu: PathBuf,
    guest: String,
}

impl Machine {
    pub(crate) fn look(node: &Node) -> Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
        let meminfo = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
        let programs = node.programs();
        Ok(Self {
            date: first_line(Path::new("date"), &["-u", "+%F %R UTC"])?,
            cpu: field(&cpuinfo, "model name").unwrap_or("unknown").into(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory: field(&meminfo, "MemTotal").unwrap_or("unknown").into(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .context("read the kernel's release")?
                .trim()
                .into(),
            load: Self::load()?,
            containerd: String::new(),
            runc: first_line(Path::new("runc"), VERSION)?,
            vmm: None,
            qemu: programs.qemu.clone(),
            guest: format!(
                "kernel {}, initramfs {}",
                size(&programs.kernel),
                size(&programs.initramfs)
            ),
        })
    }

    pub(crate) async fn see_containerd(&mut self, containerd: &Containerd) -> Result<()> {
        let version = containerd
            .client()
            .runtime()
            .version(api::VersionRequest::default())
            .await
            .context("Version")?;
        self.containerd = version.into_inner().runtime_version;
        Ok(())
    }

    pub(crate) fn see_vmm(&mut self, floor: &Floor) -> Result<()> {
        self.vmm = Some(format!(
            "{}, accel={}; {}",
            first_line(&self.qemu, VERSION)?,
            floor.acceleration(),
            self.guest
        ));
        Ok(())
    }

    /// The load averages over 1, 5 and 15 minutes.
    pub(crate) fn load() -> Result<String> {
        let text = fs::read_to_string("/proc/loadavg").context("read /proc/loadavg")?;
        let averages: Vec<&str> = text.split_whitespace().take(3).collect();
        Ok(averages.join(" "))
    }
}

/// The value of the first line `key : value`.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find_map(|(name, value)| (name.trim() == key).then_some(value.trim()))
}

/// The first line of what a program says.
fn first_line(program: &Path, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("run {}", program.display()))?;
    ensure!(
        output.status.success(),
        "{} {}: {}",
        program.display(),
        args.join(" "),
        output.status
    );
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

fn size(path: &Path) -> String {
    match fs::metadata(path) {
        Ok(meta) => format!("{} KiB", meta.len() >> 10),
        Err(error) => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "model\t\t: 1\nmodel name\t: A B\n";
        assert_eq!(field(text, "model name"), Some("A B"));
        assert_eq!(field(text, "name"), None);
    }
}
