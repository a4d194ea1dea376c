// SPDX-License-Identifier: Apache-2.0
//! What is taken out of a text before it is compared: what differs from one pod to
//! the next with the same runtime.

/// A rule that normalises texts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rule {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
    apply: fn(&str) -> String,
}

/// All of them, in the order in which they are applied.
pub(crate) const RULES: &[Rule] = &[
    Rule {
        name: "ids",
        what: "64 hexadecimal digits, as of a container or a pod, become `<id>`",
        apply: ids,
    },
    Rule {
        name: "addresses",
        what: "a pod's address, of the test's networks, becomes `<address>`",
        apply: addresses,
    },
];

/// `text` after all rules.
pub(super) fn apply(text: &str) -> String {
    RULES
        .iter()
        .fold(text.to_owned(), |text, rule| (rule.apply)(&text))
}

/// Replaces each run of characters that `is_part` accepts, if `is_whole` does, too.
fn replace(
    text: &str,
    is_part: impl Fn(char) -> bool,
    is_whole: impl Fn(&str) -> bool,
    by: &str,
) -> String {
    let mut result = String::new();
    let mut rest = text;
    while let Some(begin) = rest.find(&is_part) {
        let (before, from) = rest.split_at(begin);
        let end = from.find(|c| !is_part(c)).unwrap_or(from.len());
        let (run, after) = from.split_at(end);
        result += before;
        result += if is_whole(run) { by } else { run };
        rest = after;
    }
    result + rest
}

fn ids(text: &str) -> String {
    replace(
        text,
        |c| c.is_ascii_hexdigit(),
        |run| run.len() == 64,
        "<id>",
    )
}

fn addresses(text: &str) -> String {
    let is_part = |c: char| c.is_ascii_hexdigit() || c == '.' || c == ':';
    let is_whole = |run: &str| {
        let run = run.trim_end_matches(['.', ':']);
        (run.starts_with("10.88.") || run.starts_with("fd00:10:88:"))
            && run.parse::<std::net::IpAddr>().is_ok()
    };
    replace(text, is_part, is_whole, "<address>")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_pods_own_is_taken_out() {
        let id = "0123456789abcdef".repeat(4);
        let text = format!("/k8s/{id}: 10.88.0.17 fd00:10:88::2 10.0.0.1 ab12");
        assert_eq!(apply(&text), "/k8s/<id>: <address> <address> 10.0.0.1 ab12");
    }
}
