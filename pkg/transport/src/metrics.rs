// SPDX-License-Identifier: Apache-2.0
//! The crate's counters.

use std::sync::LazyLock;

use prometheus::{IntCounter, IntGauge, Registry};

fn counter(name: &str, help: &str) -> IntCounter {
    IntCounter::new(name, help).unwrap_or_else(|error| unreachable!("{name}: {error}"))
}

/// Transports that were dropped without being closed.
pub static DROPPED_UNCLOSED: LazyLock<IntCounter> = LazyLock::new(|| {
    counter(
        "podhull_transport_dropped_unclosed_total",
        "Transports dropped without an explicit close",
    )
});

/// Connections that were accepted and then refused, or that failed to be accepted.
pub static ACCEPT_FAILED: LazyLock<IntCounter> = LazyLock::new(|| {
    counter(
        "podhull_transport_accept_failed_total",
        "Connections lost while being accepted",
    )
});

/// Sessions that ended because the peer broke the protocol, and those that a
/// guest answered so. What a guest itself was greeted with is counted below.
pub static PROTOCOL_ERRORS: LazyLock<IntCounter> = LazyLock::new(|| {
    counter(
        "podhull_session_protocol_errors_total",
        "Sessions ended by a protocol error",
    )
});

/// Sessions that the guest refused: no such process, nobody listens there.
pub static REFUSED: LazyLock<IntCounter> = LazyLock::new(|| {
    counter(
        "podhull_sessions_refused_total",
        "Sessions refused by the guest",
    )
});

/// Connections that a guest refused for their token.
pub static WRONG_TOKEN: LazyLock<IntCounter> = LazyLock::new(|| {
    counter(
        "podhull_greetings_wrong_token_total",
        "Connections with another token",
    )
});

/// Connections that a guest refused for what they began with.
pub static BAD_GREETING: LazyLock<IntCounter> = LazyLock::new(|| {
    counter(
        "podhull_greetings_bad_total",
        "Connections that began with something else than a HELLO of ours",
    )
});

/// Connections that a guest gave up: no whole greeting came.
pub static NO_GREETING: LazyLock<IntCounter> = LazyLock::new(|| {
    counter(
        "podhull_greetings_missing_total",
        "Connections that ended, or were ended, before their HELLO was whole",
    )
});

/// Connections to the host's listener that were not the agent's: they said
/// nothing, something else, or READY of another version.
pub static FOREIGN_READY: LazyLock<IntCounter> = LazyLock::new(|| {
    counter(
        "podhull_ready_refused_total",
        "Connections that came for the agent's and did not say READY",
    )
});

/// Transports that are open now.
pub static OPEN: LazyLock<IntGauge> = LazyLock::new(|| {
    let name = "podhull_transports_open";
    IntGauge::new(name, "Transports open now")
        .unwrap_or_else(|error| unreachable!("{name}: {error}"))
});

/// Makes the host's counters part of `registry`.
///
/// # Errors
/// If one of them is registered there already.
pub fn register(registry: &Registry) -> Result<(), prometheus::Error> {
    registry.register(Box::new(DROPPED_UNCLOSED.clone()))?;
    registry.register(Box::new(ACCEPT_FAILED.clone()))?;
    registry.register(Box::new(PROTOCOL_ERRORS.clone()))?;
    registry.register(Box::new(REFUSED.clone()))?;
    registry.register(Box::new(FOREIGN_READY.clone()))?;
    registry.register(Box::new(OPEN.clone()))
}
