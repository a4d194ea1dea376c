// SPDX-License-Identifier: Apache-2.0
//! podhull's configuration file, by default `/etc/podhull/config.toml`.
//!
//! Every key has a default, an absent file means all defaults, and a key that
//! is not known is an error: a misspelt setting must not pass silently. The
//! file's place is fixed: neither a pod nor the environment can move it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use tracing_subscriber::EnvFilter;

/// Where the file is.
pub const PATH: &str = "/etc/podhull/config.toml";

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is there and cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file is not text or not TOML, or a key is unknown or has a wrong
    /// value. The message names line and key.
    #[error("{}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        message: String,
    },
    /// A value is outside its range.
    #[error("{}: line {line}: {key} = {value}: {expected}", path.display())]
    Range {
        /// The file.
        path: PathBuf,
        /// The key's line in it.
        line: usize,
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
}

/// All settings.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Guest kernel: an uncompressed ELF with a PVH entry, or a bzImage.
    pub kernel: PathBuf,
    /// Guest initramfs, holding the agent as `/init`.
    pub initramfs: PathBuf,
    /// QEMU's program.
    pub qemu: PathBuf,
    /// The vhost-user vsock daemon, used where the host has no /dev/vhost-vsock.
    pub vsock_daemon: PathBuf,
    /// Folder for the sandboxes' sockets and shared trees.
    pub run_dir: PathBuf,
    /// Run pods without KVM where it does not work. Emulation is slow and not
    /// an isolation boundary: for tests and demonstrations only.
    pub allow_emulation: bool,
    /// Memory of a VM whose pod has no limit, in MiB.
    pub default_memory_mib: u32,
    /// Added to a pod's memory limit for the guest's kernel and agent, in MiB.
    pub guest_overhead_mib: u32,
    /// vCPUs of a VM whose pod has no CPU limit.
    pub default_vcpus: u32,
    /// Most vCPUs a VM gets.
    pub max_vcpus: u32,
    /// Time from the VMM's start to the agent's READY, in seconds. Emulation
    /// gets three times as much.
    pub boot_timeout_seconds: u64,
    /// Time for one call to the agent, in seconds. Emulation gets three times
    /// as much.
    pub call_timeout_seconds: u64,
    /// Time for the ordered teardown of a sandbox, in seconds.
    pub stop_timeout_seconds: u64,
    /// Interval of the heartbeat, in seconds. A guest that misses one is
    /// suspect: new calls fail fast.
    pub heartbeat_seconds: u64,
    /// A guest that is silent for this long is dead, in seconds.
    pub dead_after_seconds: u64,
    /// First of the 2^28 user and group ids from which each VM gets one of its
    /// own. 0 runs VMMs as root, without capabilities.
    pub first_vm_uid: u32,
    /// Bytes of the guest's console that are kept.
    pub console_bytes: usize,
    /// Log filter, e.g. `info` or `podhull_sandbox=debug,info`.
    pub log: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kernel: "/usr/lib/podhull/vmlinux".into(),
            initramfs: "/usr/lib/podhull/initramfs.cpio".into(),
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            vsock_daemon: "/usr/lib/podhull/vhost-device-vsock".into(),
            run_dir: "/run/podhull".into(),
            allow_emulation: false,
            default_memory_mib: 256,
            guest_overhead_mib: 64,
            default_vcpus: 1,
            max_vcpus: 32,
            boot_timeout_seconds: 10,
            call_timeout_seconds: 30,
            stop_timeout_seconds: 20,
            heartbeat_seconds: 5,
            dead_after_seconds: 60,
            first_vm_uid: 0x7000_0000,
            console_bytes: 64 * 1024,
            log: "info".into(),
        }
    }
}

impl Config {
    /// Reads the file at `path`; an absent file gives the defaults.
    ///
    /// # Errors
    /// [`ConfigError`] naming the key and its line.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        match fs::read(path) {
            Ok(bytes) => Self::parse(&bytes, path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read {
                path: path.into(),
                source,
            }),
        }
    }

    fn parse(bytes: &[u8], path: &Path) -> Result<Self, ConfigError> {
        let wrong = |message| ConfigError::Parse {
            path: path.into(),
            message,
        };
        let text = str::from_utf8(bytes).map_err(|error| {
            let (line, shown) = line_at(error.valid_up_to(), bytes);
            wrong(format!("line {line}: not UTF-8: {shown}"))
        })?;
        let config: Self =
            toml::from_str(text).map_err(|error| wrong(error.to_string().trim_end().to_owned()))?;
        config.check(text, path)?;
        Ok(config)
    }

    fn check(&self, text: &str, path: &Path) -> Result<(), ConfigError> {
        let check = |fine: bool, key, value: String, expected| {
            if fine {
                return Ok(());
            }
            Err(ConfigError::Range {
                path: path.into(),
                line: line_of(key, text),
                key,
                value,
                expected,
            })
        };
        let memory = self.default_memory_mib;
        check(
            (96..=1 << 20).contains(&memory),
            "default_memory_mib",
            memory.to_string(),
            "expected 96 to 1048576",
        )?;
        let vcpus = self.max_vcpus;
        check(
            (1..=64).contains(&vcpus),
            "max_vcpus",
            vcpus.to_string(),
            "expected 1 to 64",
        )?;
        let vcpus = self.default_vcpus;
        check(
            (1..=self.max_vcpus).contains(&vcpus),
            "default_vcpus",
            vcpus.to_string(),
            "expected 1 to max_vcpus",
        )?;
        for (key, value) in [
            ("boot_timeout_seconds", self.boot_timeout_seconds),
            ("call_timeout_seconds", self.call_timeout_seconds),
            ("stop_timeout_seconds", self.stop_timeout_seconds),
            ("heartbeat_seconds", self.heartbeat_seconds),
            ("dead_after_seconds", self.dead_after_seconds),
        ] {
            let fine = (1..=3600).contains(&value);
            check(fine, key, value.to_string(), "expected 1 to 3600")?;
        }
        let console = self.console_bytes;
        check(
            (1024..=16 << 20).contains(&console),
            "console_bytes",
            console.to_string(),
            "expected 1024 to 16777216",
        )?;
        for (key, value) in [
            ("kernel", &self.kernel),
            ("initramfs", &self.initramfs),
            ("qemu", &self.qemu),
            ("vsock_daemon", &self.vsock_daemon),
            ("run_dir", &self.run_dir),
        ] {
            let shown = value.display().to_string();
            check(value.is_absolute(), key, shown, "expected an absolute path")?;
        }
        check(
            self.first_vm_uid == 0 || (65_536..=0x8000_0000).contains(&self.first_vm_uid),
            "first_vm_uid",
            self.first_vm_uid.to_string(),
            "expected 0, or 65536 to 2147483648",
        )?;
        // A socket's path must fit 108 bytes: <run_dir>/<16>/vm/vsock_4294967295.
        let run_dir = self.run_dir.as_os_str().len();
        check(
            run_dir <= 60,
            "run_dir",
            self.run_dir.display().to_string(),
            "expected at most 60 bytes",
        )?;
        check(
            EnvFilter::try_new(&self.log).is_ok(),
            "log",
            self.log.clone(),
            "expected a filter such as `info` or `podhull_sandbox=debug,info`",
        )
    }

    /// How much longer things may take under `emulated` guests.
    fn scale(seconds: u64, emulated: bool) -> Duration {
        Duration::from_secs(if emulated { seconds * 3 } else { seconds })
    }

    /// Time from the VMM's start to READY.
    #[must_use]
    pub fn boot_timeout(&self, emulated: bool) -> Duration {
        Self::scale(self.boot_timeout_seconds, emulated)
    }

    /// Time for one call to the agent.
    #[must_use]
    pub fn call_timeout(&self, emulated: bool) -> Duration {
        Self::scale(self.call_timeout_seconds, emulated)
    }

    /// Time for a sandbox's teardown.
    #[must_use]
    pub fn stop_timeout(&self) -> Duration {
        Duration::from_secs(self.stop_timeout_seconds)
    }
}

/// The line of `key` in `text`, which is TOML. Defaults are in their ranges: a
/// key whose value is not is there.
fn line_of(key: &str, text: &str) -> usize {
    let table = toml::de::DeTable::parse(text).ok();
    let found = table.as_ref().and_then(|table| {
        let (name, _) = table.get_ref().get_key_value(key)?;
        text.get(..name.span().start)
    });
    found.map_or(0, |before| before.matches('\n').count() + 1)
}

/// The number and the text of the line that holds the byte at `position`.
fn line_at(position: usize, bytes: &[u8]) -> (usize, String) {
    let newline = |byte: &u8| *byte == b'\n';
    let before = bytes.iter().take(position).filter(|byte| newline(byte));
    let before = before.count();
    let line = bytes.split(newline).nth(before).unwrap_or_default();
    (before + 1, String::from_utf8_lossy(line).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: impl AsRef<[u8]>) -> Result<Config, ConfigError> {
        Config::parse(text.as_ref(), Path::new("/etc/podhull/config.toml"))
    }

    #[test]
    fn an_absent_file_means_defaults() {
        assert_eq!(
            Config::load(Path::new("/nonexistent/x.toml")).unwrap(),
            Config::default()
        );
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn the_page_has_every_key_with_its_default() {
        let here = std::env::var("CARGO_MANIFEST_DIR").unwrap();
        let page = Path::new(&here).join("../../docs/install.md");
        let page = std::fs::read_to_string(page).unwrap();
        let blocks = page.split("```toml\n").skip(1);
        let blocks = blocks.filter_map(|block| block.split("```").next());
        let keys = |block: &str| block.lines().filter(|line| line.contains(" = ")).count();
        let block = blocks.max_by_key(|block| keys(block)).unwrap();
        assert_eq!(parse(block).unwrap(), Config::default());
        let shown = format!("{:?}", Config::default());
        assert_eq!(keys(block), shown.matches(": ").count(), "{shown}");
    }

    /// With KVM: the wait for the guest, and then its teardown.
    #[test]
    fn a_guest_that_never_comes_up_is_told_of_within_30_s() {
        let config = Config::default();
        let told = config.boot_timeout(false) + config.stop_timeout();
        assert!(told <= Duration::from_secs(30), "{told:?}");
    }

    #[test]
    fn keys_override_defaults() {
        let config = parse("allow_emulation = true\ndefault_memory_mib = 512\n").unwrap();
        assert!(config.allow_emulation);
        assert_eq!(config.default_memory_mib, 512);
        assert_eq!(config.qemu, Config::default().qemu);
    }

    #[test]
    fn errors_name_the_line_and_the_key() {
        let error = parse("allow_emulation = true\nkernell = \"/x\"\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("line 2") && error.contains("kernell"),
            "{error}"
        );
        let error = parse("\n\ndefault_vcpus = \"two\"\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("line 3") && error.contains("default_vcpus"),
            "{error}"
        );
        let error = parse("kernel = [\n").unwrap_err().to_string();
        assert!(error.contains("line 1"), "{error}");
    }

    #[test]
    fn values_out_of_range_name_the_line_the_key_and_the_range() {
        for (text, line, key) in [
            ("default_memory_mib = 8", 1, "default_memory_mib"),
            (
                "log = \"\"\"\nmax_vcpus = 65\"\"\"\n\nmax_vcpus = 65",
                4,
                "max_vcpus",
            ),
            (
                "# heartbeat_seconds = 0\n\"heartbeat_seconds\" = 0",
                2,
                "heartbeat_seconds",
            ),
            ("max_vcpus = 2\n\n default_vcpus = 3", 3, "default_vcpus"),
            ("qemu = \"/kernel\"\nkernel = \"vmlinux\"", 2, "kernel"),
            ("max_vcpus = 2\nlog = \"podhull_shim=loud\"", 2, "log"),
            ("# log\nlog = \"[{\"", 2, "log"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            let place = format!("line {line}: {key} = ");
            assert!(
                error.contains(&place) && error.contains("expected"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_file_that_is_no_text_names_the_line_and_what_it_says() {
        for (bytes, line, says) in [
            (
                &b"\n\nkernel = \"/v\xffx\"\nmax_vcpus = 0"[..],
                3,
                "kernel = ",
            ),
            (b"qemu\n\xfe", 2, ""),
            (b"\xc3", 1, ""),
        ] {
            let error = parse(bytes).unwrap_err().to_string();
            let place = format!("line {line}: not UTF-8: {says}");
            assert!(error.contains(&place), "{error}");
        }
    }

    #[test]
    fn log_filters_are_what_the_log_understands() {
        for filter in [
            "",
            "info",
            "podhull_sandbox=debug,info",
            "off",
            "[{task}]=trace",
        ] {
            let config = parse(format!("log = {filter:?}")).unwrap();
            assert_eq!(config.log, filter);
        }
    }
}
