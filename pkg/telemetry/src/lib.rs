// SPDX-License-Identifier: Apache-2.0
//! Logging and metrics of the host's processes.
//!
//! Logging never blocks and never fails a caller: what cannot be written is
//! dropped and counted. Metric names follow the field's conventions; histograms
//! and counters carry no pod label.
//!
//! Reading order: [`log`], [`metrics`].

pub mod log;
pub mod metrics;

pub use metrics::Metrics;
