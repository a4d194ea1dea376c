// SPDX-License-Identifier: Apache-2.0
//! Whether KVM really works here.

use std::path::Path;
use std::time::Duration;

use podhull_types::Deadline;

use crate::error::VmmError;
use crate::image;
use crate::sys;

/// Time for the probe's virtual CPU to halt: a broken KVM may leave it spinning.
const PROBE: Duration = Duration::from_secs(10);

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
    match probed(Deadline::after(PROBE), probe_kvm).await {
        Ok(()) => Ok(Acceleration::Kvm),
        Err(reason) if policy.allow_emulation => {
            tracing::warn!(%reason, "no KVM: guests are emulated, slowly and without isolation");
            Ok(Acceleration::Emulation)
        }
        Err(reason) => Err(VmmError::NoKvm(reason)),
    }
}

/// What `probe` finds, which goes on by itself if it takes longer.
async fn probed(
    by: Deadline,
    probe: impl FnOnce() -> Result<(), String> + Send + 'static,
) -> Result<(), String> {
    match by.run(tokio::task::spawn_blocking(probe)).await {
        Ok(Ok(result)) => result,
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("a probe VM did not end in time".into()),
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
    async fn a_probe_that_spins_is_not_waited_for() {
        let (let_go, held) = std::sync::mpsc::channel::<()>();
        let by = Deadline::after(Duration::from_millis(20));
        let probe = move || held.recv().map_err(|error| error.to_string());
        let said = Deadline::after(Duration::from_secs(5)).run(probed(by, probe));
        let reason = said.await.expect("it is waited for").unwrap_err();
        assert!(reason.contains("in time"), "{reason}");
        drop(let_go);
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
