// SPDX-License-Identifier: Apache-2.0
//! What can go wrong with the agent, and the one mapping from its status codes.

use podhull_transport::TransportError;
use tonic::{Code, Status};

/// Why the agent said no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RpcKind {
    /// The request cannot be served as it is.
    Invalid,
    /// What the request names does not exist.
    NotFound,
    /// What the request would make exists already.
    AlreadyExists,
    /// Not possible in the present state.
    WrongState,
    /// Try again later.
    Unavailable,
    /// The agent's own deadline passed.
    DeadlineExceeded,
    /// The guest ran out of something.
    Exhausted,
    /// The agent does not know the call.
    Unimplemented,
    /// A process cannot be started; the words say why.
    Unknown,
    /// Anything else.
    Internal,
}

impl From<Code> for RpcKind {
    fn from(code: Code) -> Self {
        match code {
            Code::InvalidArgument | Code::OutOfRange => Self::Invalid,
            Code::NotFound => Self::NotFound,
            Code::AlreadyExists => Self::AlreadyExists,
            Code::FailedPrecondition => Self::WrongState,
            Code::Unavailable | Code::Cancelled | Code::Aborted => Self::Unavailable,
            Code::DeadlineExceeded => Self::DeadlineExceeded,
            Code::ResourceExhausted => Self::Exhausted,
            Code::Unimplemented => Self::Unimplemented,
            Code::Unknown => Self::Unknown,
            Code::Ok
            | Code::PermissionDenied
            | Code::Internal
            | Code::DataLoss
            | Code::Unauthenticated => Self::Internal,
        }
    }
}

/// A call to the agent, or the way to it, failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The channel is being closed.
    #[error("the channel to the agent is closing")]
    Closing,
    /// The VM, or the connection to it, is gone.
    #[error("the VM is gone ({method})")]
    VmGone {
        /// The call that found out.
        method: &'static str,
    },
    /// The agent answered with an error.
    #[error("{message}")]
    Rpc {
        /// The call.
        method: &'static str,
        /// What kind of error.
        kind: RpcKind,
        /// The agent's words.
        message: String,
    },
    /// The agent did not answer in time.
    #[error("the agent did not answer {method} in time")]
    Deadline {
        /// The call.
        method: &'static str,
    },
    /// gRPC could not be set up.
    #[error("set up the channel to the agent")]
    Setup(#[source] tonic::transport::Error),
    /// The agent never announced itself.
    #[error("the agent did not report ready")]
    NotReady(#[source] TransportError),
    /// The connection cannot be used.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

impl AgentError {
    /// A status that came back from `method`. A broken connection is told from
    /// an answer of the agent by its source: only the former has one.
    #[must_use]
    pub fn from_status(method: &'static str, status: &Status) -> Self {
        match std::error::Error::source(status).map(|source| source.downcast_ref()) {
            Some(Some(Self::Closing)) => return Self::Closing,
            Some(_) => return Self::VmGone { method },
            None => {}
        }
        Self::Rpc {
            method,
            kind: status.code().into(),
            message: words(status.message()),
        }
    }
}

/// Most bytes of a text of the guest's that are shown.
const WORDS: usize = 2048;

/// A text of the guest's, as it may get into logs and replies: the guest is not
/// to be trusted, so control characters are escaped and it is cut.
#[must_use]
pub fn words(text: &str) -> String {
    let mut clean = String::new();
    for char in text.chars() {
        let length = clean.len();
        if char.is_control() {
            clean.extend(char.escape_default());
        } else {
            clean.push(char);
        }
        if clean.len() > WORDS {
            clean.truncate(length);
            clean.push('…');
            break;
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_the_guest_are_cleaned_and_cut() {
        let status = Status::internal("exec: \x1b[2Jnope\r\n2026 level=info forged \u{9b}1m ü");
        let error = AgentError::from_status("Start", &status);
        assert_eq!(
            error.to_string(),
            r"exec: \u{1b}[2Jnope\r\n2026 level=info forged \u{9b}1m ü"
        );
        let long = words(&"ü".repeat(1 << 20));
        assert_eq!(long.len(), WORDS + '…'.len_utf8());
        assert!(words(&"\0".repeat(1 << 20)).len() <= WORDS + '…'.len_utf8());
    }
}
