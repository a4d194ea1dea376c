// SPDX-License-Identifier: Apache-2.0
//! What a case sees with podhull, beside what it sees with runc on the same
//! containerd.
//!
//! A case expects the same of both. What it says that it sees ([`see`]), and what
//! its scripts write (`text_of`), is compared besides: whatever is not the same, once the [`RULES`] have
//! taken out what cannot be, is a failure unless [`DIFFERENCES`] says why.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use podhull_testkit::programs::Programs;
use podhull_testkit::{Release, programs};
use sha2::{Digest, Sha256};

mod differences;
mod rules;

pub(crate) use differences::DIFFERENCES;
pub(crate) use rules::RULES;

/// What a case saw, by name.
pub(crate) type Seen = BTreeMap<String, String>;

tokio::task_local! {
    static SEEN: RefCell<Seen>;
}

/// Runs a case and gives what it saw beside its result.
pub(crate) async fn watch<T>(case: impl Future<Output = T>) -> (T, Seen) {
    SEEN.scope(RefCell::default(), async {
        let result = case.await;
        (result, SEEN.with(RefCell::take))
    })
    .await
}

/// Notes `value` under `what`. Names that repeat are numbered.
pub(crate) fn see(what: &str, value: &str) {
    let value = rules::apply(value);
    // No case runs otherwise, and nobody looks.
    let _ = SEEN.try_with(|seen| {
        let mut seen = seen.borrow_mut();
        let name = (1..)
            .map(|number| match number {
                1 => what.to_owned(),
                number => format!("{what} ({number})"),
            })
            .find(|name| !seen.contains_key(name));
        seen.extend(name.map(|name| (name, value)));
    });
}

/// How a case compares with what it saw with runc.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// In everything that it saw.
    Same,
    /// It says nothing of what it sees: what it expects holds with both.
    Asserted,
    /// But for what [`DIFFERENCES`] names.
    Differs,
}

/// Compares what `case` saw with both.
///
/// # Errors
/// Each difference that nothing explains, and each explanation of what is the same.
pub(crate) fn compare(case: &str, runc: &Seen, podhull: &Seen) -> Result<Verdict> {
    let explained: HashSet<_> = DIFFERENCES
        .iter()
        .filter(|known| known.case == case)
        .map(|known| known.what)
        .collect();
    let names: HashSet<_> = runc
        .keys()
        .chain(podhull.keys())
        .map(String::as_str)
        .collect();
    let differing: HashSet<_> = names
        .into_iter()
        .filter(|name| runc.get(*name) != podhull.get(*name))
        .collect();
    let mut lines: Vec<_> = differing
        .difference(&explained)
        .map(|name| format!("{name}: {}", against(runc.get(*name), podhull.get(*name))))
        .collect();
    let same = explained.difference(&differing);
    lines.extend(same.map(|name| format!("{name}: said to differ, and does not")));
    lines.sort();
    match lines[..] {
        [] if runc.is_empty() && podhull.is_empty() => Ok(Verdict::Asserted),
        [] if differing.is_empty() => Ok(Verdict::Same),
        [] => Ok(Verdict::Differs),
        _ => bail!("not as with runc: {}", lines.join("; ")),
    }
}

/// Names the lines that only one of both has.
fn against(runc: Option<&String>, podhull: Option<&String>) -> String {
    let lines = |of: Option<&String>| -> Vec<String> {
        let text = of.map_or("(nothing)", String::as_str);
        text.lines().map(str::to_owned).collect()
    };
    let (runc, podhull) = (lines(runc), lines(podhull));
    let only = |of: &[String], other: &[String]| -> Vec<String> {
        of.iter()
            .filter(|line| !other.contains(line))
            .cloned()
            .collect()
    };
    let (with_runc, with_podhull) = (only(&runc, &podhull), only(&podhull, &runc));
    if with_runc.is_empty() && with_podhull.is_empty() {
        return format!("in another order or number: with runc {runc:?}, with podhull {podhull:?}");
    }
    format!("only with runc {with_runc:?}, only with podhull {with_podhull:?}")
}

/// What cases saw with runc, kept in the cache for as long as it holds: for this
/// program, kernel, runc and containerd.
#[derive(Debug)]
pub(crate) struct Records {
    folder: PathBuf,
    key: String,
}

impl Records {
    /// The records of `release` on this machine.
    pub(crate) fn of(release: Release) -> Result<Self> {
        let program = fs::read("/proc/self/exe").context("read our own program")?;
        let runc = std::process::Command::new("runc").arg("--version").output();
        let runc = runc.context("ask runc for its version")?.stdout;
        let kernel = fs::read("/proc/sys/kernel/version").context("read the kernel's version")?;
        let containerd = release.program(&Programs::find(), "containerd");
        let containerd = std::process::Command::new(containerd)
            .arg("--version")
            .output();
        let containerd = containerd.context("ask containerd for its version")?.stdout;
        let mut hash = Sha256::new();
        for part in [&program, &runc, &kernel, &containerd] {
            hash.update(Sha256::digest(part));
        }
        Ok(Self {
            folder: programs::cache()
                .join("seen-with-runc")
                .join(release.name()),
            key: hash
                .finalize()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        })
    }

    fn file(&self, case: &str) -> PathBuf {
        self.folder.join(format!("{case}.json"))
    }

    /// What `case` saw, if that is known and still holds.
    pub(crate) fn get(&self, case: &str) -> Option<Seen> {
        let text = fs::read(self.file(case)).ok()?;
        let (key, seen) = serde_json::from_slice::<(String, Seen)>(&text).ok()?;
        (key == self.key).then_some(seen)
    }

    /// Keeps what `case` saw.
    pub(crate) fn put(&self, case: &str, seen: &Seen) -> Result<()> {
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("create {}", self.folder.display()))?;
        let file = self.file(case);
        let text = serde_json::to_vec(&(&self.key, seen)).context("encode what was seen")?;
        // Whole or not at all: two runs may share the cache.
        let whole = file.with_extension(format!("{}", std::process::id()));
        fs::write(&whole, text).with_context(|| format!("write {}", whole.display()))?;
        fs::rename(&whole, &file).with_context(|| format!("keep {}", file.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(pairs: &[(&str, &str)]) -> Seen {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        pairs.iter().map(owned).collect()
    }

    #[test]
    fn a_difference_needs_an_explanation() {
        let (one, other) = (
            seen(&[("code", "1"), ("text", "a")]),
            seen(&[("code", "2")]),
        );
        assert_eq!(compare("x", &one, &one).unwrap(), Verdict::Same);
        let nothing = Seen::new();
        assert_eq!(compare("x", &nothing, &nothing).unwrap(), Verdict::Asserted);
        let error = compare("x", &one, &other).unwrap_err().to_string();
        assert!(
            error.contains("code: only with runc [\"1\"], only with podhull [\"2\"]"),
            "{error}"
        );
        assert!(
            error.contains("text: only with runc [\"a\"], only with podhull [\"(nothing)\"]"),
            "{error}"
        );
    }

    #[test]
    fn an_explanation_needs_a_difference() {
        let Some(known) = DIFFERENCES.first() else {
            return;
        };
        let same = seen(&[(known.what, "1")]);
        let error = compare(known.case, &same, &same).unwrap_err().to_string();
        assert!(error.contains("said to differ"), "{error}");
    }

    #[tokio::test]
    async fn a_case_sees_in_order() {
        let ((), seen) = watch(async {
            see("text", "one");
            see("text", "two");
        })
        .await;
        assert_eq!(seen["text"], "one");
        assert_eq!(seen["text (2)"], "two");
    }
}
