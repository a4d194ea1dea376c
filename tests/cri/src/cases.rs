// SPDX-License-Identifier: Apache-2.0
//! All cases, by area.

mod cgroup;
mod churn;
mod concurrency;
mod confinement;
mod console;
mod container;
pub(crate) mod core;
mod dead;
mod direct;
mod event;
mod exec;
mod exec_confined;
mod fault;
mod garbled;
mod hung;
mod killed;
mod killed_containerd;
mod lifecycle;
mod mount;
mod network;
mod node;
mod oci;
mod oracle;
mod pod;
mod port_cut;
mod port_forward;
mod port_websocket;
mod process;
mod reader;
mod refusal;
mod restart;
mod security;
mod session;
mod shim;
mod stats;
mod stranger;
mod stranger_inside;
mod stream_attach;
mod stream_ends;
mod stream_exec;
mod stream_frozen;
mod stream_load;
mod streaming;
mod task;
mod upgrade;
mod userns;
mod view;
mod vsock;
mod vsock_id;

use crate::case::Case;

/// All of them, in the order in which they run.
pub(crate) fn all() -> Vec<Case> {
    [
        oracle::cases(),
        lifecycle::cases(),
        concurrency::cases(),
        pod::cases(),
        container::cases(),
        view::cases(),
        process::cases(),
        task::cases(),
        oci::cases(),
        stats::cases(),
        security::cases(),
        mount::cases(),
        cgroup::cases(),
        network::cases(),
        exec::cases(),
        exec_confined::cases(),
        session::cases(),
        reader::cases(),
        stream_exec::cases(),
        stream_ends::cases(),
        stream_attach::cases(),
        port_forward::cases(),
        port_cut::cases(),
        port_websocket::cases(),
        stranger::cases(),
        stranger_inside::cases(),
        stream_load::cases(),
        stream_frozen::cases(),
        streaming::cases(),
        event::cases(),
        refusal::cases(),
        garbled::cases(),
        direct::cases(),
        confinement::cases(),
        vsock::cases(),
        vsock_id::cases(),
        churn::cases(),
        fault::cases(),
        console::cases(),
        dead::cases(),
        hung::cases(),
        killed::cases(),
        killed_containerd::cases(),
        restart::cases(),
        node::cases(),
        shim::cases(),
        userns::cases(),
        upgrade::cases(),
    ]
    .concat()
}
