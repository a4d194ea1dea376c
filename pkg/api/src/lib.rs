// SPDX-License-Identifier: Apache-2.0
//! Code generated from `proto/`; no logic. Read the .proto files instead.
#![allow(
    missing_docs,
    clippy::all,
    unreachable_pub,
    clippy::allow_attributes_without_reason,
    clippy::cast_possible_truncation,
    clippy::clone_on_ref_ptr
)]

/// The control plane between shim and agent.
pub mod agent {
    tonic::include_proto!("podhull.agent.v1");
}
