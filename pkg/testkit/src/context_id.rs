// SPDX-License-Identifier: Apache-2.0
//! Context ids of guests, as the node's kernel gives them.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use crate::sys;

const DEVICE: &str = "/dev/vhost-vsock";

/// A context id that is held without a guest.
#[derive(Debug)]
pub struct Reserved {
    _device: File,
}

/// True if the node's kernel gives guests their vsock.
#[must_use]
pub fn by_the_kernel() -> bool {
    Path::new(DEVICE).exists()
}

/// Takes `cid` until the answer is dropped, as who starts a guest does.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`] if somebody has it.
pub fn reserve(cid: u32) -> io::Result<Reserved> {
    let device = OpenOptions::new().read(true).write(true).open(DEVICE)?;
    sys::set_guest_cid(&device, cid.into())?;
    Ok(Reserved { _device: device })
}
