// SPDX-License-Identifier: Apache-2.0
//! Exec through Kubernetes' own client, and what its streams carry.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use nix::sys::signal::Signal;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};

use crate::case::{cases, contains, same};
use crate::client::{FAILED, Options, STDIN, done, exec, exec_with};
use crate::context::{Context, heavy};
use crate::peer::{numbers, sum};
use crate::probe::{PROBE, with_probe};
use crate::procfs::signal;
use crate::stream::Session;

cases! {
    ALL:
        exec_by_kubernetes_client_works;
    ALL_TWICE:
        exec_terminal_without_input_writes_and_ends,
        exec_input_ends_wherever_a_buffer_does,
        exec_fifty_sessions_at_once_all_work,
        exec_first_bytes_after_a_pause_arrive,
        exec_under_way_ends_with_its_removed_container,
        exec_slow_stdout_does_not_delay_stderr;
    // runc's shim of 1.6 may cut what comes last.
    TWICE_BUT_RUNC_16:
        exec_end_does_not_cut_the_last_bytes;
    ONCE:
        exec_much_both_ways_at_once_is_whole,
        exec_idle_for_half_a_minute_goes_on;
}

/// Within this, what cannot run has failed.
const FAILS_WITHIN: Duration = Duration::from_secs(5);
const WITHIN: Duration = Duration::from_secs(20);

/// Over a WebSocket, which always has a stream for input, containerd closes the
/// output when that ends, which it does at once: only the code is certain to arrive.
async fn exec_terminal_without_input_writes_and_ends(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    let command = ["sh", "-c", "tty; echo err >&2; exit 4"];
    for websocket in [false, true] {
        let options = Options {
            websocket,
            tty: Some((80, 24)),
            ..Options::default()
        };
        let done = exec_with(t, &container, options, &command, b"").await?;
        same!(done.code, 4, "{done:?}");
        if !websocket {
            let said = done.text();
            ensure!(said.starts_with("/dev/pts/"), "{done:?}");
            ensure!(said.ends_with("\r\nerr\r\n"), "{done:?}");
        }
    }
    Ok(())
}

async fn exec_by_kubernetes_client_works(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    for websocket in [false, true] {
        let plain = Options {
            websocket,
            ..Options::default()
        };
        let stdin = Options {
            stdin: true,
            ..plain
        };
        for (script, code) in [
            ("exit 0", 0),
            ("exit 3", 3),
            ("kill -9 $$", 137),
            ("kill $$", 143),
        ] {
            let script = format!("echo out; echo err >&2; {script}");
            let done = exec_with(t, &container, plain, &["sh", "-c", &script], b"").await?;
            same!((done.code, &*done.text()), (code, "out\n"), "{done:?}");
            ensure!(done.error_text().starts_with("err\n"), "{done:?}");
        }
        // The input ends before the process reads it. The WebSocket's protocol
        // knows no end of input.
        if !websocket {
            let command = ["sh", "-c", "sleep 0.3; cat; echo end"];
            let early = exec_with(t, &container, stdin, &command, b"some\n").await?;
            same!((early.code, &*early.text()), (0, "some\nend\n"));
        }
        // The process ends before its input does.
        let mut late = exec(t, &container, stdin, &["sh", "-c", "read line; exit 4"])
            .await?
            .spawn()?;
        let mut input = late.stdin.take().context("stdin")?;
        input.write_all(b"some\nmore\n").await?;
        same!(done(late).await?.code, 4, "input that does not end");
        drop(input);

        let tty = Options {
            tty: Some((132, 43)),
            resized: Some((90, 30)),
            ..stdin
        };
        // A terminal has no size, and stty says so, until its first one arrives.
        let script = "of() { until [ \"$(stty size 2>/dev/null)\" = \"$1\" ]; do sleep 0.1; done; }; \
            of '43 132'; echo sized; of '30 90'; \
            test -t 0 && test -t 2 && read line && echo $line on a terminal; exit 5";
        let command = ["sh", "-c", script];
        let mut child = exec(t, &container, tty, &command).await?.spawn()?;
        // containerd takes the end of input for leaving where there is a terminal.
        let mut input = child.stdin.take().context("stdin")?;
        let mut sized = [0; 7];
        let output = child.stdout.as_mut().context("stdout")?;
        let read = tokio::time::timeout(WITHIN, output.read_exact(&mut sized)).await;
        read.context("the terminal has not the size it began with")??;
        same!(String::from_utf8_lossy(&sized), "sized\r\n");
        signal(
            child.id().context("the client has ended")?,
            Signal::SIGWINCH,
        )?;
        input.write_all(b"line\n").await?;
        let done = done(child).await?;
        drop(input);
        same!(done.code, 5, "a terminal: {}", done.text());
        contains!(done.text(), "line on a terminal\r\n");

        let begin = Instant::now();
        for (command, says) in [
            ("no-such-command", "not found"),
            ("/etc/not-executable", "denied"),
        ] {
            let done = exec_with(t, &container, stdin, &[command], b"").await?;
            ensure!(
                done.code == FAILED || done.code == 126 || done.code == 127,
                "{done:?}"
            );
            contains!(done.error_text(), says);
        }
        let took = begin.elapsed();
        ensure!(
            took < FAILS_WITHIN,
            "missing commands failed only after {took:?}"
        );
    }
    Ok(())
}

async fn exec_input_ends_wherever_a_buffer_does(t: &Context) -> Result<()> {
    const KIB: usize = 1024;
    let (_pod, container) = t.idle().await?;
    // containerd#13934 lost the end of input of a multiple of 32 KiB.
    for size in [
        32 * KIB,
        64 * KIB,
        96 * KIB,
        128 * KIB,
        1,
        32 * KIB - 1,
        64 * KIB + 1,
    ] {
        let bytes = numbers(size);
        let script = "tee /dev/stderr | sha256sum";
        let done = exec_with(t, &container, STDIN, &["sh", "-c", script], &bytes).await?;
        same!(done.code, 0, "{size} bytes");
        ensure!(
            done.stderr == bytes,
            "{size} bytes: {} came back",
            done.stderr.len()
        );
        let hash = done.text();
        same!(
            format!("{size} {}", hash.split(' ').next().unwrap_or_default()),
            sum(&bytes)
        );
    }
    Ok(())
}

async fn exec_fifty_sessions_at_once_all_work(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    let container = &container;
    let sessions = (0..50).map(|number| async move {
        let script = "read line; echo got $line; echo err $line >&2; exit $line";
        let mut session = Session::exec(container, &["sh", "-c", script], false).await?;
        session.send(&format!("{number}\n")).await?;
        same!(session.exit_code().await?, number);
        same!(
            String::from_utf8_lossy(&session.stdout),
            format!("got {number}\n")
        );
        same!(
            String::from_utf8_lossy(&session.stderr),
            format!("err {number}\n")
        );
        anyhow::Ok(())
    });
    try_join_all(sessions).await?;
    Ok(())
}

async fn exec_slow_stdout_does_not_delay_stderr(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    // With a terminal's pace on one stream, the other must go on. containerd's
    // streaming server mixes both in one connection: its FIFOs are read directly.
    let fifos = t.new_folder("fifos")?;
    let script =
        "yes & n=0; while [ $n -lt 30 ]; do n=$((n+1)); echo n $n >&2; sleep 0.1; done; kill $!";
    let args = [
        "tasks",
        "exec",
        "--exec-id",
        "slow",
        "--fifo-dir",
        &fifos,
        container.id(),
    ];
    let args = [&args[..], &["sh", "-c", script]].concat();
    let mut ctr = t
        .containerd()
        .await
        .ctr_command(&args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdout = ctr.stdout.take().context("stdout")?;
    let mut lines = BufReader::new(ctr.stderr.take().context("stderr")?).lines();
    let slow = async {
        loop {
            let mut byte = [0];
            stdout.read_exact(&mut byte).await?;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        #[expect(unreachable_code, reason = "gives the block its type")]
        anyhow::Ok(())
    };
    let others = async {
        let mut longest = Duration::ZERO;
        for number in 1..=30 {
            let begin = Instant::now();
            // ctr 2.4 says some words of its own first.
            let line = loop {
                let line = tokio::time::timeout(WITHIN, lines.next_line()).await;
                let line = line.context("stderr hangs")??;
                if !line.as_ref().is_some_and(|line| line.starts_with("time=")) {
                    break line;
                }
            };
            same!(line, Some(format!("n {number}")));
            // The first waits for the exec itself.
            if number > 1 {
                longest = longest.max(begin.elapsed());
            }
            if number % 10 == 0 {
                let begin = Instant::now();
                container.exec(["true"]).await?.success()?;
                let took = begin.elapsed();
                ensure!(took < FAILS_WITHIN, "another exec took {took:?}");
            }
        }
        anyhow::Ok(longest)
    };
    let longest = tokio::select! {
        result = slow => { result?; Duration::MAX }
        longest = others => longest?,
    };
    ensure!(
        longest < Duration::from_secs(2),
        "stderr was silent for {longest:?}"
    );
    ctr.kill().await?;
    Ok(())
}

async fn exec_end_does_not_cut_the_last_bytes(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let container = with_probe(t, t.container(&pod, "main").idle())
        .await?
        .start()
        .await?;
    let expected: Vec<u8> = (b'a'..=b'w').cycle().take(1 << 20).collect();
    // kata#11747: a process that exits right after a large write.
    let script = format!("exec {PROBE} write 1048576 >&2");
    for round in 0..5 {
        let output = exec_with(
            t,
            &container,
            Options::default(),
            &[PROBE, "write", "1048576"],
            b"",
        )
        .await?;
        ensure!(
            output.stdout == expected,
            "round {round}: {} bytes of stdout",
            output.stdout.len()
        );
        let output = exec_with(
            t,
            &container,
            Options::default(),
            &["sh", "-c", &script],
            b"",
        )
        .await?;
        let told = [&expected[..], b"1048576\n"].concat();
        ensure!(
            output.stderr == told,
            "round {round}: {} bytes of stderr",
            output.stderr.len()
        );
    }
    Ok(())
}

async fn exec_much_both_ways_at_once_is_whole(t: &Context) -> Result<()> {
    let mib: u32 = if heavy() { 1024 } else { 64 };
    let (_pod, container) = t.idle().await?;
    let mut child = exec(t, &container, STDIN, &["cat"]).await?.spawn()?;
    let mut stdin = child.stdin.take().context("stdin")?;
    let mut stdout = child.stdout.take().context("stdout")?;
    let sending = tokio::spawn(async move {
        let mut sent = Sha256::new();
        for number in 0..mib {
            // No two of them are the same.
            let mut block = numbers(1 << 20);
            block
                .iter_mut()
                .for_each(|byte| *byte ^= number.to_le_bytes()[0]);
            block[..4].copy_from_slice(&number.to_le_bytes());
            stdin.write_all(&block).await?;
            sent.update(&block);
        }
        drop(stdin);
        anyhow::Ok(sent.finalize())
    });
    let mut came = Sha256::new();
    let mut count = 0;
    let mut buffer = vec![0; 1 << 16];
    loop {
        let read = tokio::time::timeout(WITHIN, stdout.read(&mut buffer)).await;
        match read.with_context(|| format!("nothing comes after {count} bytes"))?? {
            0 => break,
            size => {
                came.update(&buffer[..size]);
                count += size;
            }
        }
    }
    let sent = sending.await?.context("send")?;
    same!(count, usize::try_from(mib)? << 20, "bytes");
    ensure!(came.finalize() == sent, "the bytes differ");
    same!(done(child).await?.code, 0);
    Ok(())
}

/// kata#5249: what is idle for longer than the transport likes, after its first
/// bytes and before them.
async fn exec_idle_for_half_a_minute_goes_on(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    let mut session = Session::exec(&container, &["cat"], false).await?;
    session.send("before\n").await?;
    session.wrote("before\n").await?;
    let mut spdy = exec(t, &container, STDIN, &["cat"]).await?.spawn()?;
    let mut stdin = spdy.stdin.take().context("stdin")?;
    stdin.write_all(b"before\n").await?;
    // Connected, and no byte has gone either way.
    let script = "echo up >/tmp/up; exec cat";
    let mut silent = Session::exec(&container, &["sh", "-c", script], false).await?;
    let by = Instant::now() + WITHIN;
    while container.shell("cat /tmp/up").await?.text() != "up" {
        ensure!(Instant::now() < by, "the silent exec does not start");
    }
    tokio::time::sleep(Duration::from_secs(30)).await;
    session.send("after\n").await?;
    session.wrote("before\nafter\n").await?;
    session.close().await?;
    stdin.write_all(b"after\n").await?;
    drop(stdin);
    let done = done(spdy).await?;
    same!((done.code, &*done.text()), (0, "before\nafter\n"));
    silent.send("first\n").await?;
    silent.wrote("first\n").await?;
    silent.close().await?;
    same!(container.shell("echo new").await?.text(), "new");
    Ok(())
}

/// A connection that nobody used at once was the one that died in the seed.
async fn exec_first_bytes_after_a_pause_arrive(t: &Context) -> Result<()> {
    let (_pod, container) = t.idle().await?;
    for number in 0..10 {
        let mut session = Session::exec(&container, &["cat"], false).await?;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let line = format!("line {number}\n");
        // Once: what is lost is not made good.
        session.send(&line).await?;
        session.wrote(&line).await?;
        same!(String::from_utf8_lossy(&session.stdout), line);
        session.close().await?;
    }
    Ok(())
}

async fn exec_under_way_ends_with_its_removed_container(t: &Context) -> Result<()> {
    const EXECS: usize = 5;
    let pod = t.ready_pod().await?;
    let container = t.container(&pod, "main").idle().start().await?;
    let mut sessions = Vec::new();
    for _ in 0..EXECS {
        let mut session = Session::exec(&container, &["sh", "-c", "echo up; cat"], false).await?;
        session.wrote("up\n").await?;
        sessions.push(session);
    }
    // Others are being started, again and again, until there is no container.
    let starting = (0..EXECS).map(|_| async {
        while container.exec(["true"]).await.is_ok() {}
        anyhow::Ok(())
    });
    let begin = Instant::now();
    let ends = try_join_all(sessions.iter_mut().map(Session::ended));
    let (removed, started, ended) = tokio::join!(
        container.remove(),
        tokio::time::timeout(WITHIN, try_join_all(starting)),
        tokio::time::timeout(WITHIN, ends),
    );
    removed.context("remove a running container")?;
    started.context("an exec still starts")??;
    ended.context("an exec goes on")??;
    let took = begin.elapsed();
    ensure!(took < WITHIN, "all of it took {took:?}");
    ensure!(pod.is_ready().await?, "the pod ended with its container");
    // The pod goes on to serve others.
    let next = t.container(&pod, "main").attempt(1).idle().start().await?;
    next.exec(["true"]).await?.success()?;
    Ok(())
}
