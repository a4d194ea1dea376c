// SPDX-License-Identifier: Apache-2.0
//! Exec and attach by client-go (tests/streams), over SPDY or WebSocket.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result};
use podhull_testkit::cri::Container;
use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, Command};

use crate::context::Context;

/// No run that ends by itself takes longer, but those that move a lot.
const WITHIN: Duration = Duration::from_secs(100);
/// The client's own failure.
pub(crate) const FAILED: i32 = 250;

/// What a session has.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Options {
    pub(crate) websocket: bool,
    pub(crate) stdin: bool,
    /// A terminal of this size, columns first.
    pub(crate) tty: Option<(u16, u16)>,
    /// The terminal's size after a SIGWINCH of the client's.
    pub(crate) resized: Option<(u16, u16)>,
}

/// Standard input, and nothing else, over SPDY.
pub(crate) const STDIN: Options = Options {
    websocket: false,
    stdin: true,
    tty: None,
    resized: None,
};

/// What came of a session.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

impl Done {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub(crate) fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

/// The client's command for an exec; its streams are pipes.
pub(crate) async fn exec(
    t: &Context,
    container: &Container,
    options: Options,
    command: &[&str],
) -> Result<Command> {
    let url = container.exec_url(command, options.stdin, options.tty.is_some());
    Ok(run(t, options, &url.await?))
}

/// The client's command for an attach; its streams are pipes.
pub(crate) async fn attach(
    t: &Context,
    container: &Container,
    options: Options,
) -> Result<Command> {
    let url = container.attach_url(options.stdin, options.tty.is_some());
    Ok(run(t, options, &url.await?))
}

fn run(t: &Context, options: Options, url: &str) -> Command {
    let mut command = Command::new(&t.node().programs().streams);
    let protocol = if options.websocket {
        "websocket"
    } else {
        "spdy"
    };
    command.args(["-protocol", protocol]);
    if options.stdin {
        command.arg("-stdin");
    }
    if options.tty.is_some() {
        let sizes = [options.tty, options.resized].into_iter().flatten();
        let sizes: Vec<_> = sizes
            .map(|(columns, rows)| format!("{columns}x{rows}"))
            .collect();
        command.args(["-tty", "-size", &sizes.join(",")]);
    }
    command
        .args(["run", url])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Runs an exec that is given `input`, and then the end of it.
pub(crate) async fn exec_with(
    t: &Context,
    container: &Container,
    options: Options,
    command: &[&str],
    input: &[u8],
) -> Result<Done> {
    let mut child = exec(t, container, options, command).await?.spawn()?;
    let mut stdin = child.stdin.take().context("stdin")?;
    let input = input.to_vec();
    // A process that does not read makes the write fail.
    let writer = tokio::spawn(async move { stdin.write_all(&input).await });
    let done = done(child).await?;
    writer.abort();
    Ok(done)
}

/// Waits for the client's end.
pub(crate) async fn done(child: Child) -> Result<Done> {
    let output = tokio::time::timeout(WITHIN, child.wait_with_output()).await;
    let output = output.context("the client goes on")??;
    Ok(Done {
        code: output.status.code().context("the client was killed")?,
        stdout: output.stdout,
        stderr: output.stderr,
    })
}
