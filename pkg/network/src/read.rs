// SPDX-License-Identifier: Apache-2.0
//! What the CNI gave the pod.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use futures::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};

use crate::error::NetworkError;

/// A pod's network as the guest sets it up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestNetwork {
    /// Interfaces; the one device that the VM has.
    pub interfaces: Vec<Interface>,
    /// Its routes, also those that the kernel made from the addresses: a CNI
    /// may have removed them.
    pub routes: Vec<Route>,
    /// Permanent neighbours.
    pub neighbours: Vec<Neighbour>,
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name, usually `eth0`.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Addresses in CIDR notation.
    pub addresses: Vec<String>,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Through which interface.
    pub interface: String,
    /// CIDR; empty for the default route.
    pub destination: String,
    /// Empty for a route on the link.
    pub gateway: String,
    /// 4 or 6.
    pub family: u32,
    /// Its priority; 0 for none.
    pub metric: u32,
    /// Linux' `rtm_scope`.
    pub scope: u32,
    /// Preferred source address; empty for none.
    pub source: String,
    /// The gateway is on the link though no prefix says so.
    pub onlink: bool,
}

/// A neighbour that is not resolved but given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// On which interface.
    pub interface: String,
    /// Its address.
    pub address: String,
    /// Its hardware address.
    pub mac: Vec<u8>,
}

/// The pod's interface: the one that has an address.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) index: u32,
    pub(crate) interface: Interface,
}

pub(crate) async fn links(handle: &Handle) -> Result<Vec<LinkMessage>, NetworkError> {
    let links = handle.link().get().execute().try_collect().await;
    links.map_err(NetworkError::step("list links"))
}

pub(crate) fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        })
}

pub(crate) async fn find_interface(handle: &Handle, netns: &Path) -> Result<Found, NetworkError> {
    let mut found = Vec::new();
    for link in links(handle).await? {
        if link.header.flags.contains(LinkFlags::Loopback) {
            continue;
        }
        let addresses = addresses(handle, link.header.index).await?;
        if !addresses.is_empty() {
            found.push((link, addresses));
        }
    }
    let names: Vec<_> = found.iter().filter_map(|(link, _)| name_of(link)).collect();
    let names = names.join(", ");
    let mut found = found.into_iter();
    let described = match (found.next(), found.next()) {
        (None, _) => return Err(NetworkError::NoInterface(netns.into())),
        (Some((link, addresses)), None) => describe(&link, addresses),
        (Some(_), Some(_)) => None,
    };
    described.ok_or_else(|| NetworkError::Interfaces {
        netns: netns.into(),
        found: names,
    })
}

/// The interface as the guest's device; `None` if it has no Ethernet address.
fn describe(link: &LinkMessage, addresses: Vec<String>) -> Option<Found> {
    let (mut mac, mut mtu) = (None, 0);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            LinkAttribute::Mtu(value) => mtu = *value,
            _ => {}
        }
    }
    let interface = Interface {
        name: name_of(link)?.to_owned(),
        mac: mac?,
        mtu,
        addresses,
    };
    let index = link.header.index;
    Some(Found { index, interface })
}

/// Addresses of the interface; link-local IPv6 follows from the hardware address
/// and is the guest's own business.
async fn addresses(handle: &Handle, index: u32) -> Result<Vec<String>, NetworkError> {
    let messages: Vec<_> = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute()
        .try_collect()
        .await
        .map_err(NetworkError::step("list addresses"))?;
    let found = messages.iter().filter_map(|message| {
        let of = |local| {
            message
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    AddressAttribute::Local(ip) if local => Some(*ip),
                    AddressAttribute::Address(ip) if !local => Some(*ip),
                    _ => None,
                })
        };
        // On IPv4 ADDRESS is the peer of a point-to-point link.
        let ip: IpAddr = of(true).or_else(|| of(false))?;
        let link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        (!link_local).then(|| format!("{ip}/{}", message.header.prefix_len))
    });
    Ok(found.collect())
}

pub(crate) async fn routes(
    handle: &Handle,
    index: u32,
    interface: &str,
) -> Result<Vec<Route>, NetworkError> {
    let mut found = Vec::new();
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    for query in [v4, v6] {
        let messages: Vec<RouteMessage> = handle
            .route()
            .get(query)
            .execute()
            .try_collect()
            .await
            .map_err(NetworkError::step("list routes"))?;
        found.extend(
            messages
                .iter()
                .filter_map(|message| route(message, index, interface)),
        );
    }
    Ok(found)
}

fn route(message: &RouteMessage, index: u32, interface: &str) -> Option<Route> {
    let header = &message.header;
    let ours = header.table == RouteHeader::RT_TABLE_MAIN
        && header.kind == RouteType::Unicast
        && message.attributes.contains(&RouteAttribute::Oif(index))
        && !is_link_local(message);
    let family = match header.address_family {
        AddressFamily::Inet => 4,
        AddressFamily::Inet6 => 6,
        _ => return None,
    };
    let mut route = Route {
        interface: interface.to_owned(),
        destination: String::new(),
        gateway: String::new(),
        family,
        metric: 0,
        scope: u8::from(header.scope).into(),
        source: String::new(),
        onlink: header.flags.contains(RouteFlags::Onlink),
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                route.destination =
                    format!("{}/{}", text(address)?, header.destination_prefix_length);
            }
            RouteAttribute::Gateway(address) => route.gateway = text(address)?,
            RouteAttribute::PrefSource(address) => route.source = text(address)?,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            _ => {}
        }
    }
    ours.then_some(route)
}

/// The route to the link-local addresses, which are the guest's own business.
fn is_link_local(message: &RouteMessage) -> bool {
    message.header.protocol == RouteProtocol::Kernel
        && message.attributes.iter().any(|attribute| {
            matches!(attribute, RouteAttribute::Destination(RouteAddress::Inet6(ip)) if ip.is_unicast_link_local())
        })
}

fn text(address: &RouteAddress) -> Option<String> {
    match address {
        RouteAddress::Inet(ip) => Some(ip.to_string()),
        RouteAddress::Inet6(ip) => Some(ip.to_string()),
        _ => None,
    }
}

pub(crate) async fn neighbours(
    handle: &Handle,
    index: u32,
    interface: &str,
) -> Result<Vec<Neighbour>, NetworkError> {
    let messages: Vec<_> = handle
        .neighbours()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(NetworkError::step("list neighbours"))?;
    let permanent = messages.into_iter().filter(|message| {
        message.header.ifindex == index && message.header.state == NeighbourState::Permanent
    });
    Ok(permanent
        .filter_map(|message| {
            let (mut address, mut mac) = (None, None);
            for attribute in message.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                        address = Some(ip.to_string());
                    }
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                        address = Some(ip.to_string());
                    }
                    NeighbourAttribute::LinkLayerAddress(bytes) => mac = Some(bytes),
                    _ => {}
                }
            }
            Some(Neighbour {
                interface: interface.to_owned(),
                address: address?,
                mac: mac?,
            })
        })
        .collect())
}
