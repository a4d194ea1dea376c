// SPDX-License-Identifier: Apache-2.0
//! Whether KVM really works here.

use std::path::Path;

use crate::error::VmmError;
use crate::image;
use crate::sys;

/// What may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AccelPolicy {
    /// Emulate where KVM does not work.
    pub allow_emulation: bool,
}

/// How a guest's instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acceleration {
    /// By the CPU.
    Kvm,
    /// By QEMU's TCG: slow, and no isolation boundary.
    Emulation,
}

/// Finds out what can be used. A /dev/kvm that opens proves nothing: the CPU
/// must have vmx or svm, and a virtual CPU must really execute an instruction.
///
/// # Errors
/// [`VmmError::NoKvm`] if emulation would be needed and is not allowed;
/// [`VmmError::Unusable`] if there is no QEMU.
pub async fn probe_acceleration(
    policy: AccelPolicy,
    qemu: &Path,
) -> Result<Acceleration, VmmError> {
    image::check_program("qemu", qemu)?;
    let probed = tokio::task::spawn_blocking(probe_kvm)
        .await
        .unwrap_or_else(|error| Err(error.to_string()));
    match probed {
        Ok(()) => Ok(Acceleration::Kvm),
        Err(reason) if policy.allow_emulation => {
            tracing::warn!(%reason, "no KVM: guests are emulated, slowly and without isolation");
            Ok(Acceleration::Emulation)
        }
        Err(reason) => Err(VmmError::NoKvm(reason)),
    }
}

fn probe_kvm() -> Result<(), String> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo")
        .map_err(|error| format!("read /proc/cpuinfo: {error}"))?;
    if !has_virtualization(&cpuinfo) {
        return Err("the CPU shows neither vmx nor svm".into());
    }
    sys::run_halting_vm().map_err(|error| format!("a probe VM did not run: {error}"))
}

fn has_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(str::split_whitespace)
        .any(|flag| flag == "vmx" || flag == "svm")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtualization_is_a_flag_of_its_own() {
        assert!(has_virtualization("flags\t\t: fpu vmx sse\n"));
        assert!(has_virtualization("flags\t\t: svm\n"));
        assert!(!has_virtualization("flags\t\t: fpu svme\nbugs: vmx\n"));
    }

    #[tokio::test]
    async fn a_missing_qemu_is_named() {
        let policy = AccelPolicy {
            allow_emulation: true,
        };
        let error = probe_acceleration(policy, Path::new("/nonexistent/qemu"))
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nonexistent/qemu"), "{error}");
    }
}
