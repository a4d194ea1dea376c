// SPDX-License-Identifier: Apache-2.0
//! Streams over a UNIX socket, with ttrpc's client in containerd's place, and
//! the other ends of the FIFOs in the sandbox's.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use ttrpc::Code;
use ttrpc::proto::MessageHeader;

use super::bench::*;
use super::frames::WindowUpdate;
use super::*;

/// Bytes that tell where they are.
fn numbers(bytes: usize) -> Vec<u8> {
    let words = (0_u32..).flat_map(u32::to_le_bytes);
    words.take(bytes).collect()
}

#[tokio::test]
async fn output_is_whole_within_the_window_and_ends_behind_its_bytes() {
    let bench = bench();
    let mut client = bench.open("c1-stdout").await;
    let (_stdin, mut stdout) = bench.make();
    let all = numbers(300_000);
    let written = all.clone();
    let process = tokio::spawn(async move {
        stdout.write_all(&written).await.unwrap();
        // Here the process ends.
    });
    assert!(is_quiet(client.data()).await, "no window yet");
    client.grant(10_000).await;
    let mut read = client.read(10_000).await;
    assert!(is_quiet(client.data()).await, "more than the window");
    client.grant(400_000).await;
    read.extend(client.read(290_000).await);
    assert!(read == all, "other bytes, or another order");
    assert_eq!(within(client.data()).await, None);
    within(process).await.unwrap();
}

#[tokio::test]
async fn a_second_stream_goes_on_where_the_first_was() {
    let bench = bench();
    let mut first = bench.open("c1-stdout").await;
    let (_stdin, mut stdout) = bench.make();
    let all = numbers(40_000);
    stdout.write_all(&all).await.unwrap();
    first.grant(1_000).await;
    let mut read = first.read(1_000).await;
    // The first is there still, as if containerd had not quite ended.
    let mut second = bench.open("c1-stdout").await;
    assert!(within(first.stream.recv()).await.is_err(), "it goes on");
    second.grant(2_000).await;
    read.extend(second.read(2_000).await);
    // And for a while there is none.
    drop(second);
    let mut third = bench.open("c1-stdout").await;
    third.grant(100_000).await;
    read.extend(third.read(37_000).await);
    assert!(read == all);
    assert!(is_quiet(third.data()).await, "it has not ended");
    drop(stdout);
    assert_eq!(within(third.data()).await, None);
    // Whoever comes now hears of the end, too.
    drop(third);
    let mut fourth = bench.open("c1-stdout").await;
    fourth.grant(1).await;
    assert_eq!(within(fourth.data()).await, None);
}

#[tokio::test]
async fn a_stream_that_nobody_claims_goes_with_its_client() {
    let bench = bench();
    let client = bench.open("c1-stdout").await;
    assert_eq!(bench.streams.state().slots.len(), 1);
    drop(client);
    within(async {
        while !bench.streams.state().slots.is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_no_stream_is_refused() {
    let bench = bench();
    for (method, id, code) in [
        (frames::METHOD, "c1", Code::NOT_FOUND),
        (frames::METHOD, "c1-log", Code::NOT_FOUND),
        (frames::METHOD, "-stdout", Code::NOT_FOUND),
        (frames::METHOD, "../c1-stdout", Code::NOT_FOUND),
        ("Streams", "c1-stdout", Code::UNIMPLEMENTED),
    ] {
        match bench.request(method, id).await {
            Err(ttrpc::Error::RpcStatus(status)) => assert_eq!(status.code(), code, "{id}"),
            Err(error) => panic!("{id}: {error}"),
            Ok(_) => panic!("{id} was opened"),
        }
    }
    assert!(bench.streams.state().slots.is_empty());
}

#[tokio::test]
async fn stdin_is_whole_and_stays_within_its_window() {
    let bench = bench();
    let mut client = bench.open("c1-stdin").await;
    let (mut stdin, _stdout) = bench.make();
    let all = numbers(500_000);
    // Nobody reads yet: what the FIFO and one window hold is taken.
    let mut sent = 0;
    let mut room = client.window().await;
    let most = usize::try_from(bridge::WINDOW).unwrap();
    assert_eq!(room, most);
    while room > 0 {
        let count = room.min(10_000);
        client.write(&all[sent..sent + count]).await;
        sent += count;
        room -= count;
        if room == 0 {
            let more = Deadline::after(QUIET).run(client.window()).await;
            room = more.unwrap_or(0);
        }
    }
    assert!(sent <= 3 * most, "{sent} bytes were taken");
    let rest = all[sent..].to_vec();
    let writes = async {
        let mut rest = &rest[..];
        while !rest.is_empty() {
            let count = client.window().await.min(rest.len());
            client.write(&rest[..count]).await;
            rest = &rest[count..];
        }
    };
    let mut read = vec![0; all.len()];
    let (_, count) = within(async { tokio::join!(writes, stdin.read_exact(&mut read)) }).await;
    count.unwrap();
    assert!(read == all);
}

#[tokio::test]
async fn more_stdin_than_the_window_ends_the_stream() {
    let bench = bench();
    let mut client = bench.open("c1-stdin").await;
    let (_stdin, _stdout) = bench.make();
    let room = client.window().await;
    client.write(&numbers(room + 1)).await;
    assert!(within(client.stream.recv()).await.is_err());
}

#[tokio::test]
async fn stdin_ends_with_its_client_behind_its_bytes() {
    let bench = bench();
    let mut client = bench.open("c1-stdin").await;
    let (mut stdin, _stdout) = bench.make();
    client.window().await;
    let all = numbers(50_000);
    client.write(&all).await;
    client.stream.close_send().await.unwrap();
    let mut read = Vec::new();
    within(stdin.read_to_end(&mut read)).await.unwrap();
    assert!(read == all, "{} bytes", read.len());
}

#[tokio::test]
async fn stdin_goes_on_with_a_second_client() {
    let bench = bench();
    let mut first = bench.open("c1-stdin").await;
    let (mut stdin, _stdout) = bench.make();
    // As the sandbox does for a container, until CloseIO.
    let kept = pipe::OpenOptions::new().open_sender(bench.fifo("c1-stdin"));
    let kept = kept.unwrap();
    first.window().await;
    first.write(b"one").await;
    let mut read = [0; 3];
    within(stdin.read_exact(&mut read)).await.unwrap();
    drop(first);
    assert!(is_quiet(stdin.read_u8()).await, "it ended with its client");
    let mut second = bench.open("c1-stdin").await;
    second.window().await;
    second.write(b"two").await;
    within(stdin.read_exact(&mut read)).await.unwrap();
    assert_eq!(&read, b"two");
    drop((kept, second));
    assert!(within(stdin.read_u8()).await.is_err(), "no end");
}

#[tokio::test]
async fn a_client_of_stdin_hears_of_the_processs_end() {
    let bench = bench();
    let mut client = bench.open("c1-stdin").await;
    let (_stdin, _stdout) = bench.make();
    client.window().await;
    bench.streams.ended(&bench.process);
    let heard = within(client.stream.recv()).await;
    assert!(matches!(heard, Err(ttrpc::Error::Eof)), "{heard:?}");
}

#[tokio::test]
async fn a_refused_uri_is_named_and_leaves_nothing() {
    let bench = bench();
    let claim = |uris| bench.streams.claim(&bench.process, uris, false);
    for (field, uris) in [
        (
            "stdin",
            Uris {
                stdin: "file:///etc/passwd".into(),
                ..bench.uris()
            },
        ),
        (
            "stdout",
            Uris {
                stdout: "binary:///bin/sh".into(),
                ..bench.uris()
            },
        ),
        (
            "stderr",
            Uris {
                stderr: "ttrpc+unix:///run/other.sock?streaming_id=c1-stderr".into(),
                ..bench.uris()
            },
        ),
    ] {
        let error = claim(uris).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{field}: ")), "{error}");
    }
    assert!(!bench.run_dir.path().exists());
    // What was claimed is given back unless the process was made.
    let first = claim(bench.uris()).unwrap();
    let error = claim(bench.uris()).unwrap_err();
    let is_taken = matches!(error, ShimError::Sandbox(SandboxError::ProcessExists(_)));
    assert!(is_taken, "{error}");
    assert!(bench.fifo("c1-stderr").exists());
    drop(first);
    assert!(!bench.fifo("c1-stderr").exists());
    assert!(claim(bench.uris()).is_ok());
    bench.run_dir.remove().unwrap();
}

#[tokio::test]
async fn fifos_and_the_absent_need_no_streams() {
    let bench = bench();
    let uris = Uris {
        stdin: String::new(),
        stdout: "/run/out".into(),
        stderr: bench.uri("c1-stderr"),
    };
    let claim = bench.streams.claim(&bench.process, uris, true).unwrap();
    let stdio = claim.stdio();
    assert_eq!((stdio.stdin, stdio.stderr), (None, None), "a terminal's");
    assert_eq!(stdio.stdout, Some("/run/out".into()));
    claim.start();
    assert_eq!(bench.streams.uris(&bench.process), None);
    assert!(!bench.run_dir.path().exists());
    drop(bench.folder);
}

#[tokio::test]
async fn a_deletion_waits_for_readers_and_not_for_the_absent() {
    let bench = bench();
    let mut client = bench.open("c1-stdout").await;
    let (stdin, mut stdout) = bench.make();
    assert_eq!(bench.streams.uris(&bench.process), Some(bench.uris()));
    stdout.write_all(b"last words").await.unwrap();
    drop((stdin, stdout));
    let finish = |seconds| {
        let by = Deadline::after(Duration::from_secs(seconds));
        bench.streams.finish(&bench.process, by)
    };
    let mut finished = std::pin::pin!(finish(20));
    assert!(is_quiet(&mut finished).await, "it is not read yet");
    client.grant(100).await;
    assert_eq!(client.read(10).await, b"last words");
    assert_eq!(within(client.data()).await, None);
    assert!(is_quiet(&mut finished).await, "the client has not hung up");
    drop(client);
    within(finished).await;
    assert!(!bench.fifo("c1-stdout").exists() && bench.streams.state().slots.is_empty());
    // Nobody has a stream open for this one.
    let (stdin, mut stdout) = bench.make();
    stdout.write_all(b"unheard").await.unwrap();
    drop((stdin, stdout));
    within(finish(3600)).await;
}

#[tokio::test]
async fn a_state_waits_for_readers_and_not_for_long() {
    let bench = bench();
    let mut client = bench.open("c1-stdout").await;
    let (_stdin, mut stdout) = bench.make();
    stdout.write_all(b"last words").await.unwrap();
    drop(stdout);
    let mut read = std::pin::pin!(bench.streams.read(&bench.process));
    assert!(is_quiet(&mut read).await);
    // It is told whatever the reader does.
    within(read).await;
    client.grant(100).await;
    assert_eq!(client.read(10).await, b"last words");
    assert_eq!(within(client.data()).await, None);
    drop(client);
    let soon = Deadline::after(LAST_WORDS / 2);
    soon.run(bench.streams.read(&bench.process)).await.unwrap();
}

#[tokio::test]
async fn a_request_of_gos_client_opens_a_stream() {
    open_as_go(&bench(), "c1-stdin").await;
}

/// containerd may be killed, and what stands in the connection goes with it.
#[tokio::test]
async fn what_a_client_does_not_read_stays_in_the_fifo() {
    const FIFO: usize = 64 * 1024;
    let bench = bench();
    let mut connection = open_as_go(&bench, "c1-stdout").await;
    let (_stdin, mut stdout) = bench.make();
    let message = any(frames::WINDOW_UPDATE, &WindowUpdate { update: 1 << 20 });
    let message = ttrpc::proto::Codec::encode(&message).unwrap();
    let message = frame(MessageHeader::new_data(1, 0), 0, &message);
    connection.write_all(&message).await.unwrap();
    let mut taken = 0;
    let part = [0; 4096];
    while let Ok(count) = Deadline::after(QUIET).run(stdout.write(&part)).await {
        taken += count.unwrap();
    }
    assert!((FIFO..=2 * FIFO).contains(&taken), "{taken} bytes");
}

#[tokio::test]
async fn the_end_of_the_shim_ends_everything() {
    let bench = bench();
    let mut stdin = bench.open("c1-stdin").await;
    let mut parked = bench.open("c2-stdout").await;
    let (_stdin, _stdout) = bench.make();
    stdin.window().await;
    within(bench.streams.end(Deadline::after(WITHIN))).await;
    assert!(bench.streams.tasks.is_empty());
    assert!(within(stdin.stream.recv()).await.is_err());
    assert!(within(parked.stream.recv()).await.is_err());
    bench.run_dir.remove().unwrap();
}
