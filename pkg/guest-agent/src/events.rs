// SPDX-License-Identifier: Apache-2.0
//! What happened in the guest, kept until the host has seen it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use podhull_api::agent::{Event, event};
use tokio::sync::Notify;

#[derive(Debug, Default)]
struct Log {
    last: u64,
    kept: VecDeque<Event>,
}

/// The events in the order in which they happened, numbered from 1. An event is
/// kept until the host acknowledges it, which it does with every heartbeat.
#[derive(Debug, Clone, Default)]
pub struct Events {
    log: Arc<Mutex<Log>>,
    added: Arc<Notify>,
}

impl Events {
    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event.
    pub fn push(&self, kind: event::Kind) {
        {
            let mut log = self.lock();
            log.last += 1;
            let sequence = log.last;
            log.kept.push_back(Event {
                sequence,
                kind: Some(kind),
            });
        }
        self.added.notify_waiters();
    }

    /// Forgets events up to `sequence`: the host has seen them.
    pub fn acknowledge(&self, sequence: u64) {
        let mut log = self.lock();
        while log
            .kept
            .front()
            .is_some_and(|event| event.sequence <= sequence)
        {
            log.kept.pop_front();
        }
    }

    /// The first event after `sequence`, now or when it happens. Cancel safe.
    pub async fn after(&self, sequence: u64) -> Event {
        loop {
            let added = self.added.notified();
            tokio::pin!(added);
            added.as_mut().enable();
            let next = self
                .lock()
                .kept
                .iter()
                .find(|event| event.sequence > sequence)
                .cloned();
            if let Some(event) = next {
                return event;
            }
            added.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use podhull_api::agent::OutOfMemory;

    use super::*;

    fn oom(container: &str) -> event::Kind {
        event::Kind::Oom(OutOfMemory {
            container_id: container.into(),
        })
    }

    #[tokio::test]
    async fn none_is_lost_over_a_new_stream() {
        let events = Events::default();
        for name in ["a", "b", "c"] {
            events.push(oom(name));
        }
        assert_eq!(events.after(0).await.sequence, 1);
        assert_eq!(events.after(1).await.kind, Some(oom("b")));
        events.acknowledge(2);
        assert_eq!(events.after(2).await.kind, Some(oom("c")));
        let (event, ()) = tokio::join!(events.after(3), async { events.push(oom("d")) });
        assert_eq!((event.sequence, event.kind), (4, Some(oom("d"))));
    }
}
