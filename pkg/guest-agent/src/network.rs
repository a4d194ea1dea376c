// SPDX-License-Identifier: Apache-2.0
//! The pod's network, set up in the guest as the CNI set it up on the host.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use futures::TryStreamExt;
use podhull_api::agent;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::RouteScope;
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder, new_connection};

use crate::error::GuestError;
use crate::pod::{self, Pod};

fn failed(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> GuestError {
    let what = what.into();
    move |source| GuestError::Network { what, source }
}

/// A connection to the kernel's routing socket; its driver ends with the handle.
fn connect() -> io::Result<Handle> {
    let (driver, handle, _) = new_connection()?;
    tokio::spawn(driver);
    Ok(handle)
}

/// Brings the guest's own loopback up.
pub(crate) async fn loopback_up() -> Result<(), GuestError> {
    bring_loopback_up(&connect().map_err(GuestError::system("open netlink"))?).await
}

async fn bring_loopback_up(handle: &Handle) -> Result<(), GuestError> {
    let index = links(handle)
        .await?
        .into_iter()
        .find(|link| link.name == "lo")
        .map(|lo| lo.index);
    let index = index.ok_or_else(|| GuestError::NetworkValue("no loopback".into()))?;
    let up = LinkUnspec::new_with_index(index).up().build();
    handle
        .link()
        .set(up)
        .execute()
        .await
        .map_err(failed("bring loopback up"))
}

#[derive(Debug)]
struct Link {
    index: u32,
    name: String,
    mac: Vec<u8>,
}

async fn links(handle: &Handle) -> Result<Vec<Link>, GuestError> {
    let messages: Vec<_> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(failed("list links"))?;
    Ok(messages
        .into_iter()
        .map(|message| {
            let mut link = Link {
                index: message.header.index,
                name: String::new(),
                mac: Vec::new(),
            };
            for attribute in message.attributes {
                match attribute {
                    LinkAttribute::IfName(name) => link.name = name,
                    LinkAttribute::Address(mac) => link.mac = mac,
                    _ => {}
                }
            }
            link
        })
        .collect())
}

/// An address with its prefix length, from CIDR notation.
fn parse_cidr(text: &str) -> Result<(IpAddr, u8), GuestError> {
    let parsed = text.split_once('/').and_then(|(address, prefix)| {
        let (address, prefix): (IpAddr, u8) = (address.parse().ok()?, prefix.parse().ok()?);
        (prefix <= if address.is_ipv4() { 32 } else { 128 }).then_some((address, prefix))
    });
    parsed.ok_or_else(|| GuestError::NetworkValue(format!("{text:?} is no address/prefix")))
}

fn parse_ip(text: &str) -> Result<IpAddr, GuestError> {
    text.parse()
        .map_err(|_| GuestError::NetworkValue(format!("{text:?} is no address")))
}

/// Gives the pod the devices that it is to have, if its network is not the guest's.
async fn give(interfaces: &[agent::Interface]) -> Result<(), GuestError> {
    let guest = connect().map_err(GuestError::system("open netlink"))?;
    let path = pod::path("net");
    let pods = File::open(&path).map_err(GuestError::file("open", path))?;
    let ours = links(&guest).await?;
    let wanted = |link: &&Link| interfaces.iter().any(|wanted| wanted.mac == link.mac);
    for link in ours.iter().filter(wanted) {
        let give = LinkUnspec::new_with_index(link.index).setns_by_fd(pods.as_raw_fd());
        let given = guest.link().set(give.build()).execute().await;
        given.map_err(failed(format!("give the pod {}", link.name)))?;
    }
    Ok(())
}

/// Applies the host's settings.
pub(crate) async fn configure(
    pod: &Pod,
    request: &agent::ConfigureRequest,
) -> Result<(), GuestError> {
    let connected = pod.in_network(connect).await;
    let handle = connected.map_err(GuestError::system("open netlink"))?;
    if pod.users().is_some() {
        bring_loopback_up(&handle).await?;
        give(&request.interfaces).await?;
    }
    if request.interfaces.is_empty() {
        return Ok(());
    }
    let present = links(&handle).await?;
    let mut indices = HashMap::new();
    for interface in &request.interfaces {
        let link = present
            .iter()
            .find(|link| link.mac == interface.mac)
            .ok_or_else(|| {
                GuestError::NetworkValue(format!("no device has the MAC of {}", interface.name))
            })?;
        bring_up(&handle, link.index, interface).await?;
        indices.insert(interface.name.as_str(), link.index);
    }
    let index = |name: &str| {
        indices
            .get(name)
            .copied()
            .ok_or_else(|| GuestError::NetworkValue(format!("no interface {name:?}")))
    };
    for neighbour in &request.neighbours {
        let address = parse_ip(&neighbour.address)?;
        handle
            .neighbours()
            .add(index(&neighbour.interface)?, address)
            .link_layer_address(&neighbour.mac)
            .state(NeighbourState::Permanent)
            .replace()
            .execute()
            .await
            .map_err(failed(format!("add neighbour {address}")))?;
    }
    // Routes through a gateway need the route to the gateway first.
    let (direct, indirect): (Vec<_>, Vec<_>) = request
        .routes
        .iter()
        .partition(|route| route.gateway.is_empty());
    for route in direct.into_iter().chain(indirect) {
        add_route(&handle, index(&route.interface)?, route).await?;
    }
    Ok(())
}

async fn bring_up(
    handle: &Handle,
    index: u32,
    interface: &agent::Interface,
) -> Result<(), GuestError> {
    let name = &interface.name;
    let mut set = LinkUnspec::new_with_index(index).name(name.clone());
    if interface.mtu != 0 {
        set = set.mtu(interface.mtu);
    }
    let set = set.build();
    handle
        .link()
        .set(set)
        .execute()
        .await
        .map_err(failed(format!("name {name}")))?;
    for cidr in &interface.addresses {
        let (address, prefix) = parse_cidr(cidr)?;
        let mut add = handle.address().add(index, address, prefix);
        // The host's routes follow, all of them.
        let mut flags = AddressFlags::Noprefixroute;
        if address.is_ipv6() {
            // The CNI has made sure that it is not taken; waiting would cost 1 s.
            flags |= AddressFlags::Nodad;
        }
        let attributes = &mut add.message_mut().attributes;
        attributes.push(AddressAttribute::Flags(flags));
        add.replace()
            .execute()
            .await
            .map_err(failed(format!("add {cidr} to {name}")))?;
    }
    let up = LinkUnspec::new_with_index(index).up().build();
    handle
        .link()
        .set(up)
        .execute()
        .await
        .map_err(failed(format!("bring {name} up")))
}

async fn add_route(handle: &Handle, index: u32, route: &agent::Route) -> Result<(), GuestError> {
    let scope = RouteScope::from(u8::try_from(route.scope).unwrap_or(0));
    let shown = format!("add route {:?} via {:?}", route.destination, route.gateway);
    let destination = if route.destination.is_empty() {
        None
    } else {
        Some(parse_cidr(&route.destination)?)
    };
    let gateway = if route.gateway.is_empty() {
        None
    } else {
        Some(parse_ip(&route.gateway)?)
    };
    let source = if route.source.is_empty() {
        None
    } else {
        Some(parse_ip(&route.source)?)
    };
    let mixed = || GuestError::NetworkValue(format!("{shown}: address families are mixed"));
    macro_rules! message {
        ($family:ident, $address:ty) => {{
            let mut message = RouteMessageBuilder::<$address>::new()
                .output_interface(index)
                .scope(scope);
            if route.metric != 0 {
                message = message.priority(route.metric);
            }
            if route.onlink {
                message = message.onlink();
            }
            if let Some((address, prefix)) = destination {
                let IpAddr::$family(address) = address else {
                    return Err(mixed());
                };
                message = message.destination_prefix(address, prefix);
            }
            if let Some(gateway) = gateway {
                let IpAddr::$family(gateway) = gateway else {
                    return Err(mixed());
                };
                message = message.gateway(gateway);
            }
            if let Some(source) = source {
                let IpAddr::$family(source) = source else {
                    return Err(mixed());
                };
                message = message.pref_source(source);
            }
            message.build()
        }};
    }
    let message = match route.family {
        4 => message!(V4, Ipv4Addr),
        6 => message!(V6, Ipv6Addr),
        other => return Err(GuestError::NetworkValue(format!("{shown}: family {other}"))),
    };
    handle
        .route()
        .add(message)
        .replace()
        .execute()
        .await
        .map_err(failed(shown))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cidrs_are_checked() {
        assert_eq!(parse_cidr("10.88.0.5/16").unwrap().1, 16);
        assert_eq!(parse_cidr("fd00::5/64").unwrap().1, 64);
        for bad in ["10.88.0.5", "10.88.0.5/33", "x/8", "fd00::/129", ""] {
            assert!(parse_cidr(bad).is_err(), "{bad}");
        }
    }
}
