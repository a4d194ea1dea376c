// SPDX-License-Identifier: Apache-2.0
//! The steps of the demonstration.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use podhull_testkit::cri::{Client, Container, Pod, api};
use podhull_testkit::oracle::{self, Snapshot};
use podhull_testkit::pod_processes::{self, Part, Process};
use podhull_testkit::{Containerd, Node, Release};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::screen::{Screen, Tone, took};
use crate::{boot, counts};

/// Serves its own name and kernel, notes each request, and ends when told to.
const WEB: &str = "\
mkdir -p /www
echo \"hello from $(hostname), kernel $(uname -r)\" >/www/index.html
httpd -f -vv -p 80 -h /www &
trap 'kill $!; exit 0' TERM
echo serving on port 80
wait";
/// Fetches the page of the other container; that one may just have started.
const FETCH: &str = "\
for try in 1 2 3 4 5 6 7 8 9; do
  wget -q -O - http://127.0.0.1/ && exit 0
  sleep 0.2
done
exit 1";
/// For what follows an event without one of its own: a log line, a socket.
const SOON: Duration = Duration::from_secs(20);
/// For the node to be as it was.
const CLEAN_WITHIN: Duration = Duration::from_secs(15);
/// Seconds that a container gets to end by itself.
const GRACE: i64 = 10;

/// What is shown.
#[derive(Debug)]
pub(crate) struct Choice {
    pub(crate) handler: String,
    pub(crate) release: Release,
}

impl Choice {
    /// False for a handler whose pods are plain processes.
    pub(crate) fn has_vm(&self) -> bool {
        self.handler.starts_with("podhull")
    }
}

/// Shows everything.
pub(crate) async fn run(screen: &mut Screen, node: &Node, choice: &Choice) -> Result<()> {
    let begin = Instant::now();
    let what = if choice.has_vm() {
        "a pod in its own microVM"
    } else {
        "a pod without a VM, for comparison"
    };
    screen.say(
        Tone::Strong,
        &format!("podhull demo: {what}, on a stock containerd"),
    );
    screen.say(
        Tone::Quiet,
        "All of it runs in namespaces of its own and is gone at the end; Ctrl-C is safe.",
    );

    screen.heading("A node");
    let containerd = screen
        .step("starting containerd", start(node, choice))
        .await?;
    let client = containerd.client();
    screen
        .step("running a first pod with runc", warm(client))
        .await?;
    let before = screen
        .step("taking the leak oracle's snapshot", async {
            let before = oracle::settled(&containerd, CLEAN_WITHIN).await?;
            Ok((
                before,
                "the leak oracle has seen the node without the pod".into(),
            ))
        })
        .await?;

    screen.heading("A pod");
    let pod = screen
        .step("RunPodSandbox", sandbox(client, choice))
        .await?;
    let web = pod.container("web").shell(WEB);
    let web = screen
        .step("starting container web", async {
            Ok((web.start().await?, "container web: a busybox httpd".into()))
        })
        .await?;
    let sidecar = pod.container("sidecar").idle();
    let sidecar = screen
        .step("starting container sidecar", async {
            Ok((
                sidecar.start().await?,
                "container sidecar: a shell that waits".into(),
            ))
        })
        .await?;
    if emulated(&pod_processes::of_pod(pod.id())?) {
        let why = no_kvm(&containerd.log());
        screen.line(
            Tone::Notice,
            &format!(
                "KVM does not work on this machine{why}. So this guest is emulated (QEMU's TCG):"
            ),
        );
        screen.line(
            Tone::Notice,
            "slower than with KVM, and no isolation boundary. Fit for a demonstration, not for use.",
        );
    }

    screen.heading("A look inside");
    look_inside(screen, choice, &pod, &web, &sidecar).await?;
    if choice.has_vm() {
        screen.heading("Where the time of the start went (ms since containerd called the shim)");
        let moments = screen
            .step("reading the boot's phases", async {
                Ok((
                    boot::read(pod.id())?,
                    "boot.json in the sandbox's run folder".into(),
                ))
            })
            .await?;
        for line in boot::waterfall(&moments) {
            screen.line(Tone::Plain, &line);
        }
    }

    screen.heading("The end");
    let during = screen
        .step("counting what the pod has on the node", async {
            let during = Snapshot::take(&containerd).await?;
            Ok((during, describe(&pod_processes::of_pod(pod.id())?)))
        })
        .await?;
    screen
        .step("deleting the pod", delete(&pod, &[web, sidecar]))
        .await?;
    let after = screen
        .step("looking for what is left", async {
            oracle::assert_clean(&containerd, &before, CLEAN_WITHIN).await?;
            let after = Snapshot::take(&containerd).await?;
            Ok((
                after,
                "nothing is left: the node is as it was before the pod".into(),
            ))
        })
        .await?;
    for line in counts::table([&before, &during, &after]) {
        screen.line(Tone::Plain, &line);
    }
    let total = took(begin.elapsed());
    screen.say(Tone::Good, &format!("\nAll of it worked, in {total}."));
    Ok(())
}

async fn start(node: &Node, choice: &Choice) -> Result<(Containerd, String)> {
    let containerd = node.start_containerd(choice.release).await?;
    let version = containerd
        .client()
        .runtime()
        .version(api::VersionRequest::default())
        .await
        .context("Version")?
        .into_inner()
        .runtime_version;
    let sentence = format!("containerd {version} is up, with images and a CNI network");
    Ok((containerd, sentence))
}

/// The first pod of a node leaves a bridge and folders, which stay.
async fn warm(client: &Client) -> Result<((), String)> {
    // What an installation makes; the shim then needs nothing new.
    fs::create_dir_all("/run/podhull").context("create /run/podhull")?;
    let pod = client.pod("first").run().await?;
    pod.container("main")
        .idle()
        .start()
        .await?
        .stop(GRACE)
        .await?;
    pod.stop().await?;
    pod.remove().await?;
    Ok((
        (),
        "a first pod, with runc, came and went: the node is warm".into(),
    ))
}

async fn sandbox(client: &Client, choice: &Choice) -> Result<(Pod, String)> {
    let pod = client.pod("demo").handler(&choice.handler).run().await?;
    let (v4, v6) = pod.addresses().await?;
    let sentence = format!(
        "RunPodSandbox with {}: the pod has {v4} and {v6}",
        choice.handler
    );
    Ok((pod, sentence))
}

async fn look_inside(
    screen: &mut Screen,
    choice: &Choice,
    pod: &Pod,
    web: &Container,
    sidecar: &Container,
) -> Result<()> {
    let guest = screen
        .step("exec in web", async {
            let kernel = web.exec(["uname", "-r"]).await?.success()?.text();
            Ok((kernel, "exec in web: uname -r".into()))
        })
        .await?;
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").context("the host's kernel")?;
    let host = host.trim();
    screen.line(Tone::Plain, &format!("the pod's kernel   {guest}"));
    screen.line(Tone::Plain, &format!("the host's kernel  {host}"));
    ensure!(
        guest != host || !choice.has_vm(),
        "the pod runs on the host's kernel"
    );
    let page = screen
        .step("fetching localhost in sidecar", async {
            let page = sidecar.shell(FETCH).await?.success()?.text();
            Ok((
                page,
                "exec in sidecar: web's page, over localhost of the pod".into(),
            ))
        })
        .await?;
    screen.line(Tone::Plain, &page);
    let answer = screen.step("HTTP from the node", http(pod)).await?;
    screen.line(Tone::Plain, &answer);
    let log = screen.step("reading web's log", logs(web)).await?;
    for line in log {
        screen.line(Tone::Plain, &line);
    }
    Ok(())
}

/// A request to the pod's address; the first line of the answer, and its body.
async fn http(pod: &Pod) -> Result<(String, String)> {
    let (v4, _) = pod.addresses().await?;
    let exchange = async {
        let mut stream = TcpStream::connect((&*v4, 80)).await?;
        stream
            .write_all(b"GET / HTTP/1.0\r\nHost: demo\r\n\r\n")
            .await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = tokio::time::timeout(SOON, exchange)
        .await
        .with_context(|| format!("no answer from {v4} port 80"))?
        .with_context(|| format!("talk to {v4} port 80"))?;
    let answer = String::from_utf8_lossy(&answer);
    let first = answer.lines().next().unwrap_or_default();
    let body = answer.lines().last().unwrap_or_default();
    ensure!(first.contains(" 200 "), "{v4} answered {first:?}");
    let sentence = format!("HTTP from the node to {v4} port 80");
    Ok((format!("{first}: {body}"), sentence))
}

/// The log, once it tells of the request from the node.
async fn logs(web: &Container) -> Result<(Vec<String>, String)> {
    web.wrote("serving", SOON).await?;
    let by = Instant::now() + SOON;
    loop {
        let log = web.log()?;
        let requests = log.error_text();
        if requests.matches("response:200").count() >= 2 {
            let mut lines = vec![format!("stdout  {}", log.text())];
            // httpd tells of the URL and of the answer; the answers suffice.
            let answers = requests.lines().filter(|line| line.contains("response:"));
            lines.extend(answers.map(|line| format!("stderr  {line}")));
            return Ok((lines, "web's log, as kubectl would show it".into()));
        }
        ensure!(
            Instant::now() < by,
            "the log lacks the requests: {requests:?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// As the kubelet: containers first, then the pod.
async fn delete(pod: &Pod, containers: &[Container]) -> Result<((), String)> {
    let mut codes = Vec::new();
    for container in containers {
        container.stop(GRACE).await?;
        codes.push(container.status().await?.exit_code.to_string());
    }
    pod.stop().await?;
    pod.remove().await?;
    let codes = codes.join(" and ");
    Ok((
        (),
        format!("the pod is deleted; its containers ended with {codes}"),
    ))
}

/// What the pod has on the node, with its memory.
fn describe(processes: &[Process]) -> String {
    let part = |part: Part, name: &str| {
        let its: Vec<u64> = processes
            .iter()
            .filter(|process| process.part == part)
            .map(|process| process.pss_kib)
            .collect();
        let mib = its.iter().sum::<u64>() >> 10;
        (!its.is_empty()).then(|| format!("{name} {mib} MiB"))
    };
    let parts: Vec<String> = [
        part(Part::Shim, "shim"),
        part(Part::Vmm, "QEMU with the guest"),
        part(Part::Helper, "device backends"),
        part(Part::Container, "containers"),
    ]
    .into_iter()
    .flatten()
    .collect();
    format!("memory on the node (PSS): {}", parts.join(", "))
}

/// What the shim, whose log goes to containerd's, has said of KVM; empty if nothing.
fn no_kvm(log: &str) -> String {
    let line = log.lines().rev().find(|line| line.contains("no KVM"));
    let reason = line.and_then(|line| line.split_once("reason="));
    let reason = reason.map(|(_, rest)| rest.split(" sandbox=").next().unwrap_or(rest));
    reason.map_or_else(String::new, |reason| format!(" ({reason})"))
}

/// True if the VMM was told to emulate.
fn emulated(processes: &[Process]) -> bool {
    processes
        .iter()
        .filter(|process| process.part == Part::Vmm)
        .any(|vmm| {
            vmm.arguments
                .iter()
                .any(|argument| argument.contains("accel=tcg"))
        })
}
