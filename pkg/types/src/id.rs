// SPDX-License-Identifier: Apache-2.0
//! Identifiers as containerd defines them (its `pkg/identifiers`): letters and
//! digits, inside also `.`, `_` and `-` (never two in a row), at most 76 bytes.
//! Checked once, so that an id can name a file or a cgroup.

use std::fmt;

/// Longest identifier containerd accepts, in bytes.
const MAX_LEN: usize = 76;

/// Why a string is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The identifier has no characters.
    #[error("{kind} id is empty")]
    Empty {
        /// Which identifier it was to be.
        kind: &'static str,
    },
    /// The identifier is longer than containerd allows.
    #[error("{kind} id is {len} bytes long, at most {MAX_LEN} are allowed")]
    TooLong {
        /// Which identifier it was to be.
        kind: &'static str,
        /// Its length in bytes.
        len: usize,
    },
    /// The identifier has a character, or a place for one, that is not allowed.
    #[error("{kind} id {id:?} may only have letters, digits and single . _ - inside")]
    Malformed {
        /// Which identifier it was to be.
        kind: &'static str,
        /// The string as given.
        id: String,
    },
}

fn check(kind: &'static str, id: &str) -> Result<(), IdError> {
    if id.is_empty() {
        return Err(IdError::Empty { kind });
    }
    if id.len() > MAX_LEN {
        return Err(IdError::TooLong {
            kind,
            len: id.len(),
        });
    }
    let well_formed = id
        .split(['.', '_', '-'])
        .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric()));
    if !well_formed {
        return Err(IdError::Malformed {
            kind,
            id: id.to_owned(),
        });
    }
    Ok(())
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// Checks `id` and takes it.
            ///
            /// # Errors
            /// [`IdError`] if containerd would not accept it as an identifier.
            pub fn new(id: impl Into<String>) -> Result<Self, IdError> {
                let id = id.into();
                check($kind, &id)?;
                Ok(Self(id))
            }

            /// The identifier as a string.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

id!(
    /// A pod sandbox: one VM.
    SandboxId,
    "sandbox"
);
id!(
    /// An OCI container inside a sandbox.
    ContainerId,
    "container"
);
id!(
    /// A process added to a running container.
    ExecId,
    "exec"
);

/// A process as containerd names it: a container's init process, or one added
/// to it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ProcessRef {
    /// The container it runs in.
    pub container: ContainerId,
    /// `None` for the init process.
    pub exec: Option<ExecId>,
}

impl ProcessRef {
    /// The init process of `container`.
    #[must_use]
    pub fn init(container: ContainerId) -> Self {
        Self {
            container,
            exec: None,
        }
    }

    /// The added process `exec` of `container`.
    #[must_use]
    pub fn exec(container: ContainerId, exec: ExecId) -> Self {
        Self {
            container,
            exec: Some(exec),
        }
    }
}

impl fmt::Display for ProcessRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.exec {
            Some(exec) => write!(f, "{}/{exec}", self.container),
            None => write!(f, "{}", self.container),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_containerd_accepts() {
        for id in ["a", "A9", "a-b_c.d", "0123456789abcdef"] {
            assert!(SandboxId::new(id).is_ok(), "{id}");
        }
    }

    #[test]
    fn refuses_what_could_leave_a_folder() {
        for id in ["", ".", "..", "a/b", "-a", "a-", "a..b", "a b", "a\n", "ä"] {
            assert!(SandboxId::new(id).is_err(), "{id:?}");
        }
        assert_eq!(
            SandboxId::new("x".repeat(77)),
            Err(IdError::TooLong {
                kind: "sandbox",
                len: 77
            })
        );
    }
}
