// SPDX-License-Identifier: Apache-2.0
//! An added process is confined as its container's init is.

use anyhow::{Context as _, Result, ensure};
use podhull_testkit::cri::Container;
use podhull_testkit::cri::api::Int64Value;

use crate::case::{cases, same};
use crate::context::Context;

cases! {
    ALL_TWICE:
        exec_confinement_equals_that_of_init;
}

/// containerd's default without MKNOD and NET_RAW, with SYS_PTRACE.
const GIVEN: u64 = 0xa804_25fb & !(1 << 27) & !(1 << 13) | 1 << 19;
/// The container's own profile, which libseccomp loads as one filter.
const PROFILE: u64 = 1;
/// What podhull has below each profile: no sockets to the host, no io_uring.
const FLOOR: u64 = 2;

/// What the kernel says of a process's rights.
const FIELDS: &str = "^(Seccomp|Seccomp_filters|NoNewPrivs|Cap[A-Za-z]*|Uid|Gid|Groups):";

/// Rights and cgroups of init and of an added process.
async fn of_both(container: &Container) -> Result<[String; 4]> {
    let script = format!(
        "grep -E '{FIELDS}' /proc/1/status; echo; grep -E '{FIELDS}' /proc/$$/status; echo; \
         cat /proc/1/cgroup; echo; cat /proc/$$/cgroup"
    );
    let text = container.shell(&script).await?.success()?.text();
    let parts: Vec<_> = text.split("\n\n").map(str::to_owned).collect();
    let parts = <[String; 4]>::try_from(parts);
    parts.map_err(|parts| anyhow::anyhow!("not four parts but {parts:#?}"))
}

fn field<'a>(rights: &'a str, name: &str) -> Result<&'a str> {
    let mut lines = rights.lines();
    let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(line
        .with_context(|| format!("no {name} in {rights}"))?
        .trim())
}

/// Root's sets are what was given; another user's are empty but for the bounding
/// set, since nothing is ambient or inheritable.
fn as_given(rights: &str, user: i64, no_new_privs: bool, floor: u64) -> Result<()> {
    let own = if user == 0 { GIVEN } else { 0 };
    for (set, expected) in [
        ("CapEff", own),
        ("CapPrm", own),
        ("CapBnd", GIVEN),
        ("CapInh", 0),
        ("CapAmb", 0),
    ] {
        same!(field(rights, set)?, format!("{expected:016x}"), "{set}");
    }
    same!(field(rights, "Seccomp")?, "2", "Seccomp");
    let filters = PROFILE + floor;
    same!(
        field(rights, "Seccomp_filters")?,
        filters.to_string(),
        "filters"
    );
    let expected = u8::from(no_new_privs).to_string();
    same!(field(rights, "NoNewPrivs")?, expected, "NoNewPrivs");
    Ok(())
}

async fn exec_confinement_equals_that_of_init(t: &Context) -> Result<()> {
    let pod = t.ready_pod().await?;
    let floor = if t.is_podhull() { FLOOR } else { 0 };
    for (user, no_new_privs) in [(0, true), (0, false), (1000, true), (1000, false)] {
        let what = format!("user {user}, no_new_privs {no_new_privs}");
        let container = t
            .container(&pod, &format!("of-{user}-{no_new_privs}"))
            .idle()
            .security(|security| {
                security.run_as_user = Some(Int64Value { value: user });
                security.no_new_privs = no_new_privs;
                security.seccomp = Some(Default::default());
                let capabilities = security.capabilities.get_or_insert_default();
                capabilities.drop_capabilities = vec!["MKNOD".into(), "NET_RAW".into()];
                capabilities.add_capabilities = vec!["SYS_PTRACE".into()];
            })
            .start()
            .await
            .with_context(|| what.clone())?;
        let [init, exec, init_in, exec_in] = of_both(&container).await?;
        as_given(&init, user, no_new_privs, floor).with_context(|| format!("init: {what}"))?;
        same!(exec, init, "{what}");
        ensure!(!init_in.is_empty(), "{what}: no cgroups");
        same!(exec_in, init_in, "the cgroups: {what}");
    }
    Ok(())
}
