// SPDX-License-Identifier: Apache-2.0
//! A pod in a microVM, to watch.
use std::process::ExitCode;
use std::time::Instant;
use anyhow::Result;
use podhull_testkit::{Node, Release, namespaces};
fn main() -> ExitCode {
    if let Some(code) = namespaces::helper_stage() { return code; }
    if !namespaces::inside() { return namespaces::enter(&[]).unwrap(); }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let release = Release::named(&std::env::args().nth(1).unwrap()).unwrap();
    match runtime.block_on(run(release)) { Ok(()) => ExitCode::SUCCESS, Err(e) => { eprintln!("{e:?}"); ExitCode::FAILURE } }
}
async fn run(release: Release) -> Result<()> {
    let t = Instant::now();
    let node = Node::here()?;
    let c = node.start_containerd(release).await?;
    eprintln!("up {:?}", t.elapsed());
    for _ in 0..2 {
    let t = Instant::now();
    let pod = c.client().pod("web").handler(&std::env::args().nth(2).unwrap_or("runc".into())).run().await?;
    eprintln!("pod {:?} {:?}", t.elapsed(), pod.addresses().await?);
    let main = pod.container("main").shell("echo hi; echo err >&2; exec sleep 1000").start().await?;
    eprintln!("container {:?}", t.elapsed());
    eprintln!("{:?}", main.exec(["id"]).await?);
    eprintln!("{:?} {:?}", main.log()?, t.elapsed());
    eprintln!("{}", std::fs::read_to_string("/proc/self/mountinfo")?);
    if std::env::args().nth(3).is_some() { tokio::time::sleep(std::time::Duration::from_secs(1000)).await; }
    main.stop(0).await?;
    pod.stop().await?;
    pod.remove().await?;
    eprintln!("gone {:?}", t.elapsed());
    }
    Ok(())
}
