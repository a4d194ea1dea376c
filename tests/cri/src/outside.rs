// SPDX-License-Identifier: Apache-2.0
//! A host behind the node, in a network namespace of its own. The node sends
//! what comes from pods to it with its own address.

use std::fs::File;
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener, UdpSocket as StdUdp,
};
use std::sync::mpsc;
use std::thread;

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use podhull_testkit::pod_netns::inside;
use tokio::net::{TcpListener, UdpSocket};
use tokio::process::Command;

/// Its addresses, and the node's ones towards it.
pub(crate) const OUTSIDE: [&str; 2] = ["203.0.113.2", "2001:db8::2"];
pub(crate) const NODE: [&str; 2] = ["203.0.113.1", "2001:db8::1"];

/// The host; a thread keeps its namespace, and goes with it.
#[derive(Debug)]
pub(crate) struct Outside {
    netns: File,
    _stays: mpsc::Sender<()>,
}

impl Outside {
    /// A host that is connected and listens to nothing yet.
    pub(crate) async fn connected() -> Result<Self> {
        let (_stays, ends) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            let opened = unshare(CloneFlags::CLONE_NEWNET)
                .map_err(std::io::Error::from)
                .and_then(|()| File::open("/proc/thread-self/ns/net"));
            // Nobody waits any more if the case was given up.
            let _ = tell.send((opened, nix::unistd::gettid()));
            let _ = ends.recv();
        });
        let (opened, task) = tokio::task::spawn_blocking(move || told.recv()).await??;
        let outside = Self {
            netns: opened.context("make a network namespace")?,
            _stays,
        };
        let [v4, v6] = NODE;
        run(&format!(
            "ip link add out0 type veth peer name eth0 netns {task}
             ip address add {v4}/24 dev out0; ip address add {v6}/64 dev out0 nodad
             ip link set out0 up"
        ))
        .await?;
        let [v4, v6] = OUTSIDE;
        let script = format!(
            "ip link set lo up; ip link set eth0 up
             ip address add {v4}/24 dev eth0; ip address add {v6}/64 dev eth0 nodad"
        );
        let set_up = move || {
            let status = std::process::Command::new("sh")
                .args(["-ec", &script])
                .status()?;
            ensure!(status.success(), "{script}: {status}");
            Ok(())
        };
        inside(&outside.netns, set_up).await?;
        Ok(outside)
    }

    /// Listens there.
    pub(crate) async fn tcp(&self, address: &str, port: u16) -> Result<TcpListener> {
        let address = SocketAddr::new(address.parse::<IpAddr>()?, port);
        let listener = inside(&self.netns, move || {
            let listener = StdListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        Ok(TcpListener::from_std(listener.await?)?)
    }

    /// A socket there.
    pub(crate) async fn udp(&self, address: &str, port: u16) -> Result<UdpSocket> {
        let address = SocketAddr::new(address.parse::<IpAddr>()?, port);
        let socket = inside(&self.netns, move || {
            let socket = StdUdp::bind(address)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        });
        Ok(UdpSocket::from_std(socket.await?)?)
    }
}

async fn run(script: &str) -> Result<()> {
    let output = Command::new("sh").args(["-ec", script]).output().await?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{script}: {errors}");
    Ok(())
}

/// What every name has.
pub(crate) const NAMED: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(192, 0, 2, 7),
    Ipv6Addr::new(0x2001, 0xdb8, 7, 0, 0, 0, 0, 7),
);

/// Answers DNS queries with [`NAMED`].
pub(crate) async fn answer_names(socket: &UdpSocket) -> Result<()> {
    const AAAA: &[u8] = &[0, 28, 0, 1];
    let mut query = [0; 512];
    loop {
        let (size, from) = socket.recv_from(&mut query).await?;
        let query = query.get(..size).context("a query")?;
        let (id, question) = query.get(..2).zip(query.get(12..)).context("its head")?;
        let record = if question.ends_with(AAAA) {
            [&[0, 28, 0, 1, 0, 0, 0, 9, 0, 16][..], &NAMED.1.octets()].concat()
        } else {
            [&[0, 1, 0, 1, 0, 0, 0, 9, 0, 4][..], &NAMED.0.octets()].concat()
        };
        // An answer, recursion available; one question, one record, whose name
        // is the question's.
        let head = [0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0];
        let answer = [id, &head, question, &[0xc0, 12], &record].concat();
        socket.send_to(&answer, from).await?;
    }
}
