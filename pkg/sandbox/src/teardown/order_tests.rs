// SPDX-License-Identifier: Apache-2.0
//! The order of a teardown, of a sandbox that has all there is to release.

use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;

use podhull_api::agent::PingRequest;
use podhull_types::{ContainerId, ProcessRef, VsockPort};
use podhull_vmm::StopReport;

use super::*;
use crate::fixture::{self, Stop, apart, ip, name_netns, soon};
use crate::rundir::Record;
use crate::spec::Stdio;

const TAP: &str = "podhull0";

fn links(named: &str) -> bool {
    nix::net::if_::if_nametoindex(named).is_ok()
}

fn is_mounted(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let name = format!(" {} ", path.display());
    table.lines().any(|line| line.contains(&name))
}

/// A sandbox with a process, a listener for READY, a network, a tree and a
/// folder, made as a boot makes them; its agent says nothing. `guest` is the
/// agent's end of the channel, `ready` the listener's socket.
struct Whole {
    sandbox: Arc<Sandbox>,
    guest: UnixStream,
    run_dir: RunDir,
    netns: std::path::PathBuf,
    ready: std::path::PathBuf,
}

async fn whole(folder: &Path, stop: Stop) -> Whole {
    let (sandbox, guest) = fixture::sandbox(folder, stop).await;
    guest.set_nonblocking(true).unwrap();
    ip("link add eth0 type veth peer name host");
    ip("address add 10.9.0.2/24 dev eth0");
    let netns = folder.join("netns");
    name_netns(&netns);
    let vm = folder.join("vm");
    let ready = folder.join(format!("vm_{}", VsockPort::READY));

    let id = ProcessRef::init(ContainerId::new("c1").unwrap());
    let process = sandbox.enter(&id, 7, Stdio::default(), false).unwrap();
    process.started(|_| {});
    let listener = VsockListener::bind_hybrid(&vm, VsockPort::READY, sandbox.leases.clone());
    let mut slot = sandbox.parts.lock().await;
    let parts = slot.as_mut().unwrap();
    parts.ready = Some(listener.unwrap());
    parts.network = Some(PodNetwork::attach(&netns, soon()).await.unwrap());
    let run_dir = parts.run_dir.clone();
    let record = Record {
        namespace: "k8s.io".into(),
        id: "s1".into(),
        netns: Some(netns.clone()),
        cgroups_path: None,
    };
    run_dir.write_record(&record).unwrap();
    parts.tree = Some(Arc::new(SharedTree::create(&run_dir.share()).unwrap()));
    drop(slot);
    Whole {
        sandbox,
        guest,
        run_dir,
        netns,
        ready,
    }
}

/// Each step, and whether it was clean, forced or failed.
fn steps(report: &CloseReport) -> Vec<(&'static str, &'static str)> {
    let word = |outcome: &Outcome| match outcome {
        Outcome::Clean => "clean",
        Outcome::Forced(_) => "forced",
        Outcome::Failed(_) => "failed",
    };
    let steps = report.steps();
    steps.map(|(step, outcome)| (step, word(outcome))).collect()
}

/// Whether the agent's connection has ended; what it was asked is read over.
fn has_ended(mut guest: &UnixStream) -> bool {
    guest.read_to_end(&mut Vec::new()).is_ok()
}

/// The agent's end of its connection, once there is one.
type Agent = Arc<Mutex<Option<UnixStream>>>;
/// What a VM's stop finds: whether the agent's connection has ended, and
/// whether tap, tree and record are there.
type Found = Arc<Mutex<Option<(bool, [bool; 3])>>>;

/// A stop that notes what it finds at its first call and reports `problems`.
fn finding(folder: &Path, problems: &[&str]) -> (Stop, Agent, Found) {
    let run_dir = RunDir::of(folder, &fixture::spec().namespace, &fixture::spec().id);
    let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
    let (guest, found) = (Agent::default(), Found::default());
    let (end, note) = (Arc::clone(&guest), Arc::clone(&found));
    let look = move || {
        let ended = has_ended(end.lock().unwrap().as_ref().unwrap());
        let tree = is_mounted(&run_dir.share());
        let there = [links(TAP), tree, run_dir.read_record().is_some()];
        note.lock().unwrap().get_or_insert((ended, there));
        StopReport {
            problems: problems.clone(),
            ..StopReport::default()
        }
    };
    (Stop::Calls(Box::new(look)), guest, found)
}

#[test]
fn every_step_runs_in_order_whatever_the_earlier_ones_came_to() {
    apart(async |folder| {
        let (stop, guest, found) = finding(folder, &["planted"]);
        let run_dir = RunDir::of(folder, &fixture::spec().namespace, &fixture::spec().id);
        // Below the tree's mount: neither tree nor folder can be removed.
        fs::create_dir_all(run_dir.share().join("stranger")).unwrap();
        let whole = whole(folder, stop).await;
        let sandbox = &whole.sandbox;
        *guest.lock().unwrap() = Some(whole.guest);
        // Neither a forwarded connection nor a call ends by itself.
        let cut = sandbox.cut_forwards.clone();
        sandbox.forwards.spawn(cut.cancelled_owned());
        let client = sandbox.channel.read().await.as_ref().unwrap().client();
        let mut client = client.unwrap();
        let call = tokio::spawn(async move { client.ping(PingRequest::default()).await.is_err() });
        // The listener's socket cannot be removed, nor the namespace be entered.
        fs::remove_file(&whole.ready).unwrap();
        fs::create_dir(&whole.ready).unwrap();
        fs::remove_file(&whole.netns).unwrap();
        symlink("/proc/self/exe/none", &whole.netns).unwrap();

        let report = sandbox.stop(Deadline::after(Duration::from_secs(1))).await;
        assert_eq!(
            steps(&report),
            [
                ("processes", "forced"),
                ("sessions", "forced"),
                ("agent", "failed"),
                ("grpc", "forced"),
                ("transport", "clean"),
                ("listener", "failed"),
                ("vm", "forced"),
                ("network", "failed"),
                ("tree", "forced"),
                ("folder", "failed"),
            ],
            "{report}"
        );
        assert_eq!(*found.lock().unwrap(), Some((true, [true; 3])));
        assert!(call.await.unwrap(), "the call is answered");
        // What a step could release is released.
        assert!(!links(TAP));
        assert!(!is_mounted(&run_dir.share()));
        assert!(run_dir.read_record().is_none());
    });
}

/// What is asked of the guest is left out; the rest is as in a live one's.
#[test]
fn a_dead_sandbox_is_released_in_the_same_order() {
    apart(async |folder| {
        let (stop, guest, found) = finding(folder, &[]);
        let whole = whole(folder, stop).await;
        *guest.lock().unwrap() = Some(whole.guest);
        whole.sandbox.death.set("it is none".into()).unwrap();
        let report = whole.sandbox.stop(soon()).await;
        let clean = |step| (step, "clean");
        assert_eq!(
            steps(&report),
            [
                "sessions",
                "grpc",
                "transport",
                "listener",
                "vm",
                "network",
                "tree",
                "folder"
            ]
            .map(clean),
            "{report}"
        );
        assert_eq!(*found.lock().unwrap(), Some((true, [true; 3])));
        assert!(!links(TAP));
        assert!(!whole.ready.exists());
        let left = fs::read_dir(whole.run_dir.path()).unwrap().count();
        assert_eq!(left, 0, "files in the folder");
    });
}
