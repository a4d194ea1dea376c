// SPDX-License-Identifier: Apache-2.0
//! Attaches in a row, at once, and across a restart of containerd.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use podhull_testkit::cri::{Container, Pod};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{ChildStdin, ChildStdout};

use crate::case::{cases, contains, same};
use crate::client::{Options, STDIN, attach, done};
use crate::context::Context;
use crate::stream::Session;

cases! {
    ALL:
        attach_across_a_restart_of_containerd_loses_nothing,
        attach_across_a_killed_containerd_keeps_what_is_on_its_way;
    ALL_TWICE:
        attach_again_and_at_once_reaches_the_same_process,
        attach_at_once_to_a_terminal_shares_it,
        attach_to_a_container_without_input_sees_it_to_its_end,
        attach_input_once_ends_with_its_first_client;
}

const WITHIN: Duration = Duration::from_secs(20);

/// A container that answers each line.
async fn answering(t: &Context, pod: &Pod, name: &str, once: bool) -> Result<Container> {
    t.container(pod, name)
        .shell("while read line; do echo \"got $line\"; echo \"err $line\" >&2; done; echo end; exit 6")
        .edit(|config| {
            config.stdin = true;
            config.stdin_once = once;
        })
        .start()
        .await
}

/// Sends a line until it is answered, as [`Session::ask`].
async fn ask(
    stdin: &mut ChildStdin,
    lines: &mut Lines<BufReader<ChildStdout>>,
    line: &str,
) -> Result<()> {
    let answer = format!("got {line}");
    for _ in 0..10 {
        stdin.write_all(format!("{line}\n").as_bytes()).await?;
        let answered = async {
            while lines.next_line().await?.context("the client has ended")? != answer {}
            anyhow::Ok(())
        };
        if let Ok(answered) = tokio::time::timeout(Duration::from_secs(2), answered).await {
            return answered;
        }
    }
    bail!("{line:?} has no answer");
}

async fn attach_again_and_at_once_reaches_the_same_process(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = answering(t, &pod, "main", false).await?;
    let mut expected = Vec::new();
    // In a row, by both protocols.
    for round in 0..3 {
        let line = format!("websocket {round}");
        let mut session = Session::attach(&container, false).await?;
        let answer = format!("got {line}\n");
        session.ask(&format!("{line}\n"), &answer).await?;
        session.close().await?;
        expected.push(format!("got {line}"));

        let line = format!("spdy {round}");
        let mut child = attach(t, &container, STDIN).await?.spawn()?;
        let mut stdin = child.stdin.take().context("stdin")?;
        let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
        ask(&mut stdin, &mut lines, &line).await?;
        child.kill().await?;
        expected.push(format!("got {line}"));
    }
    // At once: each sees what either asks.
    let mut first = Session::attach(&container, false).await?;
    let mut second = Session::attach(&container, false).await?;
    for (session, name) in [(&mut first, "first"), (&mut second, "second")] {
        let answer = format!("got {name}\n");
        session.ask(&format!("{name}\n"), &answer).await?;
        expected.push(format!("got {name}"));
    }
    for (turn, line) in ["one", "two", "three", "four"].into_iter().enumerate() {
        let sender = if turn % 2 == 0 {
            &mut first
        } else {
            &mut second
        };
        sender.send(&format!("{line}\n")).await?;
        for session in [&mut first, &mut second] {
            session.wrote(&format!("got {line}\n")).await?;
        }
        expected.push(format!("got {line}"));
    }
    // One leaves, the other stays.
    first.close().await?;
    second.send("alone\n").await?;
    second.wrote("got alone\n").await?;
    expected.push("got alone".into());
    let both = String::from_utf8_lossy(&second.stdout).into_owned();
    let (_, both) = both.rsplit_once("got second\n").context("no second")?;
    same!(both, "got one\ngot two\ngot three\ngot four\ngot alone\n");
    let log = container.wrote("got alone", WITHIN).await?.text();
    // What was asked twice was answered twice.
    let mut lines: Vec<_> = log.lines().collect();
    lines.dedup();
    same!(lines, expected);
    ensure!(pod.is_ready().await?, "the pod ended");
    Ok(())
}

async fn attach_at_once_to_a_terminal_shares_it(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t.terminal(&pod).await?;
    let mut first = Session::attach(&container, true).await?;
    let mut second = Session::attach(&container, true).await?;
    second.ask("echo here-$((40+1))\n", "here-41\r\n").await?;
    first.ask("echo so-$((40+2))\n", "so-42\r\n").await?;
    second.wrote("so-42\r\n").await?;
    first.close().await?;
    // The terminal goes on, and with another size.
    let tty = Options {
        tty: Some((100, 30)),
        ..STDIN
    };
    let mut child = attach(t, &container, tty).await?.spawn()?;
    let mut stdin = child.stdin.take().context("stdin")?;
    stdin
        .write_all(b"until [ \"$(stty size)\" = '30 100' ]; do sleep 0.1; done; exit 9\n")
        .await?;
    same!(container.exited(WITHIN).await?.exit_code, 9);
    // Whoever is attached hears of the end.
    let ended = done(child).await?;
    contains!(ended.text(), "stty size");
    second.drain().await?;
    Ok(())
}

/// With and without a terminal, and whether or not the client would give input.
async fn attach_to_a_container_without_input_sees_it_to_its_end(t: &Context) -> Result<()> {
    const SCRIPT: &str = "until [ -e /seen ]; do echo waits; sleep 0.1; done; \
        [ -t 0 ] || ! read line || echo read; echo said; echo err >&2; exit 3";
    let pod = t.ready_pod().await?;
    for (number, (tty, input)) in [(false, false), (false, true), (true, false), (true, true)]
        .into_iter()
        .enumerate()
    {
        let container = t.container(&pod, &format!("main-{number}"));
        let container = container.shell(SCRIPT).edit(|config| config.tty = tty);
        let container = container.start().await?;
        let mut session = Session::open(&container.attach_url(input, tty).await?).await?;
        session.wrote("waits").await?;
        if input {
            session.send("nobody reads this\n").await?;
        }
        container.shell("touch /seen").await?.success()?;
        session.drain().await?;
        same!(container.exited(WITHIN).await?.exit_code, 3);
        let seen = [&session.stdout, &session.stderr].map(|bytes| String::from_utf8_lossy(bytes));
        let [stdout, stderr] = seen;
        let (expected, errors) = match tty {
            true => ("waits\r\nsaid\r\nerr\r\n", ""),
            false => ("waits\nsaid\n", "err\n"),
        };
        let what = format!("terminal: {tty}, input: {input}, {stdout:?} {stderr:?}");
        ensure!(stdout.ends_with(expected), "{what}");
        ensure!(stderr.ends_with(errors), "{what}");
    }
    Ok(())
}

async fn attach_input_once_ends_with_its_first_client(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = answering(t, &pod, "main", true).await?;
    // One that only looks does not end the input.
    let mut looking = attach(t, &container, Options::default()).await?.spawn()?;
    let mut lines = BufReader::new(looking.stdout.take().context("stdout")?).lines();
    let mut child = attach(t, &container, STDIN).await?.spawn()?;
    let mut stdin = child.stdin.take().context("stdin")?;
    ask(&mut stdin, &mut lines, "hello").await?;
    drop(stdin);
    // What was asked twice is answered twice.
    let mut last = None;
    while let Some(line) = tokio::time::timeout(WITHIN, lines.next_line())
        .await
        .context("no end")??
    {
        last = Some(line);
    }
    same!(last.as_deref(), Some("end"));
    same!(container.exited(WITHIN).await?.exit_code, 6);
    let ended = done(child).await?;
    ensure!(ended.text().ends_with("end\n"), "{ended:?}");
    let log = container.wrote("end", WITHIN).await?.text();
    ensure!(
        log.starts_with("got hello\n") && log.ends_with("\nend"),
        "{log}"
    );
    looking.wait().await?;
    Ok(())
}

/// The numbers of whole lines `line N`, which must follow each other.
pub(super) fn following(text: &str) -> Result<Vec<u64>> {
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let mut numbers: Vec<u64> = Vec::new();
    for line in whole.lines() {
        let number = line
            .strip_prefix("line ")
            .and_then(|number| number.parse().ok());
        let number = number.with_context(|| format!("{line:?} in {text}"))?;
        if let Some(last) = numbers.last() {
            same!(number, last + 1, "the line after {last}");
        }
        numbers.push(number);
    }
    Ok(numbers)
}

async fn attach_across_a_restart_of_containerd_loses_nothing(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = t
        .container(&pod, "main")
        .shell("(n=0; while :; do n=$((n+1)); echo line $n; sleep 0.05; done) & while read line; do echo $line >&2; done")
        .edit(|config| config.stdin = true)
        .start()
        .await?;
    container.wrote("line 2", WITHIN).await?;
    let mut before = Session::attach(&container, false).await?;
    before.wrote("line ").await?;
    before.send("before\n").await?;
    {
        let mut containerd = t.containerd_mut().await;
        containerd.stop(Signal::SIGTERM).await?;
        // What is written now waits in the FIFO.
        tokio::time::sleep(Duration::from_secs(1)).await;
        containerd.start_again().await?;
    }
    // The client's connection has ended with containerd, on whichever word.
    before.ended().await?;
    let first = following(&String::from_utf8_lossy(&before.stdout))?;
    let mut after = Session::attach(&container, false).await?;
    after.send("after\n").await?;
    let next = container.log()?.text().lines().count() + 10;
    after.wrote(&format!("line {next}\n")).await?;
    let second = following(&String::from_utf8_lossy(&after.stdout))?;
    ensure!(
        first.last() < second.first(),
        "{first:?} and then {second:?}"
    );
    // Nothing that nobody was attached to see is lost: the log has all of it.
    let log = container.wrote(&format!("line {next}\n"), WITHIN).await?;
    let all = following(&(log.text() + "\n"))?;
    same!(all.first(), Some(&1));
    same!(log.error_text(), "before\nafter");
    Ok(())
}

/// What is written when nobody reads: several times the buffer of a FIFO.
const LINES: u32 = 40_000;
/// Of these, what fits in it: the process gets that far without a reader.
const FIT: u32 = 10_000;

async fn attach_across_a_killed_containerd_keeps_what_is_on_its_way(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let folder = t.new_folder("data")?;
    let mut attached = Vec::new();
    for (name, tty) in [("pipes", false), ("terminal", true)] {
        let script = format!(
            "echo up; until [ -e /data/go ]; do sleep 0.1; done; seq {FIT}; echo >/data/{name}; \
             seq {} {LINES}; while read line; do echo \"got $line\"; done",
            FIT + 1
        );
        let container = t
            .container(&pod, name)
            .shell(&script)
            .mount(&folder, "/data", false)
            .edit(|config| {
                config.stdin = true;
                config.tty = tty;
            })
            .start()
            .await?;
        container.wrote("up", WITHIN).await?;
        let session = Session::attach(&container, tty).await?;
        attached.push((name, tty, container, session));
    }
    {
        let mut containerd = t.containerd_mut().await;
        containerd.stop(Signal::SIGKILL).await?;
        t.new_file("data/go", "")?;
        let by = Instant::now() + WITHIN;
        for (name, ..) in &attached {
            while !Path::new(&folder).join(name).exists() {
                ensure!(Instant::now() < by, "{name}: nothing is written");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        containerd.start_again().await?;
    }
    for (name, tty, container, mut before) in attached {
        // The client's connection has ended with containerd, on whichever word.
        before.ended().await?;
        // A terminal's echo of what is asked would be between them.
        container.wrote(&LINES.to_string(), WITHIN).await?;
        let mut after = Session::attach(&container, tty).await?;
        after.ask("word\n", "got word").await?;
        let log = container.wrote("got word", WITHIN).await?.text();
        let numbers = log.lines().filter_map(|line| line.trim().parse().ok());
        let numbers: Vec<u32> = numbers.collect();
        let first_gap = (1..).zip(&numbers).find(|(number, got)| number != *got);
        same!(first_gap, None, "{name}: the first line that differs");
        same!(numbers.len(), usize::try_from(LINES)?, "{name}: lines");
        after.close().await?;
    }
    Ok(())
}
