// SPDX-License-Identifier: Apache-2.0
//! How the CNI connects pods: dual-stack, with addresses from host-local and
//! port mappings.

use serde_json::{Value, json};

/// Where containerd finds it.
pub(super) const FILE: &str = "/etc/cni/net.d/10-podhull-test.conflist";

/// The bridge of the node's pods.
pub const BRIDGE: &str = "cni0";
/// Its IPv4 network and its own address there.
pub const SUBNET_V4: (&str, &str) = ("10.88.0.0/16", "10.88.0.1");
/// Its IPv6 network and its own address there.
pub const SUBNET_V6: (&str, &str) = ("fd00:10:88::/64", "fd00:10:88::1");
/// The IPv4 network of point-to-point links, and the address of the node's ends.
pub const LINKS_V4: (&str, &str) = ("10.89.0.0/24", "10.89.0.1");
/// The same of IPv6.
pub const LINKS_V6: (&str, &str) = ("fd00:10:89::/64", "fd00:10:89::1");

/// A configuration of the CNI.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cni {
    /// All pods on [`BRIDGE`], whose packets are as large as they usually are.
    #[default]
    Bridge,
    /// The same with packets of at most so many bytes.
    BridgeWithMtu(u32),
    /// A link from the node to each pod, by which goes what goes to its own
    /// network, too.
    Links,
}

impl Cni {
    pub(super) fn file(self) -> String {
        let mut plugin = match self {
            Self::Bridge | Self::BridgeWithMtu(_) => json!({
                "type": "bridge",
                "bridge": BRIDGE,
                "isGateway": true,
                "hairpinMode": true,
            }),
            Self::Links => json!({"type": "ptp"}),
        };
        if let Self::BridgeWithMtu(mtu) = self {
            plugin["mtu"] = mtu.into();
        }
        let networks = match self {
            Self::Links => [LINKS_V4, LINKS_V6],
            _ => [SUBNET_V4, SUBNET_V6],
        };
        let range =
            |(subnet, gateway): (&str, &str)| json!([{"subnet": subnet, "gateway": gateway}]);
        plugin["ipMasq"] = true.into();
        plugin["ipam"] = json!({
            "type": "host-local",
            "dataDir": "/run/cni/networks",
            "ranges": networks.map(range),
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        });
        json!({
            "cniVersion": "1.0.0",
            "name": "podhull-test",
            "plugins": [plugin, {"type": "portmap", "capabilities": {"portMappings": true}}],
        })
        .to_string()
    }

    /// Whether it is the one that containerd says it uses.
    pub(super) fn is_in(self, status: &str) -> bool {
        let status: Value = serde_json::from_str(status).unwrap_or_default();
        let networks = status["Networks"].as_array().map_or(&[][..], Vec::as_slice);
        networks
            .iter()
            .any(|network| network["Config"]["Source"] == self.file())
    }
}
