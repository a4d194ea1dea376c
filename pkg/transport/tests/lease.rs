// SPDX-License-Identifier: Apache-2.0
//! Row L10 of the lifetime contract: the VM outlives every lease.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::time::Duration;

use podhull_transport::{Closing, Holder, HolderKind, LeaseSet};
use podhull_types::Deadline;

fn session(name: &str) -> Holder {
    Holder::new(HolderKind::Session, name)
}

#[tokio::test(start_paused = true)]
async fn l10_drained_names_who_still_holds_on() {
    let set = LeaseSet::new("vm");
    let lease = set.issue(session("exec c/e")).unwrap();
    let held = set
        .drained(Deadline::after(Duration::from_secs(1)))
        .await
        .unwrap_err();
    assert_eq!(held.len(), 1);
    assert_eq!(held[0].holder, session("exec c/e"));
    drop(lease);
    assert!(
        set.drained(Deadline::after(Duration::from_secs(1)))
            .await
            .is_ok()
    );
}

#[tokio::test]
async fn l10_drained_returns_when_the_last_lease_goes() {
    let set = LeaseSet::new("vm");
    let (first, second) = (
        set.issue(session("a")).unwrap(),
        set.issue(session("b")).unwrap(),
    );
    let copy = first.clone();
    let drained = tokio::spawn({
        let set = set.clone();
        async move { set.drained(Deadline::after(Duration::from_secs(10))).await }
    });
    tokio::task::yield_now().await;
    drop(first);
    drop(second);
    assert!(!drained.is_finished());
    assert_eq!(set.held().len(), 1);
    drop(copy);
    assert_eq!(drained.await.unwrap(), Ok(()));
}

#[test]
fn l10_closed_set_refuses_new_leases() {
    let set = LeaseSet::new("vm x");
    let lease = set.issue(session("a")).unwrap();
    set.close();
    assert_eq!(
        set.issue(session("b")).map(drop),
        Err(Closing {
            owner: "vm x".into()
        })
    );
    drop(lease.clone());
    assert_eq!(set.held().len(), 1);
}
