// SPDX-License-Identifier: Apache-2.0
//! containerd's shim for pods in microVMs: parses what it is asked, and does it.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use podhull_shim::bootstrap::{self, Caller};
use podhull_shim::{Action, Args, delete, info, server};

fn main() -> ExitCode {
    // A child of a VM confines itself before anything else happens.
    if let Some(code) = podhull_vmm::helper_main(std::env::args().skip(1)) {
        return code;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let written = writeln!(std::io::stderr(), "podhull: {error:#}");
            debug_assert!(written.is_ok());
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let args = Args::parse(std::env::args().skip(1))?;
    match args.action {
        Action::Version => answer(version().as_bytes()),
        Action::Info => answer(&info::info()?),
        Action::Start => {
            let name = std::env::args_os().next().unwrap_or_default();
            answer(bootstrap::start(&args, &caller()?, &name)?.as_bytes())
        }
        Action::Delete => {
            let bundle = match &args.bundle {
                Some(bundle) => bundle.clone(),
                None => folder()?,
            };
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("start the runtime")?;
            answer(&runtime.block_on(delete::delete(&args, &bundle))?)
        }
        Action::Serve => Ok(server::serve(&args)?),
    }
}

fn caller() -> anyhow::Result<Caller> {
    let mut stdin = Vec::new();
    std::io::stdin()
        .read_to_end(&mut stdin)
        .context("read standard input")?;
    Ok(Caller {
        bundle: folder()?,
        stdin,
        ttrpc_address: std::env::var("TTRPC_ADDRESS").unwrap_or_default(),
    })
}

fn folder() -> anyhow::Result<PathBuf> {
    std::env::current_dir().context("find the bundle")
}

fn version() -> String {
    format!(
        "{}:\n  Version:  {}\n  Runtime:  {}\n",
        env!("CARGO_PKG_NAME"),
        env!("CARGO_PKG_VERSION"),
        info::RUNTIME
    )
}

fn answer(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .context("answer containerd")
}
