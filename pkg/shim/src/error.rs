// SPDX-License-Identifier: Apache-2.0
//! What can go wrong between containerd and a shim.

use std::io;
use std::path::PathBuf;

use podhull_config::ConfigError;
use podhull_sandbox::SandboxError;
use podhull_telemetry::log::LogError;

/// The shim cannot do what containerd asks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShimError {
    /// The command line is not containerd's.
    #[error("{0}")]
    Argument(String),
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Logging cannot be set up.
    #[error(transparent)]
    Log(#[from] LogError),
    /// A file of the bundle, or of the shim, cannot be used.
    #[error("{what} {}", path.display())]
    File {
        /// What was being done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file of the bundle is garbled.
    #[error("{}: {key}: {message}", path.display())]
    Garbled {
        /// The file.
        path: PathBuf,
        /// Where in it: the path of the key.
        key: String,
        /// What is wrong, with line and column.
        message: String,
    },
    /// The kernel refused a step.
    #[error("{step}")]
    System {
        /// The step.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The serving process did not come up.
    #[error("the shim did not start: {0}")]
    NotServing(String),
    /// The pod's shim is gone.
    #[error("the shim of sandbox {sandbox} does not answer at {}", socket.display())]
    ShimGone {
        /// The sandbox.
        sandbox: String,
        /// Where it should answer.
        socket: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The pod's shim hangs in the kernel.
    #[error("the shim, process {0}, was killed and does not end")]
    Stays(i32),
    /// A metric could not be registered.
    #[error("metrics: {0}")]
    Metrics(String),
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

impl ShimError {
    pub(crate) fn file(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { what, path, source }
    }

    pub(crate) fn system<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System {
            step,
            source: source.into(),
        }
    }
}
