// SPDX-License-Identifier: Apache-2.0
//! Who is not the shim, and talks to the agent.

use std::fmt::Debug;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use podhull_testkit::context_id;
use vsock::{VsockAddr, VsockStream};

use super::vsock_id::id_of;
use crate::case::{cases, contains, same};
use crate::context::Context;
use crate::held;
use crate::procfs::{Processes, Role};
use crate::stream::Session;

cases! {
    PODHULL_ONCE:
        stranger_without_the_token_gets_nowhere;
}

const WITHIN: Duration = Duration::from_secs(20);
/// Longer than the agent waits for a connection's first words, emulated.
const AGENT_WAITS: Duration = Duration::from_secs(60);
/// Where the agent takes sessions (`VsockPort::SESSIONS`).
const SESSIONS: u32 = 1025;
/// Frames (`pkg/transport/src/session/frame.rs`).
const HELLO: u8 = 1;
const DATA: u8 = 4;

/// A connection to the guest that is no transport of the shim's.
trait Stranger: Read + Write + Debug + Send {
    /// How long a read waits.
    fn wait(&self, within: Duration) -> io::Result<()>;
}

impl Stranger for UnixStream {
    fn wait(&self, within: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(within))
    }
}

impl Stranger for VsockStream {
    fn wait(&self, within: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(within))
    }
}

/// The way to a pod's guest, for any process of the host's root.
#[derive(Debug, Clone)]
enum Door {
    /// The daemon's socket in the pod's run folder.
    Socket(PathBuf),
    /// The guest's context id, of the kernel's vsock.
    Vsock(u32),
}

impl Door {
    fn of(pod_id: &str) -> Result<Self> {
        if context_id::by_the_kernel() {
            return Ok(Self::Vsock(id_of(&Processes::of(pod_id)?)?));
        }
        let mut folders = fs::read_dir("/run/podhull").context("podhull's run folder")?;
        let folder = folders.next().context("no pod has a run folder")??.path();
        ensure!(folders.next().is_none(), "there is more than one pod");
        Ok(Self::Socket(folder.join("vm/vsock")))
    }

    /// A connection to `port` of the guest; `None` if nobody listens there.
    fn connect(&self, port: u32) -> Result<Option<Box<dyn Stranger>>> {
        match self {
            Self::Socket(path) => by_socket(path, port),
            Self::Vsock(cid) => match VsockStream::connect(&VsockAddr::new(*cid, port)) {
                Ok(stream) => Ok(Some(Box::new(stream))),
                Err(error) if error.raw_os_error() == Some(Errno::ECONNRESET as i32) => Ok(None),
                Err(error) => Err(error).with_context(|| format!("connect to port {port}")),
            },
        }
    }
}

fn by_socket(path: &Path, port: u32) -> Result<Option<Box<dyn Stranger>>> {
    let mut stream = UnixStream::connect(path)?;
    stream.wait(WITHIN)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let (mut answer, mut byte) = (Vec::new(), [0]);
    loop {
        match stream.read(&mut byte) {
            Ok(1) if byte == *b"\n" => break,
            Ok(1) => answer.extend(byte),
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(error).context("the daemon's answer"),
        }
    }
    contains!(String::from_utf8_lossy(&answer), "OK ");
    Ok(Some(Box::new(stream)))
}

/// What the agent says to `words`, until it hangs up.
fn answer(door: &Door, words: &[u8], within: Duration) -> Result<Vec<u8>> {
    let mut stream = door.connect(SESSIONS)?.context("nobody takes sessions")?;
    // It may hang up before it has read all of it.
    drop(stream.write_all(words));
    stream.wait(within)?;
    let mut said = Vec::new();
    match stream.read_to_end(&mut said) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            bail!("the agent does not hang up, said {said:?}")
        }
        // An end or a reset.
        _ => Ok(said),
    }
}

fn frame(kind: u8, payload: &[u8]) -> Result<Vec<u8>> {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend(u32::try_from(payload.len())?.to_le_bytes());
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// Asks for the streams of `container`'s init process, with a token of ours.
fn hello(version: u16, container: &str) -> Result<Vec<u8>> {
    let id = container.as_bytes();
    let parts = [
        &version.to_le_bytes()[..],
        &[7; 32],
        &[1, u8::try_from(id.len())?],
        id,
        &[0],
    ];
    frame(HELLO, &parts.concat())
}

/// Waits until the host has heard of them, which it does with a heartbeat: each
/// is counted by what was wrong with it, and each kind is logged once.
async fn are_counted(shim: u32, refused: [(&str, usize); 4]) -> Result<()> {
    let folder = held::run_folder(shim)?;
    let counted = refused.map(|(reason, number)| {
        format!("podhull_guest_refused_connections_total{{reason=\"{reason}\"}} {number}")
    });
    let by = Instant::now() + WITHIN;
    loop {
        let metrics = held::metrics(&folder).await?;
        let lines: Vec<_> = metrics
            .lines()
            .filter(|line| line.starts_with("podhull_guest_"))
            .collect();
        if counted.iter().all(|line| lines.contains(&&**line)) {
            break;
        }
        ensure!(Instant::now() < by, "{lines:#?}, expected {counted:#?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // Each in one place only.
    let metrics = held::metrics(&folder).await?;
    let elsewhere = metrics.lines().find(|line| {
        line.starts_with("podhull_guest_errors_total{kind=\"protocol\"}") && !line.ends_with(" 0")
    });
    same!(elsewhere, None, "counted once more");
    let log = fs::read_to_string(folder.join("shim.log"))?;
    let told = |kind: &str| {
        let about = format!("kind=\"{kind}\"");
        let lines = log.lines();
        lines
            .filter(|line| line.contains("wrong in the guest") && line.contains(&about))
            .count()
    };
    same!(told("protocol"), 0, "lines about the protocol");
    for (reason, number) in refused {
        same!(told(reason), number.min(1), "lines about {reason}");
    }
    Ok(())
}

async fn stranger_without_the_token_gets_nowhere(t: &Context) -> Result<()> {
    let (pod, container) = t.idle().await?;
    let mut session = Session::exec(&container, &["cat"], false).await?;
    session.ask("before\n", "before\n").await?;
    let door = Door::of(pod.id())?;
    let hello_then_data = [hello(1, container.id())?, frame(DATA, b"echo pwned\n")?].concat();
    let tries = [
        ("a wrong token", hello(1, container.id())?, WITHIN),
        ("a wrong token, and bytes", hello_then_data, WITHIN),
        ("a version to come", hello(2, container.id())?, WITHIN),
        ("no HELLO", frame(DATA, b"echo pwned\n")?, WITHIN),
        (
            "another protocol",
            b"GET / HTTP/1.1\r\nHost: guest\r\n\r\n".to_vec(),
            WITHIN,
        ),
        (
            "the promise of a frame",
            vec![HELLO, 0, 0, 0, 255, 255, 255, 255],
            WITHIN,
        ),
        (
            "half of a HELLO",
            hello(1, container.id())?[..20].to_vec(),
            AGENT_WAITS,
        ),
        ("silence", Vec::new(), AGENT_WAITS),
    ];
    let refused = [("token", 2), ("greeting", 4), ("silence", 2), ("accept", 0)];
    same!(
        refused.iter().map(|(_, number)| number).sum::<usize>(),
        tries.len(),
        "who is to be counted"
    );
    let trying = move || {
        for (what, words, within) in tries {
            let said = answer(&door, &words, within).context(what)?;
            same!(said, Vec::<u8>::new(), "the agent answers {what}");
        }
        for port in [1, 22, 1024, 1026, 2000] {
            let listens = door.connect(port)?.is_some();
            ensure!(!listens, "the guest listens at {port}");
        }
        anyhow::Ok(())
    };
    tokio::task::spawn_blocking(trying).await??;
    are_counted(Processes::of(pod.id())?.pid(Role::Shim)?, refused).await?;
    // Whoever was there has seen nothing of it.
    session.ask("after\n", "after\n").await?;
    session.close().await?;
    container.exec(["true"]).await?.success()?;
    ensure!(pod.is_ready().await?, "the pod has ended");
    Ok(())
}
