// SPDX-License-Identifier: Apache-2.0
//! A container's figures as containerd's cgroup v2 metrics, whatever the host's
//! own cgroups are: they are the guest's.

use std::collections::HashMap;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use podhull_sandbox::ContainerStats;

use crate::error::ShimError;
use crate::wire::any;

/// The name under which containerd registers the type.
const TYPE: &str = "io.containerd.cgroups.v2.Metrics";

fn of(map: &HashMap<String, u64>, name: &str) -> u64 {
    map.get(name).copied().unwrap_or(0)
}

fn cpu(stat: &HashMap<String, u64>) -> CPUStat {
    CPUStat {
        usage_usec: of(stat, "usage_usec"),
        user_usec: of(stat, "user_usec"),
        system_usec: of(stat, "system_usec"),
        nr_periods: of(stat, "nr_periods"),
        nr_throttled: of(stat, "nr_throttled"),
        throttled_usec: of(stat, "throttled_usec"),
        ..CPUStat::default()
    }
}

fn memory(stats: &ContainerStats) -> MemoryStat {
    let stat = &stats.memory_stat;
    MemoryStat {
        anon: of(stat, "anon"),
        file: of(stat, "file"),
        kernel_stack: of(stat, "kernel_stack"),
        slab: of(stat, "slab"),
        sock: of(stat, "sock"),
        shmem: of(stat, "shmem"),
        file_mapped: of(stat, "file_mapped"),
        file_dirty: of(stat, "file_dirty"),
        file_writeback: of(stat, "file_writeback"),
        anon_thp: of(stat, "anon_thp"),
        inactive_anon: of(stat, "inactive_anon"),
        active_anon: of(stat, "active_anon"),
        inactive_file: of(stat, "inactive_file"),
        active_file: of(stat, "active_file"),
        unevictable: of(stat, "unevictable"),
        slab_reclaimable: of(stat, "slab_reclaimable"),
        slab_unreclaimable: of(stat, "slab_unreclaimable"),
        pgfault: of(stat, "pgfault"),
        pgmajfault: of(stat, "pgmajfault"),
        usage: stats.memory_current,
        // As the kernel says that there is no limit.
        usage_limit: match stats.memory_max {
            0 => u64::MAX,
            limit => limit,
        },
        swap_usage: stats.memory_swap_current,
        swap_limit: stats.memory_swap_max,
        ..MemoryStat::default()
    }
}

/// The figures of a container for the Stats call.
pub(crate) fn metrics(stats: &ContainerStats) -> Metrics {
    let events = &stats.memory_events;
    let io = stats
        .io
        .iter()
        .map(|entry| IOEntry {
            major: entry.major,
            minor: entry.minor,
            rbytes: entry.rbytes,
            wbytes: entry.wbytes,
            rios: entry.rios,
            wios: entry.wios,
            ..IOEntry::default()
        })
        .collect();
    Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids_current,
            limit: stats.pids_max,
            ..PidsStat::default()
        }),
        cpu: MessageField::some(cpu(&stats.cpu_stat)),
        memory: MessageField::some(memory(stats)),
        io: MessageField::some(IOStat {
            usage: io,
            ..IOStat::default()
        }),
        memory_events: MessageField::some(MemoryEvents {
            low: of(events, "low"),
            high: of(events, "high"),
            max: of(events, "max"),
            oom: of(events, "oom"),
            oom_kill: of(events, "oom_kill"),
            ..MemoryEvents::default()
        }),
        ..Metrics::default()
    }
}

/// The sum of several containers' figures: the pod's.
pub(crate) fn sum(all: &[ContainerStats]) -> ContainerStats {
    let mut total = ContainerStats::default();
    for stats in all {
        for (into, from) in [
            (&mut total.cpu_stat, &stats.cpu_stat),
            (&mut total.memory_stat, &stats.memory_stat),
            (&mut total.memory_events, &stats.memory_events),
        ] {
            for (name, value) in from {
                let sum: &mut u64 = into.entry(name.clone()).or_default();
                *sum = sum.saturating_add(*value);
            }
        }
        total.memory_current = total.memory_current.saturating_add(stats.memory_current);
        total.pids_current = total.pids_current.saturating_add(stats.pids_current);
        total.io.extend(stats.io.iter().copied());
    }
    total
}

/// Packs metrics as containerd unpacks them.
pub(crate) fn pack(metrics: &Metrics) -> Result<Any, ShimError> {
    let value = metrics
        .write_to_bytes()
        .map_err(|error| ShimError::System {
            step: "encode metrics",
            source: std::io::Error::other(error),
        })?;
    Ok(any(TYPE, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(cpu: u64, memory: u64) -> ContainerStats {
        ContainerStats {
            cpu_stat: HashMap::from([("usage_usec".to_owned(), cpu)]),
            memory_current: memory,
            pids_current: 1,
            ..ContainerStats::default()
        }
    }

    #[test]
    fn no_limit_is_the_largest_number() {
        let metrics = metrics(&stats(5, 7));
        assert_eq!(metrics.cpu.usage_usec, 5);
        assert_eq!(metrics.memory.usage, 7);
        assert_eq!(metrics.memory.usage_limit, u64::MAX);
    }

    #[test]
    fn a_pod_uses_what_its_containers_use() {
        let total = sum(&[stats(5, 7), stats(10, 20)]);
        assert_eq!(total.cpu_stat["usage_usec"], 15);
        assert_eq!((total.memory_current, total.pids_current), (27, 2));
    }
}
