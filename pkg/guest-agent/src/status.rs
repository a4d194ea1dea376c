// SPDX-License-Identifier: Apache-2.0
//! The one mapping from the agent's errors to gRPC's status codes.

use tonic::{Code, Status};

use crate::error::GuestError;

impl From<GuestError> for Status {
    fn from(error: GuestError) -> Self {
        let code = match &error {
            GuestError::Invalid { .. } | GuestError::Id(_) | GuestError::NetworkValue(_) => {
                Code::InvalidArgument
            }
            GuestError::NoProcess(_) => Code::NotFound,
            GuestError::Exists(_) => Code::AlreadyExists,
            GuestError::WrongState { .. } => Code::FailedPrecondition,
            // As containerd has it from runc.
            GuestError::Start(_) => Code::Unknown,
            GuestError::Deadline(_) => Code::DeadlineExceeded,
            GuestError::File { .. }
            | GuestError::System { .. }
            | GuestError::Network { .. }
            | GuestError::Transport(_)
            | GuestError::Session(_) => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_failed_start_are_kept() {
        let words = "exec: \"nope\": executable file not found in $PATH";
        let status = Status::from(GuestError::Start(words.into()));
        assert_eq!((status.code(), status.message()), (Code::Unknown, words));
    }
}
