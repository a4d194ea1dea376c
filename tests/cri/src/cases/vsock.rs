// SPDX-License-Identifier: Apache-2.0
//! What AF_VSOCK over the kernel's vhost-vsock answers, ends and loses: the
//! transports are built on it. Needs no pod; what needs no guest is in
//! pkg/transport/tests/vsock.rs.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::AsFd as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use podhull_testkit::context_id;
use vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use crate::case::{cases, contains, same};
use crate::context::Context;
use crate::procfs::signal;
use crate::vsock_guest::{
    ABSENT, CID, Guest, PORT, Parts, SILENT, answer, ask, begun, connect, error_of, still_waits,
};

cases! {
    PODHULL_ONCE:
        vsock_connect_fails_or_waits_until_a_guest_listens,
        vsock_guest_reaches_only_who_listens_on_the_host,
        vsock_context_id_in_use_or_reserved_ends_qemu,
        vsock_killed_vmm_resets_its_connections,
        vsock_rebooting_guest_resets_its_connections,
        vsock_stopped_vmm_fails_nothing_and_goes_on,
        vsock_end_in_the_guest_is_no_error,
        vsock_half_closed_connections_carry_the_other_direction,
        vsock_writes_of_any_size_arrive_whole;
}

/// What has no reason to wait. A wait of the kernel's is 2 s.
const AT_ONCE: Duration = Duration::from_millis(1500);
/// What ends with the VMM; the rest is for a slow machine.
const SOON: Duration = Duration::from_secs(5);
/// The receive buffer of a socket.
const BUFFER: usize = 256 << 10;

/// Runs `body`, which blocks, with a guest whose program listens.
async fn with_guest(
    t: &Context,
    body: impl FnOnce(&mut Guest) -> Result<()> + Send + 'static,
) -> Result<()> {
    with_parts(t, move |parts| body(&mut Guest::listening(parts)?)).await
}

async fn with_parts(
    t: &Context,
    body: impl FnOnce(&Parts) -> Result<()> + Send + 'static,
) -> Result<()> {
    let parts = Parts::make(t).await?;
    tokio::task::spawn_blocking(move || body(&parts)).await?
}

/// Fails unless `call` gives `error`, in a time out of `within`.
fn fails<T>(
    what: &str,
    error: Errno,
    within: std::ops::Range<Duration>,
    call: impl FnOnce() -> io::Result<T>,
) -> Result<()> {
    let begin = Instant::now();
    same!(error_of(call(), what)?, error, "{what}");
    let took = begin.elapsed();
    ensure!(within.contains(&took), "{what}: {error} after {took:?}");
    Ok(())
}

fn at_once() -> std::ops::Range<Duration> {
    Duration::ZERO..AT_ONCE
}

/// The kernel's limit.
fn two_seconds() -> std::ops::Range<Duration> {
    Duration::from_millis(1900)..Duration::from_secs(8)
}

async fn vsock_connect_fails_or_waits_until_a_guest_listens(t: &Context) -> Result<()> {
    with_parts(t, |parts| {
        let nobody = "connect to an absent guest";
        fails(nobody, Errno::ENODEV, at_once(), || connect(ABSENT, PORT))?;
        let reserved = context_id::reserve(CID).context("reserve the id")?;
        let early = "connect to an id without a guest";
        fails(early, Errno::ETIMEDOUT, two_seconds(), || {
            connect(CID, PORT)
        })?;
        drop(reserved);
        let late = "connect to an id that is free again";
        fails(late, Errno::ENODEV, at_once(), || connect(CID, PORT))?;

        let mut guest = Guest::start(parts, CID)?;
        let began = Instant::now();
        let mut waits = None;
        // ENODEV until QEMU has set the id. From then on a connection waits, until
        // the guest's driver is up and refuses what has no listener.
        loop {
            let begin = Instant::now();
            let error = error_of(connect(CID, SILENT), "connect to a booting guest")?;
            ensure!(
                began.elapsed() < Duration::from_secs(60),
                "still {error}: {}",
                guest.said()
            );
            match error {
                Errno::ENODEV if waits.is_none() => thread::sleep(Duration::from_millis(10)),
                Errno::ETIMEDOUT => drop(waits.get_or_insert(begin)),
                Errno::ECONNRESET => {
                    let waited = waits.unwrap_or(begin).elapsed();
                    let short = Duration::from_millis(100);
                    ensure!(waited > short, "refused after {waited:?}: no wait was seen");
                    break;
                }
                other => same!(other, Errno::ETIMEDOUT, "connect to a booting guest"),
            }
        }
        guest.listens()?;
        let silent = "connect to a guest's port without a listener";
        fails(silent, Errno::ECONNRESET, at_once(), || {
            connect(CID, SILENT)
        })
    })
    .await
}

async fn vsock_guest_reaches_only_who_listens_on_the_host(t: &Context) -> Result<()> {
    with_guest(t, |_| {
        let listener = VsockListener::bind(&VsockAddr::new(VMADDR_CID_ANY, u32::MAX))?;
        let port = listener.local_addr()?.port();
        same!(answer(&format!("dial 2 {port}"))?, "ok", "a listener");
        let (_, from) = listener.accept()?;
        same!(from.cid(), CID, "who has connected");
        for (cid, error) in [
            (2, "ECONNRESET"),
            (ABSENT, "ETIMEDOUT"),
            (1, "ETIMEDOUT"),
            (CID, "ENODEV"),
        ] {
            let got = answer(&format!("dial {cid} {SILENT}"))?;
            same!(got, error, "a guest's connect to id {cid}");
        }
        Ok(())
    })
    .await
}

async fn vsock_context_id_in_use_or_reserved_ends_qemu(t: &Context) -> Result<()> {
    with_parts(t, |parts| {
        let mut guest = Guest::start(parts, CID)?;
        let by = Instant::now() + Duration::from_secs(20);
        while context_id::reserve(CID).is_ok() {
            ensure!(Instant::now() < by, "QEMU takes no id: {}", guest.said());
            thread::sleep(Duration::from_millis(10));
        }
        for (cid, said) in [
            (CID, "Address already in use"),
            (2, "must be greater than 2"),
            (1, "must be greater than 2"),
            (0, "must be greater than 2"),
        ] {
            let mut second = Guest::start(parts, cid)?;
            same!(second.reap()?.code(), Some(1), "QEMU with id {cid}");
            contains!(second.said(), said);
        }
        guest.kill()?;
        guest.reap()?;
        drop(context_id::reserve(CID).context("an id is free when QEMU is reaped")?);
        Ok(())
    })
    .await
}

/// Reads to the error that must come, and gives what came before it.
fn read_to_error(stream: &mut VsockStream) -> Result<(usize, Errno)> {
    let (mut chunk, mut count) = (vec![0; 64 << 10], 0);
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => anyhow::bail!("an end without an error after {count} bytes"),
            Ok(read) => count += read,
            Err(error) => return Ok((count, error_of(Err::<(), _>(error), "read")?)),
        }
    }
}

/// Fills what the other side does not read.
fn fill(stream: &mut VsockStream) -> Result<()> {
    stream.set_write_timeout(Some(Duration::from_millis(300)))?;
    let chunk = [0; 16 << 10];
    loop {
        match stream.write(&chunk) {
            Ok(_) => {}
            full if still_waits(&full) => break,
            Err(error) => return Err(error).context("fill a connection"),
        }
    }
    stream.set_write_timeout(Some(Duration::from_secs(20)))?;
    Ok(())
}

/// Begins a call that must end with one of `errors`. What it gives waits for that.
fn waiting(
    what: &'static str,
    errors: &'static [Errno],
    call: impl FnOnce() -> io::Result<usize> + Send + 'static,
) -> impl FnOnce() -> Result<()> {
    let thread = thread::spawn(call);
    move || {
        let ended = thread.join().ok().context("a thread has panicked")?;
        let error = error_of(ended, what)?;
        ensure!(
            errors.contains(&error),
            "{what}: {error:?}, expected one of {errors:?}"
        );
        Ok(())
    }
}

async fn vsock_killed_vmm_resets_its_connections(t: &Context) -> Result<()> {
    with_guest(t, |guest| {
        let (mut reads, mut reads_on, mut writes) =
            (begun("hold")?, begun("hold")?, begun("hold")?);
        let (polled, polled_on) = (begun("hold")?, begun("hold")?);
        reads_on.shutdown(Shutdown::Write)?;
        polled_on.shutdown(Shutdown::Write)?;
        fill(&mut writes)?;
        let mut received = ask(&format!("send {BUFFER} 65536"))?;
        // Told over the same queue behind the bytes: they are here.
        same!(answer("count")?, BUFFER.to_string());

        let read = waiting("a blocked read", &[Errno::ECONNRESET], move || {
            reads.read(&mut [0])
        });
        let read_on = waiting("a read behind an end", &[Errno::ECONNRESET], move || {
            reads_on.read(&mut [0])
        });
        // The kernel tells both without the socket's lock: a writer meets the one or the other first.
        let told = &[Errno::EPIPE, Errno::ECONNRESET];
        let write = waiting("a blocked write", told, move || writes.write(&[0; 4096]));
        let killed = Instant::now();
        guest.kill()?;
        // No hang-up but where our own direction had ended, too.
        let reset = PollFlags::POLLIN | PollFlags::POLLERR;
        for (stream, seen) in [(&polled, reset), (&polled_on, reset | PollFlags::POLLHUP)] {
            let mut events = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
            same!(poll(&mut events, PollTimeout::from(10_000_u16))?, 1, "poll");
            same!(events[0].revents().context("events")?, seen, "polled");
        }
        read()?;
        read_on()?;
        write()?;
        let took = killed.elapsed();
        ensure!(took < SOON, "told only after {took:?}");
        guest.reap()?;
        same!(read_to_error(&mut received)?, (BUFFER, Errno::ECONNRESET));
        let gone = "connect to a killed guest";
        fails(gone, Errno::ENODEV, at_once(), || connect(CID, PORT))
    })
    .await
}

async fn vsock_rebooting_guest_resets_its_connections(t: &Context) -> Result<()> {
    with_guest(t, |guest| {
        let mut waits = begun("hold")?;
        let mut received = ask(&format!("send {BUFFER} 65536"))?;
        same!(answer("count")?, BUFFER.to_string());
        let wait = waiting("a blocked read", &[Errno::ECONNRESET], move || {
            waits.read(&mut [0])
        });
        let begin = Instant::now();
        let _asked = ask("reboot")?;
        wait()?;
        guest.reap()?;
        let took = begin.elapsed();
        ensure!(took < SOON, "gone only after {took:?}");
        same!(read_to_error(&mut received)?, (BUFFER, Errno::ECONNRESET));
        Ok(())
    })
    .await
}

async fn vsock_stopped_vmm_fails_nothing_and_goes_on(t: &Context) -> Result<()> {
    with_guest(t, |guest| {
        let mut echo = ask("echo")?;
        let mut back = [0; 4];
        echo.write_all(b"here")?;
        echo.read_exact(&mut back)?;
        signal(guest.pid(), Signal::SIGSTOP)?;
        echo.write_all(b"late")?;
        echo.set_read_timeout(Some(Duration::from_secs(1)))?;
        let read = echo.read(&mut back);
        ensure!(still_waits(&read), "a read from a stopped guest: {read:?}");
        let stopped = "connect to a stopped guest";
        fails(stopped, Errno::ETIMEDOUT, two_seconds(), || {
            connect(CID, PORT)
        })?;
        signal(guest.pid(), Signal::SIGCONT)?;
        echo.set_read_timeout(Some(Duration::from_secs(20)))?;
        echo.read_exact(&mut back).context("read after the stop")?;
        same!(&back, b"late");
        drop(connect(CID, PORT).context("connect after the stop")?);
        Ok(())
    })
    .await
}

async fn vsock_end_in_the_guest_is_no_error(t: &Context) -> Result<()> {
    with_guest(t, |_| {
        for what in ["leave", "die"] {
            let mut stream = begun(what)?;
            // With `leave`, unread when the guest ends: TCP would reset.
            let sent = stream.write_all(&[0; 1000]);
            if what == "leave" {
                sent.context("write to a guest that reads nothing")?;
            }
            same!(stream.read(&mut [0]).context(what)?, 0, "{what}: an end");
            fails(what, Errno::EPIPE, at_once(), || stream.write(&[0]))?;
        }
        Ok(())
    })
    .await
}

async fn vsock_half_closed_connections_carry_the_other_direction(t: &Context) -> Result<()> {
    const THERE: usize = 200_000;
    const BACK: usize = 300_000;
    with_guest(t, |_| {
        let mut ours = ask(&format!("turn {BACK}"))?;
        ours.write_all(&[0; THERE])?;
        ours.shutdown(Shutdown::Write)?;
        let mut got = Vec::new();
        ours.read_to_end(&mut got)
            .context("read behind our own end")?;
        same!(got.len(), BACK, "behind our own end");
        same!(answer("count")?, THERE.to_string(), "before our own end");

        let mut theirs = ask(&format!("half {THERE}"))?;
        got.clear();
        theirs.read_to_end(&mut got)?;
        same!(got.len(), THERE, "before the guest's end");
        theirs
            .write_all(&[0; BACK])
            .context("write behind the guest's end")?;
        theirs.shutdown(Shutdown::Write)?;
        same!(answer("count")?, BACK.to_string(), "behind the guest's end");

        let mut deaf = ask(&format!("deaf {THERE}"))?;
        got.resize(THERE, 0);
        deaf.read_exact(&mut got)
            .context("read from a guest that does not")?;
        let to_nobody = "write to a guest that has ended its reading";
        fails(to_nobody, Errno::EPIPE, at_once(), || deaf.write(&[0]))
    })
    .await
}

async fn vsock_writes_of_any_size_arrive_whole(t: &Context) -> Result<()> {
    /// Many times the buffers.
    const SIZE: usize = 4 << 20;
    with_guest(t, |_| {
        for chunk in [4 << 10, 64 << 10, 1 << 20] {
            let mut stream = ask(&format!("send {SIZE} {chunk}"))?;
            let mut got = vec![0; SIZE];
            stream
                .read_exact(&mut got)
                .with_context(|| format!("a guest's writes of {chunk}"))?;
            // Each of its writes begins its pattern anew.
            let wrong = got.chunks(chunk).position(|write| {
                let whole = |(at, byte): (usize, &u8)| usize::from(byte - b'a') == at % 23;
                !write.iter().enumerate().all(whole)
            });
            same!(wrong, None, "a guest's write of {chunk} that differs");
            same!(answer("count")?, SIZE.to_string());
        }
        for chunk in [4 << 10, 64 << 10, 256 << 10] {
            let mut stream = ask(&format!("sink {SIZE}"))?;
            for part in vec![0; SIZE].chunks(chunk) {
                stream
                    .write_all(part)
                    .with_context(|| format!("our writes of {chunk}"))?;
            }
            let mut said = String::new();
            stream.read_to_string(&mut said)?;
            same!(said, SIZE.to_string(), "our writes of {chunk}");
        }
        let mut echo = ask("echo")?;
        for round in 0..50_u8 {
            let mut back = [0; 64];
            echo.write_all(&[round; 64])?;
            echo.read_exact(&mut back)?;
            same!(back, [round; 64], "an echo");
        }
        echo.shutdown(Shutdown::Write)?;
        same!(echo.read(&mut [0])?, 0, "the echo's end");
        Ok(())
    })
    .await
}
