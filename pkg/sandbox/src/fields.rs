// SPDX-License-Identifier: Apache-2.0
//! What becomes of each field that a request may have: nothing that somebody asks
//! for is passed over in silence.
//!
//! A field's name is its path in the request's JSON, as people write it; the
//! elements of a list share one name (`mounts[].source`). An entry stands for all
//! that is below it.

use std::collections::BTreeSet;
use std::fmt::Write;

use serde_json::Value;

use crate::error::SandboxError;

/// What becomes of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It has the effect that it has with runc.
    Honoured,
    /// A request that sets it fails, with this reason.
    Refused(&'static str),
    /// It is accepted and has no effect in a guest, for this reason.
    NoMeaning(&'static str),
}

/// A field's name and what becomes of it.
pub type Field = (&'static str, Verdict);

/// Reasons that hold for a field of either specification, OCI's and the CRI's.
pub mod reasons {
    /// Of another system's fields.
    pub const NOT_LINUX: &str = "a pod's guest runs Linux";
    /// Of labels and profiles.
    pub const LSM: &str = "a guest's kernel has no such security module; the VM is the boundary";
    /// Of a limit of them.
    pub const HUGE_PAGES: &str = "a guest's memory has no huge pages of its own";
    /// Of what such a limit is for.
    pub const PAGE_SIZE: &str = "it names the page of the limit";
    /// Of a limit of it.
    pub const SWAP: &str = "a guest has no swap";
}

/// How much of a refused value is quoted.
const QUOTED: usize = 80;

/// Refuses `request` if it sets a field that `fields` refuses. `below` is the name
/// that the request itself has in `fields`, empty for the whole.
///
/// A field that is null, false, zero or empty, or holds nothing but such, asks for
/// nothing.
///
/// # Errors
/// The first such field by its place in the request, with the reason and its value.
pub fn check(request: &Value, below: &str, fields: &[Field]) -> Result<(), SandboxError> {
    walk(
        request,
        &mut below.to_owned(),
        &mut below.to_owned(),
        fields,
    )
}

/// `name` is the field's in the table, `place` with the indexes of lists.
fn walk(
    value: &Value,
    name: &mut String,
    place: &mut String,
    fields: &[Field],
) -> Result<(), SandboxError> {
    if asks_nothing(value) {
        return Ok(());
    }
    match verdict(name, fields) {
        Some(Verdict::Refused(reason)) => {
            return Err(SandboxError::refused(
                place.as_str(),
                format!("{reason} (it is {})", quoted(value)),
            ));
        }
        Some(Verdict::Honoured | Verdict::NoMeaning(_)) => return Ok(()),
        None => {}
    }
    let (name_end, place_end) = (name.len(), place.len());
    let mut below = |step: &str, index: &str, value: &Value| {
        name.push_str(step);
        place.push_str(index);
        let checked = walk(value, name, place, fields);
        name.truncate(name_end);
        place.truncate(place_end);
        checked
    };
    match value {
        Value::Object(members) => {
            let dot = if place_end == 0 { "" } else { "." };
            for (key, value) in members {
                let step = format!("{dot}{key}");
                below(&step, &step, value)?;
            }
        }
        Value::Array(elements) => {
            for (index, value) in elements.iter().enumerate() {
                below("[]", &format!("[{index}]"), value)?;
            }
        }
        // Not in the table: a field that this version does not know.
        _ => tracing::warn!(field = %place, "unknown field, passed over"),
    }
    Ok(())
}

fn verdict(name: &str, fields: &[Field]) -> Option<Verdict> {
    let found = fields.iter().find(|(known, _)| *known == name);
    found.map(|(_, verdict)| *verdict)
}

fn asks_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(set) => !set,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(elements) => elements.iter().all(asks_nothing),
        Value::Object(members) => members.values().all(asks_nothing),
    }
}

fn quoted(value: &Value) -> String {
    let whole = value.to_string();
    let mut text: String = whole.chars().take(QUOTED).collect();
    if text.len() < whole.len() {
        let _ = write!(text, "…");
    }
    text
}

/// `fields` as a table in Markdown.
#[must_use]
pub fn table(fields: &[Field]) -> String {
    let mut text = "| field | in a guest |\n|---|---|\n".to_owned();
    for (name, verdict) in fields {
        let _ = match verdict {
            Verdict::Honoured => writeln!(text, "| `{name}` | honoured |"),
            Verdict::Refused(reason) => writeln!(text, "| `{name}` | refused: {reason} |"),
            Verdict::NoMeaning(reason) => writeln!(text, "| `{name}` | no effect: {reason} |"),
        };
    }
    text
}

/// Where `fields` and the members of `structures` (a structure's name and its
/// members' names) do not fit: members without an entry, and entries for what is no
/// member. Nothing if the table is whole. For tests of tables.
#[must_use]
pub fn differences(structures: &[(&str, &[&str])], fields: &[Field]) -> Vec<String> {
    let has_members = |name: &str| {
        let of = |structure: &str| structure.strip_suffix("[]").unwrap_or(structure) == name;
        structures.iter().any(|(structure, _)| of(structure))
    };
    let mut members = BTreeSet::new();
    for (structure, names) in structures {
        let dot = if structure.is_empty() { "" } else { "." };
        let names = names.iter().map(|name| format!("{structure}{dot}{name}"));
        members.extend(names.filter(|name| !has_members(name)));
    }
    let entries: BTreeSet<_> = fields.iter().map(|(name, _)| (*name).to_owned()).collect();
    let mut differences: Vec<_> = members
        .symmetric_difference(&entries)
        .map(|name| match members.contains(name) {
            true => format!("{name} has no entry"),
            false => format!("{name} is no field"),
        })
        .collect();
    if entries.len() < fields.len() {
        differences.push("a field has two entries".into());
    }
    differences
}
