// SPDX-License-Identifier: Apache-2.0
//! Why a pod's network cannot be handed to a VM.

use std::error::Error;
use std::io;
use std::path::PathBuf;

/// A pod's network cannot be set up or released.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// The namespace cannot be entered.
    #[error("enter network namespace {}", path.display())]
    Namespace {
        /// Where it is.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a step.
    #[error("{step}")]
    Step {
        /// Which step.
        step: String,
        /// What the kernel said.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The CNI left nothing that could be handed over.
    #[error("network namespace {} has no interface with an address", .0.display())]
    NoInterface(PathBuf),
    /// The CNI left more, or something else, than the one device of a VM can be.
    #[error(
        "network namespace {} has addresses on {found}; a VM has one interface, which must be Ethernet",
        netns.display()
    )]
    Interfaces {
        /// Where it is.
        netns: PathBuf,
        /// The interfaces' names.
        found: String,
    },
    /// The deadline passed.
    #[error("network setup did not end in time")]
    Deadline,
    /// A thread of ours died.
    #[error("the network thread ended without an answer")]
    Lost,
}

impl NetworkError {
    pub(crate) fn step<E: Into<Box<dyn Error + Send + Sync>>>(
        step: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        let step = step.into();
        move |error| Self::Step {
            step,
            source: error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use podhull_types::chain;

    use super::*;

    #[test]
    fn a_step_keeps_what_the_kernel_said() {
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let error = NetworkError::step("make the tap")(denied);
        let source = error
            .source()
            .and_then(|source| source.downcast_ref::<io::Error>());
        assert_eq!(source.unwrap().kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(chain(&error), "make the tap: permission denied");
    }
}
