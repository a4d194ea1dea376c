// SPDX-License-Identifier: Apache-2.0
//! A small static program for what busybox has no applet for, compiled on the
//! spot and mounted into containers.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use podhull_testkit::cri::ContainerBuilder;
use tokio::process::Command;

use crate::case::Skip;
use crate::context::Context;

/// Where containers see the program.
pub(crate) const PROBE: &str = "/probe/probe";

const SOURCE: &str = include_str!("probe.c");

/// Adds the program to a container.
///
/// # Errors
/// [`Skip`] if there is no C compiler with a static C library.
pub(crate) async fn with_probe(
    t: &Context,
    container: ContainerBuilder,
) -> Result<ContainerBuilder> {
    let folder = t.node().folder().join("probe");
    let program = folder.join("probe");
    if !program.exists() {
        fs::create_dir_all(&folder).context("create the probe's folder")?;
        let source = folder.join("probe.c");
        fs::write(&source, SOURCE).context("write the probe's source")?;
        let output = Command::new("gcc")
            .args(["-static", "-O1", "-o"])
            .args([&program, &source])
            .output()
            .await
            .map_err(|error| Skip(format!("gcc does not run: {error}")))?;
        ensure!(
            output.status.success(),
            Skip(format!(
                "gcc -static: {}",
                String::from_utf8_lossy(&output.stderr)
            ))
        );
    }
    Ok(container.mount(&folder.to_string_lossy(), "/probe", true))
}
