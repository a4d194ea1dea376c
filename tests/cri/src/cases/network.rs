// SPDX-License-Identifier: Apache-2.0
//! The pod's network.

use std::fs;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use podhull_testkit::containerd::{BRIDGE, Cni, LINKS_V4, LINKS_V6, SUBNET_V4, SUBNET_V6};
use podhull_testkit::cri::api::{DnsConfig, PortMapping};
use podhull_testkit::cri::{Container, Pod};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use crate::case::{cases, contains, same};
use crate::context::{Context, text_of};
use crate::outside::{NAMED, NODE, OUTSIDE, Outside, answer_names};
use crate::peer::numbers;
use crate::probe::{PROBE, with_probe};

cases! {
    ALL_TWICE:
        network_addresses_and_link_are_those_of_cni,
        network_containers_of_a_pod_share_localhost,
        network_pods_reach_each_other;
    ALL:
        network_host_and_pod_reach_each_other,
        network_host_port_leads_to_the_pod;
    ONCE:
        network_datagrams_of_the_host_are_answered,
        network_hosts_beyond_the_node_are_reached,
        network_large_transfers_arrive_whole,
        network_links_without_a_bridge_lead_everywhere,
        network_smaller_packets_are_kept_to;
}

const LARGE: u32 = 32 << 20;
const WITHIN: Duration = Duration::from_secs(20);

/// A pod with a web server that answers `text` on both families.
async fn server(t: &Context, name: &str, text: &str) -> Result<(Pod, Container)> {
    let pod = t.pod(name).run().await?;
    let script = format!("mkdir /www; echo {text} >/www/index.html; exec httpd -f -p 80 -h /www");
    let container = t.container(&pod, "web").shell(&script).start().await?;
    Ok((pod, container))
}

/// What a web server answers; it is waited for.
pub(super) async fn get(address: &str, port: u16) -> Result<String> {
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
    for address in [SUBNET_V4.1, SUBNET_V6.1] {
        let listener = TcpListener::bind((address, 0)).await?;
        let (answer, sent, peer) = says(&container, &listener).await?;
        same!(sent, "from the pod\n");
        same!(answer, "from the host");
        let peer = peer.to_string();
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
    large_transfers(t, LARGE).await.map(drop)
}

/// What the pod sends and is sent arrives; the pod's container.
async fn large_transfers(t: &Context, size: u32) -> Result<Container> {
    let bytes: Vec<u8> = (0..size / 4).flat_map(u32::to_be_bytes).collect();
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
    Ok(container)
}

/// In one packet and in several.
async fn network_datagrams_of_the_host_are_answered(t: &Context) -> Result<()> {
    const PORT: u16 = 9001;
    let pod = t.ready_pod().await?;
    let server = with_probe(t, t.container(&pod, "main")).await?;
    let command = [PROBE, "udp", &PORT.to_string()].map(str::to_owned);
    let server = server.edit(|config| config.command = command.into());
    server.start().await?.wrote("ready", WITHIN).await?;
    let (v4, v6) = pod.addresses().await?;
    for (own, address) in [("0.0.0.0", v4), ("::", v6)] {
        let socket = UdpSocket::bind((own, 0)).await?;
        socket.connect((&*address, PORT)).await?;
        for size in [1, 1400, 8000] {
            let sent = numbers(size);
            socket.send(&sent).await?;
            let mut answer = vec![0; size + 1];
            let received = tokio::time::timeout(WITHIN, socket.recv(&mut answer)).await;
            let received = received.with_context(|| format!("{size} bytes to {address}"))??;
            ensure!(
                answer.get(..received) == Some(&sent),
                "{size} bytes to {address} differ"
            );
        }
    }
    Ok(())
}

/// By TCP, and by UDP: a name server that the pod is given.
async fn network_hosts_beyond_the_node_are_reached(t: &Context) -> Result<()> {
    let outside = Outside::connected().await?;
    let dns = DnsConfig {
        servers: OUTSIDE.map(str::to_owned).into(),
        ..DnsConfig::default()
    };
    let pod = t.pod("pod").edit(|config| config.dns_config = Some(dns));
    let pod = pod.run().await?;
    let container = t.container(&pod, "main").idle().start().await?;
    for (address, node) in OUTSIDE.into_iter().zip(NODE) {
        let listener = outside.tcp(address, 0).await?;
        let (answer, sent, peer) = says(&container, &listener).await?;
        same!(sent, "from the pod\n", "what {address} was sent");
        same!(answer, "from the host", "what {address} answered");
        same!(peer.to_string(), node, "who asked {address}");
    }
    let [v4, v6] = OUTSIDE;
    let (names4, names6) = (outside.udp(v4, 53).await?, outside.udp(v6, 53).await?);
    // Of a server by its address, and of those that the pod is given.
    for (kind, server) in [("a", v4), ("aaaa", v6), ("a", ""), ("aaaa", "")] {
        let ask = format!("timeout 20 nslookup -type={kind} host.test {server}");
        let text = tokio::select! {
            answer = container.shell(&ask) => answer?.text(),
            ended = answer_names(&names4) => bail!("the name server ended: {ended:?}"),
            ended = answer_names(&names6) => bail!("the name server ended: {ended:?}"),
        };
        let named = match kind {
            "a" => NAMED.0.to_string(),
            _ => NAMED.1.to_string(),
        };
        contains!(&text, &named);
    }
    Ok(())
}

/// A line that the pod sends to a server and the server's answer: what either
/// got, and from where the pod came.
async fn says(container: &Container, server: &TcpListener) -> Result<(String, String, IpAddr)> {
    let at = server.local_addr()?;
    let script = format!(
        "echo from the pod | timeout 10 nc {} {}",
        at.ip(),
        at.port()
    );
    let served = async {
        let (mut stream, peer) = server.accept().await?;
        stream.write_all(b"from the host\n").await?;
        let mut text = [0; 13];
        stream.read_exact(&mut text).await?;
        anyhow::Ok((String::from_utf8_lossy(&text).into_owned(), peer.ip()))
    };
    let served = tokio::time::timeout(WITHIN, served);
    let (answer, served) = tokio::join!(container.shell(&script), served);
    let (sent, peer) = served.with_context(|| format!("nobody came to {at}"))??;
    Ok((answer?.text(), sent, peer))
}

/// By the CNI's plugin `ptp`, which leaves no route to the pod's own network but
/// by the node: other pods are there.
async fn network_links_without_a_bridge_lead_everywhere(t: &Context) -> Result<()> {
    t.containerd().await.use_cni(Cni::Links).await?;
    let outside = Outside::connected().await?;
    let (pod, web) = server(t, "server", "hello").await?;
    let (v4, v6) = pod.addresses().await?;
    ensure!(
        v4.starts_with("10.89.0.") && v6.starts_with("fd00:10:89:"),
        "{v4} {v6}"
    );
    let routes = web.shell("ip route; ip -6 route").await?.text();
    for (network, gateway) in [LINKS_V4, LINKS_V6] {
        contains!(
            &routes,
            &format!("default via {gateway} dev eth0"),
            &format!("{network} via {gateway} dev eth0"),
            &format!("{gateway} dev eth0")
        );
        ensure!(
            !routes.contains(&format!("{network} dev eth0")),
            "{network} is on the link: {routes}"
        );
    }
    same!(get(&v4, 80).await?, "hello", "IPv4");
    same!(get(&v6, 80).await?, "hello", "IPv6");
    for address in [LINKS_V4.1, LINKS_V6.1, OUTSIDE[0], OUTSIDE[1]] {
        let listener = if OUTSIDE.contains(&address) {
            outside.tcp(address, 0).await?
        } else {
            TcpListener::bind((address, 0)).await?
        };
        let (answer, _, _) = says(&web, &listener).await?;
        same!(answer, "from the host", "{address}");
    }
    let client = t.pod("client").run().await?;
    let script = format!("timeout 5 wget -qO- http://{v4}/; timeout 5 wget -qO- http://[{v6}]/");
    same!(
        text_of(t.container(&client, "client"), &script).await?,
        "hello\nhello"
    );
    Ok(())
}

async fn network_smaller_packets_are_kept_to(t: &Context) -> Result<()> {
    const MTU: u32 = 1400;
    let cni = Cni::BridgeWithMtu(MTU);
    t.containerd().await.use_cni(cni).await?;
    let container = large_transfers(t, LARGE / 8).await?;
    let guest = container
        .exec(["cat", "/sys/class/net/eth0/mtu"])
        .await?
        .text();
    same!(guest, MTU.to_string(), "the pod's MTU");
    let bridge = fs::read_to_string(format!("/sys/class/net/{BRIDGE}/mtu"))?;
    same!(bridge.trim(), MTU.to_string(), "the bridge's");
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
