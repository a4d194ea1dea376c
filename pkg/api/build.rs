//! Generates the agent API from proto/ without needing protoc.
// SPDX-License-Identifier: Apache-2.0

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = std::path::Path::new(&std::env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    println!("cargo::rerun-if-changed={}", root.display());
    let files = protox::compile(["podhull/agent/v1/agent.proto"], [&root])?;
    tonic_prost_build::configure().compile_fds(files)?;
    Ok(())
}
