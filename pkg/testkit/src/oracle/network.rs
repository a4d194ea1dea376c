// SPDX-License-Identifier: Apache-2.0
//! Links, queueing disciplines and netfilter rules of the node.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tokio::process::Command;

use super::{Kind, Snapshot};

pub(super) async fn look(snapshot: &mut Snapshot) -> Result<()> {
    let (links, qdiscs, rules) = tokio::try_join!(
        json("ip", &["-json", "link"]),
        json("tc", &["-json", "qdisc"]),
        json("nft", &["--json", "list", "ruleset"]),
    )?;
    for link in array(&links) {
        snapshot.add(Kind::Link, format!("link {}", text(link, "ifname")));
    }
    for qdisc in array(&qdiscs) {
        let fact = format!("qdisc {} on {}", text(qdisc, "kind"), text(qdisc, "dev"));
        snapshot.add(Kind::Link, fact);
    }
    for object in array(&rules["nftables"]) {
        let mut object = object.clone();
        if object.get("metainfo").is_some() {
            continue;
        }
        strip(&mut object);
        snapshot.add(Kind::Rule, object.to_string());
    }
    Ok(())
}

async fn json(program: &str, args: &[&str]) -> Result<Value> {
    let output = Command::new(program)
        .args(args)
        .output()
        .await
        .with_context(|| format!("run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    serde_json::from_slice(&output.stdout).with_context(|| format!("{program}'s output"))
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("?")
}

/// Drops what changes by itself: handles and counters.
fn strip(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for key in ["handle", "packets", "bytes"] {
                map.remove(key);
            }
            map.values_mut().for_each(strip);
        }
        Value::Array(items) => items.iter_mut().for_each(strip),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn counters_and_handles_are_no_part_of_a_rule() {
        let mut rule = json!({"rule": {"chain": "c", "handle": 7, "expr": [{"counter": {"packets": 1, "bytes": 2}}]}});
        strip(&mut rule);
        assert_eq!(
            rule,
            json!({"rule": {"chain": "c", "expr": [{"counter": {}}]}})
        );
    }
}
