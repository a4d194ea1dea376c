// SPDX-License-Identifier: Apache-2.0
//! Tying two interfaces together below the namespace's stack.

use rtnetlink::{Handle, LinkUnspec};

use crate::error::NetworkError;

/// `ETH_P_ALL` in network byte order, as a filter's protocol.
const ALL: u16 = 0x0003_u16.to_be();

fn index(index: u32) -> i32 {
    i32::try_from(index).unwrap_or(i32::MAX)
}

/// Adds an ingress queue to the interface. One that is there already is an
/// error: it, or what is in it, would go with ours.
async fn add_ingress(handle: &Handle, of: u32) -> Result<(), NetworkError> {
    let added = handle.qdisc().add(index(of)).ingress().execute().await;
    added.map_err(NetworkError::step(format!("add ingress queue to {of}")))
}

/// Sends everything that comes in at `from` out of `to`. By the u32 classifier:
/// matchall is missing in some kernels.
async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<(), NetworkError> {
    let step = || format!("redirect {from} to {to}");
    handle
        .traffic_filter(index(from))
        .add()
        .parent(0xffff_0000)
        .priority(1)
        .protocol(ALL)
        .redirect(to)
        .map_err(NetworkError::step(step()))?
        .execute()
        .await
        .map_err(NetworkError::step(step()))
}

/// Ties `a` and `b`, both ways. If that fails, nothing stays on `a`.
pub(crate) async fn tie(handle: &Handle, a: u32, b: u32) -> Result<(), NetworkError> {
    add_ingress(handle, a).await?;
    let tied = async {
        add_ingress(handle, b).await?;
        redirect(handle, a, b).await?;
        redirect(handle, b, a).await
    };
    let tied = tied.await;
    if tied.is_err() {
        untie(handle, a).await?;
    }
    tied
}

/// Removes the interface's ingress queue with its filters; it may be gone.
pub(crate) async fn untie(handle: &Handle, of: u32) -> Result<(), NetworkError> {
    let mut request = handle.qdisc().del(index(of));
    let message = request.message_mut();
    message.header.parent = rtnetlink::packet_route::tc::TcHandle::INGRESS;
    message.header.handle = 0xffff_0000.into();
    match request.execute().await {
        Err(rtnetlink::Error::NetlinkError(error)) if is_absent(error.raw_code()) => Ok(()),
        other => other.map_err(NetworkError::step(format!("remove ingress queue of {of}"))),
    }
}

fn is_absent(code: i32) -> bool {
    use nix::errno::Errno;
    [Errno::ENOENT, Errno::EINVAL, Errno::ENODEV]
        .into_iter()
        .any(|errno| code == -(errno as i32))
}

/// Brings the interface up with `mtu`.
pub(crate) async fn bring_up(handle: &Handle, of: u32, mtu: u32) -> Result<(), NetworkError> {
    let message = LinkUnspec::new_with_index(of).mtu(mtu).up().build();
    let set = handle.link().set(message).execute().await;
    set.map_err(NetworkError::step(format!("bring {of} up")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inside::inside;
    use crate::netns::{ETH0, Netns, soon};
    use crate::read;

    #[tokio::test]
    async fn a_tie_that_fails_half_way_leaves_nothing() {
        let Some(netns) = Netns::with(ETH0) else {
            return;
        };
        let before = netns.state();
        let tied = inside(netns.path(), soon(), |handle| async move {
            let links = read::links(&handle).await?;
            let eth0 = links
                .iter()
                .find(|link| read::name_of(link) == Some("eth0"));
            tie(&handle, eth0.unwrap().header.index, 9999).await
        });
        let error = tied.await.unwrap_err();
        assert!(error.to_string().contains("queue to 9999"), "{error}");
        assert_eq!(netns.state(), before);
    }
}
