// SPDX-License-Identifier: Apache-2.0
//! The network namespace of the node's only pod, as containerd enters it to
//! forward a port.

use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr, TcpStream as StdStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use tokio::net::TcpStream;

/// No connection takes longer to be made.
const WITHIN: Duration = Duration::from_secs(30);

fn path() -> Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?;
    let paths = table
        .lines()
        .filter(|line| line.contains(" - nsfs "))
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|path| path.contains("/cni-"));
    let mut paths: Vec<_> = paths.map(PathBuf::from).collect();
    // /var/run may be another name of /run.
    paths.sort_by(|a, b| a.file_name().cmp(&b.file_name()));
    paths.dedup_by(|a, b| a.file_name() == b.file_name());
    match <[PathBuf; 1]>::try_from(paths) {
        Ok([path]) => Ok(path),
        Err(paths) => bail!("not one pod's network namespace: {paths:?}"),
    }
}

/// Opens it.
///
/// # Errors
/// If the node has no pod, or several.
pub fn open() -> Result<File> {
    let path = path()?;
    File::open(&path).with_context(|| format!("open {}", path.display()))
}

/// Runs `work` on a thread in a network namespace.
///
/// # Errors
/// `work`'s, or that the namespace cannot be entered.
pub async fn inside<T: Send + 'static>(
    netns: &File,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let netns = netns.try_clone()?;
    let work = move || {
        setns(netns, CloneFlags::CLONE_NEWNET).context("enter the pod's network namespace")?;
        work()
    };
    let thread = thread::spawn(work);
    let joined = tokio::task::spawn_blocking(move || thread.join()).await?;
    joined.map_err(|_| anyhow!("the thread in the namespace died"))?
}

/// Connects to a loopback address of the pod's namespace, as containerd does.
///
/// # Errors
/// If nobody listens there.
pub async fn connect(netns: &File, address: impl Into<IpAddr>, port: u16) -> Result<TcpStream> {
    let address = SocketAddr::new(address.into(), port);
    let stream = inside(netns, move || {
        let stream = StdStream::connect_timeout(&address, WITHIN)?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    });
    Ok(TcpStream::from_std(stream.await?)?)
}
