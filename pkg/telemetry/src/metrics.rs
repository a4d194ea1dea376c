// SPDX-License-Identifier: Apache-2.0
//! The metrics of one shim.

use podhull_types::BootTimes;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{
    Error, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

/// Bucket bounds for things that take between a millisecond and a minute.
const SECONDS: [f64; 14] = [
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];

/// Counters, gauges and histograms, and the registry they belong to. Cloning
/// gives another handle on the same numbers.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Where everything is registered; other crates add their own.
    pub registry: Registry,
    /// Time from `start` to a running sandbox.
    pub sandbox_start: Histogram,
    /// Time of each boot phase, by `phase`.
    pub boot_phase: HistogramVec,
    /// Starts that failed, by `phase`.
    pub start_failures: IntCounterVec,
    /// Teardown steps that did not end cleanly, by `step`.
    pub teardown_failures: IntCounterVec,
    /// Sessions open now, by `kind`.
    pub sessions: IntGaugeVec,
    /// Bytes carried, by `kind` and `direction`.
    pub session_bytes: IntCounterVec,
    /// Output bytes that could not be delivered before a Delete's deadline.
    pub dropped_bytes: IntCounterVec,
    /// VMs that ended, by `reason`.
    pub vm_exits: IntCounterVec,
    /// 1 where pods run under emulation.
    pub emulation: IntGaugeVec,
    /// Connections that the guest refused, by `reason`.
    pub guest_refused: IntCounterVec,
    /// What else went wrong in the guest, by `kind`.
    pub guest_errors: IntCounterVec,
    /// What the guest's agent holds, by `what`, as it said last.
    pub guest_holds: IntGaugeVec,
    /// Time of calls to the agent, by `method` and `result`.
    pub agent_calls: HistogramVec,
}

impl Metrics {
    /// All metrics at zero in a registry of their own.
    ///
    /// # Errors
    /// Only if two metrics had the same name.
    pub fn new() -> Result<Self, Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, Error>(metric)
        };
        let gauge = |name: &str, help: &str, labels: &[&str]| {
            let metric = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, Error>(metric)
        };
        let histogram = |name: &str, help: &str, labels: &[&str]| {
            let options = HistogramOpts::new(name, help).buckets(SECONDS.to_vec());
            let metric = HistogramVec::new(options, labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok::<_, Error>(metric)
        };
        let sandbox_start = Histogram::with_opts(
            HistogramOpts::new(
                "podhull_sandbox_start_duration_seconds",
                "Time from the shim's start to a running sandbox",
            )
            .buckets(SECONDS.to_vec()),
        )?;
        registry.register(Box::new(sandbox_start.clone()))?;
        Ok(Self {
            sandbox_start,
            boot_phase: histogram(
                "podhull_boot_phase_duration_seconds",
                "Time from the previous boot phase to this one",
                &["phase"],
            )?,
            start_failures: counter(
                "podhull_sandbox_start_failures_total",
                "Sandboxes that failed to start, by the phase that failed",
                &["phase"],
            )?,
            teardown_failures: counter(
                "podhull_teardown_step_failures_total",
                "Teardown steps that failed or were forced",
                &["step"],
            )?,
            sessions: gauge("podhull_sessions", "Sessions open now", &["kind"])?,
            session_bytes: counter(
                "podhull_session_bytes_total",
                "Bytes carried by sessions",
                &["kind", "direction"],
            )?,
            dropped_bytes: counter(
                "podhull_stdio_dropped_bytes_total",
                "Output bytes that nobody took before a delete's deadline",
                &["stream"],
            )?,
            vm_exits: counter("podhull_vm_exits_total", "VMs that ended", &["reason"])?,
            emulation: gauge(
                "podhull_emulation_in_use",
                "1 where VMs run under emulation, which is no isolation boundary",
                &["vmm"],
            )?,
            guest_refused: counter(
                "podhull_guest_refused_connections_total",
                "Connections that became no session in the guest",
                &["reason"],
            )?,
            guest_errors: counter(
                "podhull_guest_errors_total",
                "Peers that broke the session protocol after their greeting, and transports dropped, in the guest",
                &["kind"],
            )?,
            guest_holds: gauge(
                "podhull_guest_holds",
                "What the guest's agent holds, as it said with its last heartbeat",
                &["what"],
            )?,
            agent_calls: histogram(
                "podhull_agent_rpc_duration_seconds",
                "Time of calls to the agent",
                &["method", "result"],
            )?,
            registry,
        })
    }

    /// A gauge that `fill` sets anew whenever the numbers are read.
    ///
    /// # Errors
    /// If there is one of this name.
    pub fn computed(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        fill: impl Fn(&IntGaugeVec) + Send + Sync + 'static,
    ) -> Result<(), Error> {
        let gauge = IntGaugeVec::new(Opts::new(name, help), labels)?;
        self.registry.register(Box::new(Computed { gauge, fill }))
    }

    /// Notes the phases of one boot.
    pub fn note_boot(&self, times: &BootTimes) {
        let mut previous = std::time::Duration::ZERO;
        for (phase, at) in times.iter() {
            let took = at.saturating_sub(previous).as_secs_f64();
            self.boot_phase
                .with_label_values(&[phase.name()])
                .observe(took);
            previous = at;
        }
        self.sandbox_start.observe(previous.as_secs_f64());
    }

    /// Everything in the registry, in Prometheus' text format.
    ///
    /// # Errors
    /// If a metric cannot be encoded.
    pub fn text(&self) -> Result<String, Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

struct Computed<F> {
    gauge: IntGaugeVec,
    fill: F,
}

impl<F: Fn(&IntGaugeVec) + Send + Sync> Collector for Computed<F> {
    fn desc(&self) -> Vec<&Desc> {
        self.gauge.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.gauge.reset();
        (self.fill)(&self.gauge);
        self.gauge.collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use podhull_types::BootPhase;

    use super::*;

    #[test]
    fn a_computed_gauge_is_what_it_is_when_it_is_read() {
        let metrics = Metrics::new().unwrap();
        let names = std::sync::Arc::new(std::sync::Mutex::new(vec!["a", "b", "a"]));
        let read = std::sync::Arc::clone(&names);
        let fill = move |gauge: &IntGaugeVec| {
            for name in read.lock().unwrap().iter() {
                gauge.with_label_values(&[*name]).inc();
            }
        };
        metrics.computed("x", "of a test", &["name"], fill).unwrap();
        let text = metrics.text().unwrap();
        assert!(text.contains("x{name=\"a\"} 2"), "{text}");
        names.lock().unwrap().remove(0);
        let text = metrics.text().unwrap();
        assert!(text.contains("x{name=\"a\"} 1"), "{text}");
    }

    #[test]
    fn boot_phases_are_told_apart() {
        let metrics = Metrics::new().unwrap();
        let mut times = BootTimes::default();
        times.note(BootPhase::AgentReady, Duration::from_millis(500));
        times.note(BootPhase::VmmSpawned, Duration::from_millis(20));
        metrics.note_boot(&times);
        let text = metrics.text().unwrap();
        assert!(
            text.contains(r#"podhull_boot_phase_duration_seconds_sum{phase="agent_ready"} 0.48"#)
        );
        assert!(text.contains("podhull_sandbox_start_duration_seconds_sum 0.5"));
    }
}
