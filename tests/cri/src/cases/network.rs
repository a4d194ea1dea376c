// SPDX-License-Identifier: Apache-2.0
//! The pod's network.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use podhull_testkit::containerd::{BRIDGE, SUBNET_V4, SUBNET_V6};
use podhull_testkit::cri::api::PortMapping;
use podhull_testkit::cri::{Container, Pod};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::case::{cases, contains, same};
use crate::context::{Context, text_of};

cases! {
    ALL_TWICE:
        network_addresses_and_link_are_those_of_cni,
        network_containers_of_a_pod_share_localhost,
        network_pods_reach_each_other;
    ALL:
        network_host_and_pod_reach_each_other,
        network_host_port_leads_to_the_pod;
    ONCE:
        network_large_transfers_arrive_whole;
}

const LARGE: u32 = 32 << 20;

/// A pod with a web server that answers `text` on both families.
async fn server(t: &Context, name: &str, text: &str) -> Result<(Pod, Container)> {
    let pod = t.pod(name).run().await?;
    let script = format!("mkdir /www; echo {text} >/www/index.html; exec httpd -f -p 80 -h /www");
    let container = t.container(&pod, "web").shell(&script).start().await?;
    Ok((pod, container))
}

/// What a web server answers; it is waited for.
async fn get(address: &str, port: u16) -> Result<String> {
    let mut last = None;
    for _ in 0..100 {
        match try_get(address, port).await {
            Ok(text) => return Ok(text),
            Err(error) => last = Some(error),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err(last
        .context("not tried")?
        .context(format!("GET from {address} port {port}")))
}

async fn try_get(address: &str, port: u16) -> Result<String> {
    let connect = TcpStream::connect((address, port));
    let mut stream = tokio::time::timeout(Duration::from_secs(5), connect).await??;
    stream
        .write_all(b"GET /index.html HTTP/1.0\r\n\r\n")
        .await?;
    let mut text = String::new();
    let read = stream.read_to_string(&mut text);
    tokio::time::timeout(Duration::from_secs(5), read).await??;
    let (head, body) = text.split_once("\r\n\r\n").context("no HTTP answer")?;
    ensure!(head.contains(" 200 "), "{head}");
    Ok(body.trim().to_owned())
}

async fn network_addresses_and_link_are_those_of_cni(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let (v4, v6) = pod.addresses().await?;
    ensure!(
        v4.starts_with("10.88.") && v6.starts_with("fd00:10:88:"),
        "{v4} {v6}"
    );
    let text = container
        .exec(["ip", "address", "show", "dev", "eth0"])
        .await?
        .text();
    contains!(
        &text,
        &format!("inet {v4}/16"),
        &format!("inet6 {v6}/64"),
        "mtu 1500",
        "UP"
    );
    let info = pod.full_status().await?.info;
    let info: Value = serde_json::from_str(info.get("info").context("no verbose status")?)?;
    let mac = info["cniResult"]["Interfaces"]["eth0"]["Mac"].as_str();
    if let Some(mac) = mac.filter(|mac| !mac.is_empty()) {
        contains!(&text, mac);
    } else {
        ensure!(
            t.setup().shim_is_sandboxer(),
            "no MAC in {}",
            info["cniResult"]
        );
    }
    let routes = container.shell("ip route; ip -6 route").await?.text();
    contains!(
        &routes,
        &format!("default via {}", SUBNET_V4.1),
        &format!("default via {}", SUBNET_V6.1),
        "10.88.0.0/16 dev eth0"
    );
    let mtu = fs::read_to_string(format!("/sys/class/net/{BRIDGE}/mtu"))?;
    let guest = container
        .exec(["cat", "/sys/class/net/eth0/mtu"])
        .await?
        .text();
    same!(guest, mtu.trim(), "the MTU");
    let links = container.exec(["ls", "/sys/class/net"]).await?.text();
    let links: Vec<_> = links
        .lines()
        .filter(|link| !["sit0", "ip6tnl0"].contains(link))
        .collect();
    same!(links, ["eth0", "lo"]);
    Ok(())
}

async fn network_containers_of_a_pod_share_localhost(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let script = "mkdir /www; echo local >/www/index.html; httpd -p 127.0.0.1:8080 -h /www; exec httpd -f -p [::1]:8081 -h /www";
    let _web = t.container(&pod, "web").shell(script).start().await?;
    let wait = "for i in $(seq 50); do timeout 5 wget -qO- http://127.0.0.1:8080/ 2>/dev/null && break; sleep 0.1; done";
    let text = text_of(
        t.container(&pod, "client"),
        &format!("{wait}; {}", wait.replace("127.0.0.1:8080", "[::1]:8081")),
    )
    .await?;
    same!(text, "local\nlocal");
    let (v4, _) = pod.addresses().await?;
    ensure!(
        try_get(&v4, 8080).await.is_err(),
        "a loopback server answers the host"
    );
    Ok(())
}

async fn network_pods_reach_each_other(t: &Context) -> Result<()> {
    let (pod, _web) = server(t, "server", "hello").await?;
    let (v4, v6) = pod.addresses().await?;
    same!(get(&v4, 80).await?, "hello");
    let client = t.pod("client").run().await?;
    let script = format!(
        "timeout 5 wget -qO- http://{v4}/; timeout 5 wget -qO- http://[{v6}]/; ping -c 1 -W 5 {v4} | grep -c ' 0% packet loss'; ping6 -c 1 -W 5 {v6} | grep -c ' 0% packet loss'"
    );
    same!(
        text_of(t.container(&client, "client"), &script).await?,
        "hello\nhello\n1\n1"
    );
    Ok(())
}

async fn network_host_and_pod_reach_each_other(t: &Context) -> Result<()> {
    let (pod, container) = server(t, "pod", "hello").await?;
    let (v4, v6) = pod.addresses().await?;
    same!(get(&v4, 80).await?, "hello", "IPv4");
    same!(get(&v6, 80).await?, "hello", "IPv6");
    ensure!(
        TcpStream::connect((&*v4, 81)).await.is_err(),
        "a closed port accepts"
    );
    for (address, name) in [
        (SUBNET_V4.1, SUBNET_V4.1.to_owned()),
        (SUBNET_V6.1, SUBNET_V6.1.to_owned()),
    ] {
        let listener = TcpListener::bind((address, 0)).await?;
        let port = listener.local_addr()?.port();
        let script = format!("echo from the pod | timeout 10 nc {name} {port}");
        let (output, accepted) = tokio::join!(container.shell(&script), async {
            let (mut stream, peer) = listener.accept().await?;
            stream.write_all(b"from the host\n").await?;
            let mut text = [0; 13];
            stream.read_exact(&mut text).await?;
            anyhow::Ok((String::from_utf8_lossy(&text).into_owned(), peer))
        });
        let (text, peer) = accepted?;
        same!(text, "from the pod\n");
        same!(output?.text(), "from the host");
        let peer = peer.ip().to_string();
        ensure!(peer == v4 || peer == v6, "the pod comes from {peer}");
    }
    Ok(())
}

async fn network_host_port_leads_to_the_pod(t: &Context) -> Result<()> {
    const PORT: u16 = 18080;
    let mapping = PortMapping {
        container_port: 80,
        host_port: PORT.into(),
        ..PortMapping::default()
    };
    let pod = t
        .pod("pod")
        .edit(|config| config.port_mappings = vec![mapping])
        .run()
        .await?;
    let script = "mkdir /www; echo mapped >/www/index.html; exec httpd -f -p 80 -h /www";
    let _web = t.container(&pod, "web").shell(script).start().await?;
    same!(get(&pod.addresses().await?.0, 80).await?, "mapped");
    same!(get(SUBNET_V4.1, PORT).await?, "mapped");
    pod.stop().await?;
    ensure!(
        try_get(SUBNET_V4.1, PORT).await.is_err(),
        "the port is still mapped"
    );
    Ok(())
}

async fn network_large_transfers_arrive_whole(t: &Context) -> Result<()> {
    let bytes: Vec<u8> = (0..LARGE / 4).flat_map(u32::to_be_bytes).collect();
    let folder = t.new_folder("data")?;
    fs::write(format!("{folder}/sent"), &bytes)?;
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .idle()
        .mount(&folder, "/data", false)
        .start()
        .await?;
    let (v4, _) = pod.addresses().await?;

    let listener = TcpListener::bind((SUBNET_V4.1, 0)).await?;
    let port = listener.local_addr()?.port();
    let script = format!("nc {} {port} </data/sent", SUBNET_V4.1);
    let (sent, received) = tokio::join!(container.shell(&script), async {
        let (mut stream, _) = listener.accept().await?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await?;
        anyhow::Ok(bytes)
    });
    sent?;
    let received = received?;
    same!(received.len(), bytes.len(), "bytes from the pod");
    ensure!(received == bytes, "the bytes from the pod differ");

    let script = "nc -l -p 9000 </dev/null >/data/received";
    let (output, sent) = tokio::join!(container.shell(script), async {
        let mut stream = connect(&v4, 9000).await?;
        stream.write_all(&bytes).await?;
        stream.shutdown().await?;
        // Its end comes when the pod has read everything.
        stream.read_to_end(&mut Vec::new()).await?;
        anyhow::Ok(())
    });
    sent.context("send to the pod")?;
    output?.success()?;
    let received = fs::read(format!("{folder}/received"))?;
    same!(received.len(), bytes.len(), "bytes to the pod");
    ensure!(received == bytes, "the bytes to the pod differ");
    Ok(())
}

async fn connect(address: &str, port: u16) -> Result<TcpStream> {
    for _ in 0..100 {
        if let Ok(stream) = TcpStream::connect((address, port)).await {
            return Ok(stream);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    anyhow::bail!("nobody listens at {address} port {port}")
}
