// SPDX-License-Identifier: Apache-2.0
//! Connections that became no session, counted for the host: it hears the
//! numbers with every heartbeat.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use podhull_api::agent;
use podhull_transport::{SessionError, metrics};

/// The numbers. Cloning gives another handle on the same ones.
#[derive(Debug, Clone, Default)]
pub struct Refused(Arc<Numbers>);

#[derive(Debug, Default)]
struct Numbers {
    token: AtomicU64,
    greeting: AtomicU64,
    silence: AtomicU64,
    crowd: AtomicU64,
}

impl Refused {
    /// Counts a connection that `error` kept from becoming a session.
    pub(crate) fn greeting_failed(&self, error: &SessionError) {
        let number = match error {
            SessionError::WrongToken => &self.0.token,
            SessionError::Protocol(_) => &self.0.greeting,
            // It said too little, and then ended or went on for too long.
            _ => &self.0.silence,
        };
        number.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one that came while too many others had not said who they are.
    pub(crate) fn one_too_many(&self) {
        self.0.crowd.fetch_add(1, Ordering::Relaxed);
    }

    /// These numbers and those of the transports, as the host is told them.
    #[must_use]
    pub fn counts(&self) -> agent::Counts {
        let read = |number: &AtomicU64| number.load(Ordering::Relaxed);
        agent::Counts {
            refused_token: read(&self.0.token),
            refused_greeting: read(&self.0.greeting),
            refused_silence: read(&self.0.silence),
            refused_crowd: read(&self.0.crowd),
            refused_accept: metrics::ACCEPT_FAILED.get(),
            protocol_errors: metrics::PROTOCOL_ERRORS.get(),
            transports_dropped: metrics::DROPPED_UNCLOSED.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use podhull_transport::error::ProtocolError;

    use super::*;

    #[test]
    fn each_refusal_is_counted_where_it_belongs() {
        let refused = Refused::default();
        let told = refused.clone();
        for (error, times) in [
            (SessionError::WrongToken, 1),
            (ProtocolError::UnknownKind(71).into(), 2),
            (SessionError::Deadline("receive HELLO"), 3),
            (SessionError::Lost("ended in the handshake".into()), 1),
        ] {
            for _ in 0..times {
                refused.greeting_failed(&error);
            }
        }
        refused.one_too_many();
        let counts = told.counts();
        let numbers = [
            counts.refused_token,
            counts.refused_greeting,
            counts.refused_silence,
            counts.refused_crowd,
        ];
        assert_eq!(numbers, [1, 2, 4, 1]);
    }
}
