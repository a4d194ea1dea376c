// SPDX-License-Identifier: Apache-2.0
//! What can go wrong in the guest.

use std::io;
use std::path::PathBuf;

use podhull_transport::{SessionError, TransportError};
use podhull_types::{IdError, ProcessRef};

/// An operation of the agent failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// A system call on a file failed.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// What was being done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A field of a request cannot be used.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// Why.
        reason: String,
    },
    /// An identifier is malformed.
    #[error(transparent)]
    Id(#[from] IdError),
    /// There is no such process.
    #[error("process {0} not found")]
    NoProcess(ProcessRef),
    /// There is one already.
    #[error("process {0} already exists")]
    Exists(ProcessRef),
    /// The process is not in the state that the request needs.
    #[error("process {process} {state}")]
    WrongState {
        /// Which process.
        process: ProcessRef,
        /// What is the matter.
        state: &'static str,
    },
    /// The process could not be made or executed; runc's words.
    #[error("{0}")]
    Start(String),
    /// A helper did not answer in time.
    #[error("{0}: deadline passed")]
    Deadline(&'static str),
    /// A network setting failed.
    #[error("network: {what}: {source}")]
    Network {
        /// What was being done.
        what: String,
        /// What the kernel said.
        source: rtnetlink::Error,
    },
    /// A network setting cannot be used.
    #[error("network: {0}")]
    NetworkValue(String),
    /// A connection to the host.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A session.
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl GuestError {
    /// A start that failed in `step`, as runc tells it.
    pub(crate) fn in_runcs_words(self, step: &str) -> Self {
        match self {
            Self::Start(words) => Self::Start(format!(
                "OCI runtime {step}: unable to start container process: {words}"
            )),
            other => other,
        }
    }

    pub(crate) fn file(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { what, path, source }
    }

    pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System {
            what,
            source: source.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_failed_start_is_told_in_runcs_words() {
        let failed = |error: GuestError| error.in_runcs_words("create failed").to_string();
        assert_eq!(
            failed(GuestError::Start("exec: \"x\": not found".into())),
            "OCI runtime create failed: unable to start container process: exec: \"x\": not found"
        );
        assert_eq!(failed(GuestError::Deadline("x")), "x: deadline passed");
    }
}
