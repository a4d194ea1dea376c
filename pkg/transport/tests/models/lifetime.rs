// SPDX-License-Identifier: Apache-2.0
//! Closing against duplicating against using, and leases against the VM's stop.

use std::future::poll_fn;
use std::task::Poll;

use loom::cell::UnsafeCell;
use loom::future::block_on;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use super::explore;
use crate::conn::{Conn, Direction};
use crate::lease::{Holder, HolderKind, LeaseSet};

/// Something that must not be used while, or after, it ends.
#[derive(Debug, Default)]
struct Life {
    cell: UnsafeCell<()>,
    ended: AtomicUsize,
}

impl Life {
    fn used(&self) {
        self.cell.with(|_| ());
        assert_eq!(self.ended.load(Ordering::Relaxed), 0, "used after its end");
    }

    fn end(&self) {
        self.cell.with_mut(|_| ());
        assert_eq!(self.ended.fetch_add(1, Ordering::Relaxed), 0, "ended twice");
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed) == 1
    }
}

/// A descriptor: its last owner closes it, and the VM must be there then.
#[derive(Debug)]
struct Fd {
    life: Arc<Life>,
    vm: Arc<Life>,
}

impl Drop for Fd {
    fn drop(&mut self) {
        self.vm.used();
        self.life.end();
    }
}

struct Scene {
    vm: Arc<Life>,
    leases: LeaseSet,
}

impl Scene {
    fn new() -> Self {
        Self {
            vm: Arc::default(),
            leases: LeaseSet::new("vm"),
        }
    }

    fn conn(&self) -> (Conn<Fd>, Arc<Life>) {
        let lease = self.leases.issue(holder()).unwrap();
        let life = Arc::new(Life::default());
        let fd = Fd {
            life: Arc::clone(&life),
            vm: Arc::clone(&self.vm),
        };
        (Conn::new(fd, lease), life)
    }

    /// As `Vm::stop` does.
    fn stop(&self) {
        self.leases.close();
        block_on(poll_fn(|cx| self.leases.poll_drained(cx)));
        self.vm.end();
    }
}

fn holder() -> Holder {
    Holder::new(HolderKind::Session, "model")
}

/// As `VsockTransport::close` does.
fn close(conn: Conn<Fd>) {
    conn.begin_close();
    block_on(poll_fn(|cx| conn.poll_unused(cx)));
}

/// Reads bytes that never come, until the transport is closed under it.
fn read_until_closed(conn: &Conn<Fd>) -> impl FnOnce() + use<> {
    let view = conn.view().unwrap();
    move || {
        block_on(poll_fn(|cx| match view.socket(Direction::Read, cx) {
            Ok(fd) => {
                fd.life.used();
                fd.vm.used();
                Poll::Pending
            }
            Err(_) => Poll::Ready(()),
        }));
    }
}

#[test]
fn l3_close_ends_a_blocked_reader_and_then_the_descriptor() {
    explore(4, || {
        let scene = Scene::new();
        let (conn, fd) = scene.conn();
        let reader = thread::spawn(read_until_closed(&conn));
        close(conn);
        assert!(fd.has_ended(), "closed once close has returned");
        assert!(scene.leases.held().is_empty());
        scene.stop();
        reader.join().unwrap();
    });
}

#[test]
fn l1_a_close_that_is_given_up_leaves_the_descriptor_to_its_user() {
    explore(4, || {
        let scene = Scene::new();
        let (conn, fd) = scene.conn();
        let reader = thread::spawn(read_until_closed(&conn));
        conn.begin_close();
        drop(conn);
        scene.stop();
        assert!(fd.has_ended(), "the VM waited for it");
        reader.join().unwrap();
    });
}

#[test]
fn l2_a_duplicate_is_used_while_its_original_closes() {
    explore(3, || {
        let scene = Scene::new();
        let (conn, fd) = scene.conn();
        // As `VsockTransport::try_dup`: a descriptor and a lease of its own.
        let copied = Arc::new(Life::default());
        let duplicate = Conn::new(
            Fd {
                life: Arc::clone(&copied),
                vm: Arc::clone(&scene.vm),
            },
            conn.lease().clone(),
        );
        let user = thread::spawn(move || {
            let view = duplicate.view().unwrap();
            block_on(poll_fn(|cx| {
                view.socket(Direction::Write, cx).unwrap().life.used();
                Poll::Ready(())
            }));
            drop(view);
            close(duplicate);
        });
        close(conn);
        assert!(fd.has_ended());
        scene.stop();
        assert!(copied.has_ended());
        user.join().unwrap();
    });
}

#[test]
fn l10_the_vm_stops_after_the_last_lease_and_refuses_new_ones() {
    explore(3, || {
        let scene = Scene::new();
        let held = scene.leases.issue(holder()).unwrap();
        let vm = Arc::clone(&scene.vm);
        let holding = thread::spawn(move || {
            let copy = held.clone();
            drop(held);
            vm.used();
            drop(copy);
        });
        let (leases, vm) = (scene.leases.clone(), Arc::clone(&scene.vm));
        let coming = thread::spawn(move || {
            if let Ok(lease) = leases.issue(holder()) {
                vm.used();
                drop(lease);
            }
        });
        scene.stop();
        assert!(scene.leases.issue(holder()).is_err());
        holding.join().unwrap();
        coming.join().unwrap();
    });
}
