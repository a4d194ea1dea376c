// SPDX-License-Identifier: Apache-2.0
//! What the host hears with every heartbeat: how often something went wrong in
//! the guest, and what the agent holds.

use std::fs;
use std::io;

use podhull_api::agent;
use podhull_transport::{LeaseSet, metrics};
use tokio::runtime::Handle;

/// The numbers. Cloning gives another handle on the same ones.
#[derive(Debug, Clone)]
pub struct Tally {
    leases: LeaseSet,
}

impl Tally {
    /// Nothing has gone wrong; `leases` are the agent's.
    #[must_use]
    pub fn new(leases: LeaseSet) -> Self {
        Self { leases }
    }

    /// What has gone wrong so far. What the transports count has one number each:
    /// a bad greeting is no broken session.
    #[must_use]
    pub fn counts(&self) -> agent::Counts {
        agent::Counts {
            refused_token: metrics::WRONG_TOKEN.get(),
            refused_greeting: metrics::BAD_GREETING.get(),
            refused_silence: metrics::NO_GREETING.get(),
            refused_accept: metrics::ACCEPT_FAILED.get(),
            protocol_errors: metrics::PROTOCOL_ERRORS.get(),
            transports_dropped: metrics::DROPPED_UNCLOSED.get(),
        }
    }

    /// What the agent holds now.
    ///
    /// # Errors
    /// If /proc cannot be read.
    pub fn held(&self) -> io::Result<agent::Held> {
        // One of them is the folder that they are read from.
        let descriptors = fs::read_dir("/proc/self/fd")?.count().saturating_sub(1);
        let number = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        let status = fs::read_to_string("/proc/self/status")?;
        Ok(agent::Held {
            descriptors: number(descriptors),
            tasks: number(Handle::current().metrics().num_alive_tasks()),
            leases: number(self.leases.held().len()),
            threads: field(&status, "Threads")?,
            resident_kib: field(&status, "VmRSS")?,
        })
    }
}

/// A number in the text of a process's `status`.
fn field(status: &str, name: &str) -> io::Result<u64> {
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = value.and_then(|value| value.split_whitespace().next()?.parse().ok());
    number.ok_or_else(|| io::Error::other(format!("no {name} in /proc/self/status")))
}

#[cfg(test)]
mod tests {
    use podhull_transport::{Holder, HolderKind};

    use super::*;

    #[tokio::test]
    async fn what_is_held_is_counted_when_it_is_asked_for() {
        let tally = Tally::new(LeaseSet::new("guest"));
        let before = tally.held().unwrap();
        assert_eq!((before.tasks, before.leases), (0, 0));
        let lease = tally.leases.issue(Holder::new(HolderKind::Session, "c1"));
        let task = tokio::spawn(std::future::pending::<()>());
        // Other tests of this process open and close some, too.
        let opened: Vec<_> = (0..500).map(|_| fs::File::open("/dev/null")).collect();
        let now = tally.held().unwrap();
        assert_eq!((now.tasks, now.leases), (1, 1));
        assert!(now.descriptors >= 500, "{now:?}");
        drop((lease, opened));
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
        let now = tally.held().unwrap();
        assert_eq!((now.tasks, now.leases), (0, 0));
        assert!(now.descriptors < 500, "{now:?}");
    }

    #[tokio::test]
    async fn memory_and_threads_are_those_of_the_process() {
        const THREADS: u64 = 200;
        let tally = Tally::new(LeaseSet::new("guest"));
        let all_are_there = std::sync::Barrier::new(usize::try_from(THREADS).unwrap() + 1);
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    all_are_there.wait();
                });
            }
            let now = tally.held().unwrap();
            all_are_there.wait();
            assert!(now.threads > THREADS, "{now:?}");
        });
        let memory = vec![1_u8; 128 << 20];
        let now = tally.held().unwrap();
        assert!(now.resident_kib >= 128 << 10, "{now:?}");
        drop(memory);
        let now = tally.held().unwrap();
        assert!(now.threads <= THREADS, "{now:?}");
        assert!(now.resident_kib < 128 << 10, "{now:?}");
    }
}
