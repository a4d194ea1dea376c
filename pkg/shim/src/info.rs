// SPDX-License-Identifier: Apache-2.0
//! `-info`: what this runtime is and which OCI features its containers have
//! (the runtime specification's `features.md`).

use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use serde_json::{Value, json};

use crate::error::ShimError;
use crate::wire::any;

/// The runtime's name in containerd's configuration.
pub const RUNTIME: &str = "io.containerd.podhull.v2";
/// How containerd calls the type of the features.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "idmap",
            "noatime", "nodev", "nodiratime", "noexec", "norelatime", "nosuid", "private",
            "rbind", "relatime", "ridmap", "ro", "rprivate", "rro", "rslave", "rw", "slave",
            "strictatime", "suid", "sync",
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false},
            "seccomp": {"enabled": true},
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": podhull_sandbox::can_map_ids()}},
        },
    })
}

/// The bytes that containerd reads on standard output.
///
/// # Errors
/// Never in practice: the message is a constant.
pub fn info() -> Result<Vec<u8>, ShimError> {
    let version = RuntimeVersion {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..RuntimeVersion::default()
    };
    let info = RuntimeInfo {
        name: RUNTIME.to_owned(),
        version: MessageField::some(version),
        features: MessageField::some(any(FEATURES, features().to_string().into_bytes())),
        ..RuntimeInfo::default()
    };
    info.write_to_bytes().map_err(|error| ShimError::System {
        step: "encode the runtime's description",
        source: std::io::Error::other(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_description_can_be_read_back() {
        let info = RuntimeInfo::parse_from_bytes(&info().unwrap()).unwrap();
        assert_eq!(info.name, RUNTIME);
        let features: Value = serde_json::from_slice(&info.features.value).unwrap();
        assert_eq!(features["linux"]["cgroup"]["v2"], true);
    }
}
