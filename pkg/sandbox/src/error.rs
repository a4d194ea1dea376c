// SPDX-License-Identifier: Apache-2.0
//! What can go wrong with a sandbox, and of which kind it is.

use std::io;
use std::path::PathBuf;

use podhull_agent_client::{AgentError, RpcKind};
use podhull_network::NetworkError;
use podhull_storage::StorageError;
use podhull_transport::{SessionError, TransportError};
use podhull_types::{ContainerId, IdError, ProcessRef, SandboxId};
use podhull_vmm::VmmError;

/// The kind of an error, which decides the status code that containerd sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request cannot be served as it is.
    Invalid,
    /// What it names does not exist.
    NotFound,
    /// What it would make exists already.
    AlreadyExists,
    /// Not possible in the present state.
    WrongState,
    /// Try again later.
    Unavailable,
    /// A deadline passed.
    DeadlineExceeded,
    /// Something ran out.
    Exhausted,
    /// podhull does not offer it.
    Unimplemented,
    /// A process cannot be started: containerd knows no kind for it.
    Unknown,
    /// Anything else.
    Internal,
}

/// An operation on a sandbox failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// A field of the request asks for what podhull cannot do.
    #[error("{field}: {reason}")]
    Refused {
        /// The field's name.
        field: String,
        /// Why, and what to do instead.
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
    ProcessExists(ProcessRef),
    /// The process has ended.
    #[error("process {0} already finished")]
    Finished(ProcessRef),
    /// The process is not in the state that the request needs.
    #[error("process {process} is {state}, expected {expected}")]
    WrongState {
        /// Which process.
        process: ProcessRef,
        /// Its state.
        state: &'static str,
        /// The states that would do.
        expected: &'static str,
    },
    /// The sandbox is being stopped.
    #[error("sandbox {0} is stopping")]
    Stopping(SandboxId),
    /// The guest missed its heartbeat; it may come back.
    #[error("sandbox {0} does not answer its heartbeat")]
    Suspect(SandboxId),
    /// The VM ended before, or while, the request was served.
    #[error("the VM of sandbox {id} ended: {reason}")]
    VmDied {
        /// Which sandbox.
        id: SandboxId,
        /// Why, with the guest's last words.
        reason: String,
    },
    /// The guest did not come up.
    #[error("the guest did not come up; last console lines: {console}")]
    NotReady {
        /// What was seen.
        #[source]
        source: AgentError,
        /// The end of the guest's console.
        console: String,
    },
    /// A container's FIFO cannot be opened.
    #[error("open {stream} FIFO {}", path.display())]
    Fifo {
        /// Which stream.
        stream: &'static str,
        /// The FIFO.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file or folder of the sandbox cannot be made or removed.
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
    /// What a shim left cannot be removed.
    #[error("left: {}", .0.join("; "))]
    Left(Vec<String>),
    /// What a container is to have cannot be mounted, or looked at, in time.
    #[error("container {0}: its mounts take too long; the server of a volume may be away")]
    Blocked(ContainerId),
    /// A spec could not be encoded for the guest.
    #[error("encode {what} of container {container}")]
    Encode {
        /// What.
        what: &'static str,
        /// Whose.
        container: ContainerId,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The shared tree.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A connection to the guest.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A session.
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl SandboxError {
    /// A refusal of `field`.
    pub fn refused(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Refused {
            field: field.into(),
            reason: reason.into(),
        }
    }

    /// Of which kind it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused { .. } | Self::Id(_) => ErrorKind::Invalid,
            Self::NoProcess(_) | Self::Finished(_) => ErrorKind::NotFound,
            Self::ProcessExists(_) => ErrorKind::AlreadyExists,
            Self::WrongState { .. } => ErrorKind::WrongState,
            Self::Stopping(_) | Self::Suspect(_) | Self::VmDied { .. } => ErrorKind::Unavailable,
            Self::NotReady { .. } | Self::Blocked(_) => ErrorKind::DeadlineExceeded,
            Self::Vmm(VmmError::NoMemory { .. }) => ErrorKind::Exhausted,
            Self::Network(NetworkError::NoInterface(_) | NetworkError::Interfaces { .. }) => {
                ErrorKind::Invalid
            }
            Self::Storage(error) if error.is_of_the_request() => ErrorKind::Invalid,
            Self::Agent(error) => agent_kind(error),
            Self::Transport(TransportError::Closing(_)) => ErrorKind::Unavailable,
            Self::Transport(TransportError::Deadline { .. }) => ErrorKind::DeadlineExceeded,
            Self::Fifo { .. }
            | Self::File { .. }
            | Self::Left(_)
            | Self::Encode { .. }
            | Self::Storage(_)
            | Self::Vmm(_)
            | Self::Network(_)
            | Self::Transport(_)
            | Self::Session(_) => ErrorKind::Internal,
        }
    }
}

fn agent_kind(error: &AgentError) -> ErrorKind {
    match error {
        AgentError::Rpc { kind, .. } => match kind {
            RpcKind::Invalid => ErrorKind::Invalid,
            RpcKind::NotFound => ErrorKind::NotFound,
            RpcKind::AlreadyExists => ErrorKind::AlreadyExists,
            RpcKind::WrongState => ErrorKind::WrongState,
            RpcKind::Unavailable => ErrorKind::Unavailable,
            RpcKind::DeadlineExceeded => ErrorKind::DeadlineExceeded,
            RpcKind::Exhausted => ErrorKind::Exhausted,
            RpcKind::Unimplemented => ErrorKind::Unimplemented,
            RpcKind::Unknown => ErrorKind::Unknown,
            RpcKind::Internal => ErrorKind::Internal,
        },
        AgentError::Closing | AgentError::VmGone { .. } => ErrorKind::Unavailable,
        AgentError::Deadline { .. } | AgentError::NotReady(_) => ErrorKind::DeadlineExceeded,
        _ => ErrorKind::Internal,
    }
}

#[cfg(test)]
mod tests {
    use podhull_types::chain;

    use super::*;

    #[test]
    fn a_guest_that_did_not_come_up_tells_the_reason_once() {
        let error = SandboxError::NotReady {
            source: AgentError::Closing,
            console: "no init".into(),
        };
        let text = chain(&error);
        assert_eq!(text.matches("is closing").count(), 1, "{text}");
        assert!(text.contains("no init"), "{text}");
    }

    #[test]
    fn a_process_that_cannot_be_started_keeps_its_kind() {
        let error = AgentError::Rpc {
            method: "Start",
            kind: RpcKind::Unknown,
            message: "exec: not found".into(),
        };
        assert_eq!(SandboxError::from(error).kind(), ErrorKind::Unknown);
    }

    #[test]
    fn a_node_without_memory_and_a_network_of_another_kind_are_told_apart() {
        let no_memory = VmmError::NoMemory {
            needed_mib: 2,
            available_mib: 1,
        };
        assert_eq!(SandboxError::from(no_memory).kind(), ErrorKind::Exhausted);
        let netns = std::path::PathBuf::from("/netns");
        for error in [
            NetworkError::NoInterface(netns.clone()),
            NetworkError::Interfaces {
                netns,
                found: "eth0, eth1".into(),
            },
        ] {
            assert_eq!(SandboxError::from(error).kind(), ErrorKind::Invalid);
        }
        let trouble = SandboxError::from(NetworkError::Deadline);
        assert_eq!(trouble.kind(), ErrorKind::Internal);
    }

    #[test]
    fn trouble_with_the_tree_is_no_fault_of_the_request() {
        let of = |number| StorageError::Source {
            path: "/volume".into(),
            source: io::Error::from_raw_os_error(number),
        };
        // ENOENT, then EIO.
        assert_eq!(SandboxError::from(of(2)).kind(), ErrorKind::Invalid);
        assert_eq!(SandboxError::from(of(5)).kind(), ErrorKind::Internal);
    }
}
