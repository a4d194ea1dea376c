// SPDX-License-Identifier: Apache-2.0
//! The configuration files of a node: containerd's in both dialects, and
//! podhull's.

use std::env;
use std::path::Path;

use super::{ROOT, Release, STATE};
use crate::image::PAUSE;
use crate::programs::Programs;

pub(super) const OPT: &str = "/var/lib/containerd/opt";

/// podhull without `privileged_without_host_devices`, as one who forgets it has
/// it. Cases that are about it name it.
pub const FORGETFUL: &str = "podhull-forgetful";

/// podhull as the sandboxer, with streams in the place of FIFOs. Cases that are
/// about them name it.
pub const STREAMING: &str = "podhull-streaming";

/// Handlers, their runtime types, and whether the shim itself is the sandboxer,
/// which 1.x does not know.
const HANDLERS: [(&str, &str, bool); 5] = [
    ("runc", "io.containerd.runc.v2", false),
    ("podhull", "io.containerd.podhull.v2", false),
    ("podhull-sandbox", "io.containerd.podhull.v2", true),
    (FORGETFUL, "io.containerd.podhull.v2", true),
    (STREAMING, "io.containerd.podhull.v2", true),
];

/// containerd's own file.
#[must_use]
pub(super) fn containerd(release: Release, socket: &Path) -> String {
    let (version, cri, head) = match release {
        Release::Debian16 | Release::V1_7 => (
            2,
            "io.containerd.grpc.v1.cri",
            format!(
                r#"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
"#
            ),
        ),
        Release::V2_1 | Release::V2_4 => (
            3,
            "io.containerd.cri.v1.runtime",
            format!(
                r#"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{PAUSE}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "/etc/cni/net.d"
"#
            ),
        ),
    };
    let mut text = format!(
        r#"version = {version}
root = "{ROOT}"
state = "{STATE}"
[grpc]
  address = "{}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{OPT}"
{head}"#,
        socket.display()
    );
    for (handler, runtime_type, shim_is_sandboxer) in HANDLERS {
        let shim_is_sandboxer = shim_is_sandboxer && release.is_2();
        if ["podhull-sandbox", STREAMING].contains(&handler) && !shim_is_sandboxer {
            continue;
        }
        text += &format!(
            "[plugins.\"{cri}\".containerd.runtimes.{handler}]\n  runtime_type = \"{runtime_type}\"\n"
        );
        if !["runc", FORGETFUL].contains(&handler) {
            // A guest has devices of its own; the host's are not passed on.
            text += "  privileged_without_host_devices = true\n";
        }
        if handler != "runc" {
            text += "  pod_annotations = [\"podhull.dev/*\"]\n";
        }
        if shim_is_sandboxer {
            text += "  sandboxer = \"shim\"\n";
        }
        if handler == STREAMING {
            text += "  io_type = \"streaming\"\n";
        }
    }
    text
}

/// podhull's file, for guests that may have to be emulated. Where KVM is to be
/// used, `PODHULL_ALLOW_EMULATION=false` makes sure of it; where it is slow,
/// `PODHULL_BOOT_TIMEOUT` gives a guest more seconds.
#[must_use]
pub fn podhull(programs: &Programs) -> String {
    let allowed = env::var("PODHULL_ALLOW_EMULATION").unwrap_or_else(|_| "true".into());
    let timeout = env::var("PODHULL_BOOT_TIMEOUT").map_or_else(
        |_| String::new(),
        |seconds| format!("boot_timeout_seconds = {seconds}\n"),
    );
    format!(
        "kernel = {:?}\ninitramfs = {:?}\nqemu = {:?}\nvsock_daemon = {:?}\nallow_emulation = {allowed}\nlog = \"debug\"\n{timeout}",
        programs.kernel, programs.initramfs, programs.qemu, programs.vsock_daemon
    )
}
