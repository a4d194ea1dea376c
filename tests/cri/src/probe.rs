// SPDX-License-Identifier: Apache-2.0
//! A small static program for what busybox has no applet for, compiled on the
//! spot and mounted into containers.

use std::fs;
use std::path::{Path, PathBuf};

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
    compiled(&folder, "probe", SOURCE).await?;
    Ok(container.mount(&folder.to_string_lossy(), "/probe", true))
}

/// The static program `name` in `folder`, compiled from C on the first call.
///
/// # Errors
/// [`Skip`] if there is no C compiler with a static C library.
pub(crate) async fn compiled(folder: &Path, name: &str, source: &str) -> Result<PathBuf> {
    let program = folder.join(name);
    if program.exists() {
        return Ok(program);
    }
    fs::create_dir_all(folder).context("create a program's folder")?;
    let file = folder.join(format!("{name}.c"));
    fs::write(&file, source).context("write a program's source")?;
    let output = Command::new("gcc")
        .args(["-static", "-O1", "-o"])
        .args([&program, &file])
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
    Ok(program)
}
