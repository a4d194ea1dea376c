// SPDX-License-Identifier: Apache-2.0
//! The rules that send a namespace's loopback connections to a listener of ours.

use std::ffi::CStr;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use netlink_bindings::nftables::{Chained, CmpOps, MetaKeys, Nfgenmsg, Registers};
use netlink_socket2::{NetlinkSocket, ReplyError};

use crate::error::NetworkError;

const TABLE: &CStr = c"podhull";
const CHAIN: &CStr = c"loopback";

// linux/netfilter.h, linux/netfilter/nf_tables.h and netfilter_ipv4.h.
const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const HOOK_LOCAL_OUT: u32 = 3;
const PRIORITY_NAT_DST: i32 = -100;
const NAT_DST: u32 = 1;
const SUBSYSTEM: u16 = 10;
/// `lo` is the first link of every namespace.
const LOOPBACK_INDEX: u32 = 1;

/// Redirects every TCP connection over `lo` to `port` of the same family's
/// loopback address. Must run on a thread inside the namespace.
///
/// # Errors
/// What the kernel refused; nothing stays then.
pub(crate) fn install(port: u16, ipv6: bool) -> Result<(), NetworkError> {
    // A table that a shim before this one left would redirect to its port.
    remove()?;
    transact(|batch| {
        batch
            .request()
            .set_create()
            .op_newtable_do(&header())
            .encode()
            .push_name(TABLE);
        batch
            .request()
            .set_create()
            .op_newchain_do(&header())
            .encode()
            .push_table(TABLE)
            .push_name(CHAIN)
            .nested_hook()
            .push_num(HOOK_LOCAL_OUT)
            .push_priority(PRIORITY_NAT_DST)
            .end_nested()
            .push_type(c"nat");
        let v4 = Ipv4Addr::LOCALHOST.octets();
        redirect(batch, NFPROTO_IPV4, &v4, port);
        if ipv6 {
            let v6 = Ipv6Addr::LOCALHOST.octets();
            redirect(batch, NFPROTO_IPV6, &v6, port);
        }
    })
    .map_err(|error| NetworkError::step("redirect the loopback")(io::Error::from(error)))
}

/// Removes the rules of this namespace; there may be none.
///
/// # Errors
/// What the kernel refused.
pub(crate) fn remove() -> Result<(), NetworkError> {
    let removed = transact(|batch| {
        batch
            .request()
            .op_deltable_do(&header())
            .encode()
            .push_name(TABLE);
    });
    match removed.map_err(io::Error::from) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(NetworkError::step("remove the loopback's redirect")(error))
        }
        _ => Ok(()),
    }
}

fn header() -> Nfgenmsg {
    Nfgenmsg {
        nfgen_family: NFPROTO_INET,
        ..Nfgenmsg::default()
    }
}

/// Makes all of the requests, or none of them.
fn transact(fill: impl FnOnce(&mut Chained<'static>)) -> Result<(), ReplyError> {
    let mut whole = Nfgenmsg::new();
    whole.set_res_id(SUBSYSTEM);
    let mut batch = Chained::new(1);
    batch.request().op_batch_begin_do(&whole);
    fill(&mut batch);
    batch.request().op_batch_end_do(&whole);
    let batch = batch.finalize();
    NetlinkSocket::new().request_chained(&batch)?.recv_all()
}

/// `meta nfproto <family> oif lo meta l4proto tcp dnat to <address>:<port>`
fn redirect(batch: &mut Chained<'static>, family: u8, address: &[u8], port: u16) {
    let tcp = [libc::IPPROTO_TCP.to_le_bytes()[0]];
    let loopback = LOOPBACK_INDEX.to_ne_bytes();
    let conditions: [(MetaKeys, &[u8]); 3] = [
        (MetaKeys::Nfproto, &[family]),
        (MetaKeys::Oif, &loopback),
        (MetaKeys::L4Proto, &tcp),
    ];
    let mut request = batch
        .request()
        .set_create()
        .set_append()
        .op_newrule_do(&header());
    let mut rule = request
        .encode()
        .push_table(TABLE)
        .push_chain(CHAIN)
        .nested_expressions();
    for (key, value) in conditions {
        rule = rule
            .nested_elem()
            .nested_data_meta()
            .push_key(key as u32)
            .push_dreg(Registers::Reg1 as u32)
            .end_nested()
            .end_nested()
            .nested_elem()
            .nested_data_cmp()
            .push_sreg(Registers::Reg1 as u32)
            .push_op(CmpOps::Eq as u32)
            .nested_data()
            .push_value(value)
            .end_nested()
            .end_nested()
            .end_nested();
    }
    for (register, value) in [
        (Registers::Reg1, address),
        (Registers::Reg2, &port.to_be_bytes()),
    ] {
        rule = rule
            .nested_elem()
            .nested_data_immediate()
            .push_dreg(register as u32)
            .nested_data()
            .push_value(value)
            .end_nested()
            .end_nested()
            .end_nested();
    }
    rule.nested_elem()
        .nested_data_nat()
        .push_type(NAT_DST)
        .push_family(family.into())
        .push_reg_addr_min(Registers::Reg1 as u32)
        .push_reg_proto_min(Registers::Reg2 as u32);
}
