// SPDX-License-Identifier: Apache-2.0
//! The one place where errors become the status that containerd sees.

use podhull_sandbox::{ErrorKind, SandboxError};
use podhull_types::{IdError, chain};
use ttrpc::Code;

use crate::error::ShimError;
use crate::streaming::StreamError;

/// Codes as containerd's `errdefs` reads them.
fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::Invalid => Code::INVALID_ARGUMENT,
        ErrorKind::NotFound => Code::NOT_FOUND,
        ErrorKind::AlreadyExists => Code::ALREADY_EXISTS,
        ErrorKind::WrongState => Code::FAILED_PRECONDITION,
        ErrorKind::Unavailable => Code::UNAVAILABLE,
        ErrorKind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
        ErrorKind::Exhausted => Code::RESOURCE_EXHAUSTED,
        ErrorKind::Unimplemented => Code::UNIMPLEMENTED,
        ErrorKind::Unknown => Code::UNKNOWN,
        ErrorKind::Internal => Code::INTERNAL,
    }
}

fn kind(error: &ShimError) -> ErrorKind {
    match error {
        ShimError::Sandbox(error) => error.kind(),
        ShimError::Argument(_) | ShimError::Garbled { .. } => ErrorKind::Invalid,
        ShimError::Config(_)
        | ShimError::Log(_)
        | ShimError::File { .. }
        | ShimError::System { .. }
        | ShimError::NotServing(_)
        | ShimError::Stays(_)
        | ShimError::Metrics(_) => ErrorKind::Internal,
        ShimError::ShimGone { .. } => ErrorKind::Unavailable,
    }
}

impl From<ShimError> for ttrpc::Error {
    fn from(error: ShimError) -> Self {
        let text = chain(&error);
        tracing::debug!(error = text, "request failed");
        Self::RpcStatus(ttrpc::get_status(code(kind(&error)), text))
    }
}

/// A request's result with the status for its error.
pub(crate) fn reply<T>(result: Result<T, impl Into<ShimError>>) -> ttrpc::Result<T> {
    result.map_err(|error| error.into().into())
}

impl From<IdError> for ShimError {
    fn from(error: IdError) -> Self {
        Self::Sandbox(SandboxError::Id(error))
    }
}

/// The answer to a stream that is not opened.
pub(crate) fn stream_status(error: &StreamError) -> ttrpc::proto::Status {
    let code = match error {
        StreamError::Id(_) => Code::NOT_FOUND,
        StreamError::Method(_) => Code::UNIMPLEMENTED,
        StreamError::Fifo(_) => Code::INTERNAL,
        StreamError::Gone
        | StreamError::Unexpected(_)
        | StreamError::Window(_)
        | StreamError::Overrun(_)
        | StreamError::Garbled(_)
        | StreamError::Frame(_)
        | StreamError::Ttrpc(_) => Code::INVALID_ARGUMENT,
    };
    ttrpc::get_status(code, chain(error))
}

/// The answer to what podhull does not offer.
pub(crate) fn unimplemented<T>(method: &str) -> ttrpc::Result<T> {
    let text = format!("{method} is not offered by podhull");
    let status = ttrpc::get_status(Code::UNIMPLEMENTED, text);
    Err(ttrpc::Error::RpcStatus(status))
}

#[cfg(test)]
mod tests {
    use podhull_types::{ContainerId, ProcessRef, SandboxId};

    use super::*;

    fn code_of(error: SandboxError) -> Code {
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(ShimError::from(error)) else {
            return Code::OK;
        };
        status.code()
    }

    #[test]
    fn kinds_become_codes() {
        let process = ProcessRef::init(ContainerId::new("c").unwrap());
        let sandbox = SandboxId::new("s").unwrap();
        for (error, expected) in [
            (
                SandboxError::refused("hostPID", "no"),
                Code::INVALID_ARGUMENT,
            ),
            (SandboxError::NoProcess(process.clone()), Code::NOT_FOUND),
            (SandboxError::Finished(process.clone()), Code::NOT_FOUND),
            (
                SandboxError::ProcessExists(process.clone()),
                Code::ALREADY_EXISTS,
            ),
            (SandboxError::Stopping(sandbox.clone()), Code::UNAVAILABLE),
            (SandboxError::Suspect(sandbox), Code::UNAVAILABLE),
            (
                SandboxError::WrongState {
                    process,
                    state: "running",
                    expected: "stopped",
                },
                Code::FAILED_PRECONDITION,
            ),
        ] {
            assert_eq!(code_of(error), expected);
        }
    }

    #[test]
    fn a_status_has_all_causes() {
        let source = std::io::Error::from_raw_os_error(2);
        let error = ShimError::file("read", "/bundle/config.json")(source);
        let text = chain(&error);
        assert!(
            text.contains("/bundle/config.json") && text.contains("No such file"),
            "{text}"
        );
    }
}
