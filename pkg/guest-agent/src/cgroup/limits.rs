// SPDX-License-Identifier: Apache-2.0
//! From OCI's resources to the files of a cgroup v2.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use crate::error::GuestError;

/// What the kernel takes for a period that is left out, in microseconds.
const PERIOD: u64 = 100_000;

/// A value for a file of a cgroup.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Write {
    pub(super) file: String,
    pub(super) value: String,
}

impl Write {
    fn new(file: &str, value: impl ToString) -> Self {
        Self {
            file: file.to_owned(),
            value: value.to_string(),
        }
    }
}

/// What is to be written for `resources`, in that order; what it leaves out stays
/// as it is.
///
/// # Errors
/// A name in `unified` that is no file of a cgroup.
pub(super) fn writes(resources: &LinuxResources) -> Result<Vec<Write>, GuestError> {
    let mut writes = Vec::new();
    if let Some(of) = resources.memory() {
        memory(of, &mut writes);
    }
    if let Some(of) = resources.cpu() {
        cpu(of, &mut writes);
    }
    if let Some(pids) = resources.pids() {
        writes.push(Write::new("pids.max", limit(pids.limit())));
    }
    // Last, so that they win over what was derived.
    for (file, value) in resources.unified().iter().flatten() {
        if file.contains('/') || !file.contains('.') {
            return Err(GuestError::Invalid {
                field: "linux.resources.unified",
                reason: format!("{file:?} is no file of a cgroup"),
            });
        }
        writes.push(Write::new(file, value));
    }
    Ok(writes)
}

fn limit(value: i64) -> String {
    if value < 0 {
        "max".to_owned()
    } else {
        value.to_string()
    }
}

/// Swap is left out: a guest has none, nor a file for it.
fn memory(memory: &LinuxMemory, writes: &mut Vec<Write>) {
    if let Some(bytes) = memory.limit() {
        writes.push(Write::new("memory.max", limit(bytes)));
    }
    if let Some(bytes) = memory.reservation() {
        writes.push(Write::new("memory.low", limit(bytes)));
    }
}

fn cpu(cpu: &LinuxCpu, writes: &mut Vec<Write>) {
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        writes.push(Write::new("cpu.weight", weight(shares)));
    }
    if let Some(idle) = cpu.idle() {
        writes.push(Write::new("cpu.idle", idle));
    }
    if cpu.quota().is_some() || cpu.period().is_some() {
        let quota = cpu.quota().filter(|quota| *quota > 0);
        let quota = quota.map_or_else(|| "max".to_owned(), |quota| quota.to_string());
        let period = cpu.period().filter(|period| *period != 0).unwrap_or(PERIOD);
        writes.push(Write::new("cpu.max", format!("{quota} {period}")));
    }
    if let Some(burst) = cpu.burst() {
        writes.push(Write::new("cpu.max.burst", burst));
    }
    for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
            writes.push(Write::new(file, value));
        }
    }
}

/// cgroup v1 CPU shares as a v2 weight: the curve through minimum, default and
/// maximum that runc (since 1.3.2), crun and libcontainer share.
fn weight(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        _ => {
            // 2^18 at most: exact in a float.
            let log = f64::from(u32::try_from(shares).unwrap_or(u32::MAX)).log2();
            let weight = 10_f64.powf((log * log + 125.0 * log) / 612.0 - 7.0 / 34.0);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "the curve lies between 1 and 10000"
            )]
            let weight = weight.ceil() as u64;
            weight
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(resources: serde_json::Value) -> Vec<(String, String)> {
        let resources = serde_json::from_value(resources).unwrap();
        let writes = writes(&resources).unwrap();
        writes
            .into_iter()
            .map(|write| (write.file, write.value))
            .collect()
    }

    #[test]
    fn every_limit_has_its_file() {
        let writes = written(serde_json::json!({
            "memory": { "limit": 1000, "reservation": 500 },
            "cpu": { "shares": 1024, "quota": 50_000, "burst": 10, "idle": 1,
                     "cpus": "0", "mems": "0" },
            "pids": { "limit": -1 },
            "unified": { "memory.high": "900" },
        }));
        let expected = [
            ("memory.max", "1000"),
            ("memory.low", "500"),
            ("cpu.weight", "100"),
            ("cpu.idle", "1"),
            ("cpu.max", "50000 100000"),
            ("cpu.max.burst", "10"),
            ("cpuset.cpus", "0"),
            ("cpuset.mems", "0"),
            ("pids.max", "max"),
            ("memory.high", "900"),
        ];
        let expected = expected.map(|(file, value)| (file.to_owned(), value.to_owned()));
        assert_eq!(writes, expected);
    }

    #[test]
    fn what_is_left_out_stays() {
        assert_eq!(written(serde_json::json!({})), []);
        assert_eq!(
            written(serde_json::json!({ "cpu": { "shares": 0, "cpus": "" } })),
            []
        );
    }

    #[test]
    fn swap_that_a_guest_does_not_have_is_not_limited() {
        let memory = serde_json::json!({ "memory": { "limit": 1000, "swap": 1500 } });
        assert_eq!(written(memory), [("memory.max".into(), "1000".into())]);
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_refused() {
        for name in ["../memory.max", "a/b.c", "cgroup"] {
            let resources = serde_json::json!({ "unified": { name: "1" } });
            let error = writes(&serde_json::from_value(resources).unwrap()).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn shares_become_weights_as_with_runc() {
        assert_eq!(
            [0, 2, 512, 1024, 262_144].map(weight),
            [1, 1, 59, 100, 10_000]
        );
    }
}
