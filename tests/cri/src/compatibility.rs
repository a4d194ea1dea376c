// SPDX-License-Identifier: Apache-2.0
//! docs/compatibility.md, made from the cases.

use std::collections::BTreeMap;

use podhull_testkit::Release;

use crate::case::{Case, Setup};
use crate::cases;
use crate::compare::{DIFFERENCES, RULES};

const HEAD: &str = "\
# Compatibility with runc

Made from the cases of the CRI suite by `make compatibility`; [tests/README.md](../tests/README.md) says how to run
them. Each case that is not podhull's own runs with runc, too, on the same containerd: it expects what runc gives, and
whatever it sees is compared. Which field of a specification has which effect: [fields.md](fields.md).

";

/// The whole page.
pub(crate) fn page() -> String {
    let cases = cases::all();
    let mut text = HEAD.to_owned();
    text += "## Differences\n\n";
    if DIFFERENCES.is_empty() {
        text += "None that a case sees.\n";
    } else {
        text += "| case | what | why |\n|---|---|---|\n";
        for known in DIFFERENCES {
            text += &format!("| `{}` | {} | {} |\n", known.case, known.what, known.why);
        }
    }
    text += "\n## What is taken out before comparing\n\n| rule | what |\n|---|---|\n";
    for rule in RULES {
        text += &format!("| {} | {} |\n", rule.name, rule.what);
    }
    text += &format!("\n## Cases\n\n{} cases, ", cases.len());
    let beside = cases.iter().filter(|case| with_runc(case)).count();
    text += &format!("{beside} of them beside runc.\n");
    let mut areas: BTreeMap<&str, Vec<&Case>> = BTreeMap::new();
    for case in &cases {
        let area = case.name.split('_').next().unwrap_or_default();
        areas.entry(area).or_default().push(case);
    }
    for (area, cases) in areas {
        text += &format!(
            "\n### {area}\n\n| case | beside runc | 1.x | 2.x, pause | 2.x, shim as sandboxer |\n|---|---|---|---|---|\n"
        );
        for case in cases {
            let name = case.name.replacen('_', ": ", 1).replace('_', " ");
            text += &format!("| {name} | {} |\n", ticks(case));
        }
    }
    text
}

fn with_runc(case: &Case) -> bool {
    [Release::Debian16, Release::V2_4]
        .into_iter()
        .any(|release| {
            case.on.has(Setup {
                release,
                handler: "runc",
            })
        })
}

fn ticks(case: &Case) -> String {
    let on = |release, handler| case.on.has(Setup { release, handler });
    let ticks = [
        with_runc(case),
        on(Release::Debian16, "podhull"),
        on(Release::V2_4, "podhull"),
        on(Release::V2_4, "podhull-sandbox"),
    ];
    ticks.map(|is| if is { "yes" } else { "–" }).join(" | ")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use podhull_testkit::programs::workspace;

    use super::*;

    #[test]
    fn the_page_is_what_the_cases_say() {
        let page = fs::read_to_string(workspace().join("docs/compatibility.md")).unwrap();
        assert!(
            page == super::page(),
            "docs/compatibility.md is old: make compatibility"
        );
    }

    #[test]
    fn a_difference_is_of_a_case_that_is_compared() {
        for known in DIFFERENCES {
            let case = cases::all()
                .into_iter()
                .find(|case| case.name == known.case);
            assert!(case.is_some_and(|case| with_runc(&case)), "{}", known.case);
        }
    }
}
