// SPDX-License-Identifier: Apache-2.0
//! What a case is given.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use podhull_testkit::cri::api::NamespaceMode;
use podhull_testkit::cri::{Client, Container, ContainerBuilder, Pod, PodBuilder};
use podhull_testkit::oracle::Snapshot;
use podhull_testkit::{Containerd, Node, Release};
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::case::Setup;
use crate::compare::see;

/// What the kubelet masks in every container that is not privileged.
const MASKED: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
/// What it makes read-only.
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// For a container to start and write a few lines.
const TEXT_WITHIN: Duration = Duration::from_secs(60);

/// A node with a containerd, and the setup under test.
#[derive(Debug)]
pub(crate) struct Context {
    node: Node,
    containerd: RwLock<Containerd>,
    client: Client,
    setup: Setup,
    case: &'static str,
    folder: PathBuf,
    before: Snapshot,
}

impl Context {
    pub(crate) fn new(node: Node, containerd: Containerd) -> Self {
        let client = containerd.client().clone();
        let folder = node.folder().join("case");
        Self {
            setup: Setup {
                release: containerd.release(),
                handler: "runc",
            },
            node,
            containerd: RwLock::new(containerd),
            client,
            case: "warm-up",
            folder,
            before: Snapshot::default(),
        }
    }

    pub(crate) fn begin(&mut self, setup: Setup) {
        self.setup = setup;
    }

    pub(crate) fn begin_case(&mut self, name: &'static str, before: Snapshot) -> Result<()> {
        self.case = name;
        self.before = before;
        fs::create_dir_all(&self.folder).context("create the case's folder")
    }

    /// The setup under test.
    pub(crate) fn setup(&self) -> Setup {
        self.setup
    }

    /// True if pods are VMs.
    pub(crate) fn is_podhull(&self) -> bool {
        self.setup.is_podhull()
    }

    /// True on Debian's containerd.
    pub(crate) fn is_16(&self) -> bool {
        self.setup.release == Release::Debian16
    }

    pub(crate) fn node(&self) -> &Node {
        &self.node
    }

    /// The containerd, to look at.
    pub(crate) async fn containerd(&self) -> RwLockReadGuard<'_, Containerd> {
        self.containerd.read().await
    }

    /// The containerd, to stop and start.
    pub(crate) async fn containerd_mut(&self) -> RwLockWriteGuard<'_, Containerd> {
        self.containerd.write().await
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// A folder of the host for this case, empty at its begin.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The node before the case.
    pub(crate) fn before(&self) -> &Snapshot {
        &self.before
    }

    /// A path in the case's folder, as text.
    pub(crate) fn path(&self, name: &str) -> String {
        self.folder.join(name).to_string_lossy().into_owned()
    }

    /// A new folder in the case's folder.
    pub(crate) fn new_folder(&self, name: &str) -> Result<String> {
        let path = self.path(name);
        fs::create_dir_all(&path).with_context(|| format!("create {path}"))?;
        Ok(path)
    }

    /// A new file in the case's folder.
    pub(crate) fn new_file(&self, name: &str, content: &str) -> Result<String> {
        let path = self.path(name);
        fs::write(&path, content).with_context(|| format!("write {path}"))?;
        Ok(path)
    }

    /// A pod to be, as the kubelet asks for one: containers have PID
    /// namespaces of their own.
    pub(crate) fn pod(&self, name: &str) -> PodBuilder {
        self.client
            .pod(name)
            .handler(self.setup.handler)
            .label("podhull.test/case", self.case)
            .namespaces(|options| options.set_pid(NamespaceMode::Container))
    }

    /// An ordinary pod.
    pub(crate) async fn ready_pod(&self) -> Result<Pod> {
        self.pod("pod").run().await
    }

    /// A shell at a terminal in `pod`.
    pub(crate) async fn terminal(&self, pod: &Pod) -> Result<Container> {
        self.container(pod, "main")
            .command(["sh"])
            .edit(|config| {
                config.stdin = true;
                config.tty = true;
            })
            .start()
            .await
    }

    /// A container to be, with what the kubelet masks.
    pub(crate) fn container(&self, pod: &Pod, name: &str) -> ContainerBuilder {
        pod.container(name).security(|security| {
            security.masked_paths = MASKED.map(str::to_owned).into();
            security.readonly_paths = READ_ONLY.map(str::to_owned).into();
        })
    }

    /// An ordinary pod with a container that does nothing.
    pub(crate) async fn idle(&self) -> Result<(Pod, Container)> {
        let pod = self.ready_pod().await?;
        let container = self.container(&pod, "main").idle().start().await?;
        container.wrote("up", Duration::from_secs(20)).await?;
        Ok((pod, container))
    }
}

/// What a line of shell wrote, in the container that `builder` makes.
pub(crate) async fn text_of(builder: ContainerBuilder, script: &str) -> Result<String> {
    // containerd writes the log beside telling that the container has ended.
    const END: &str = "-end-of-the-text-";
    let script = format!("{script}\necho {END}$?");
    let container = builder.shell(&script).start().await?;
    let log = container.wrote(END, TEXT_WITHIN).await?;
    let text = log.text();
    match text.rsplit_once(END) {
        Some((text, "0")) => {
            let text = text.trim();
            see("text", text);
            Ok(text.to_owned())
        }
        _ => bail!("{script:?} failed: {text} {}", log.error_text()),
    }
}

/// The whole text of an error that had to come.
pub(crate) fn refusal<T>(result: Result<T>, of: &str) -> Result<String> {
    match result {
        Ok(_) => bail!("{of} was not refused"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

/// True if the run may take long: cases then move and repeat as much as they
/// are meant to, and not what a machine without KVM does in a minute.
pub(crate) fn heavy() -> bool {
    env::var_os("PODHULL_HEAVY").is_some()
}
