// SPDX-License-Identifier: Apache-2.0
//! The user namespace of a pod (`hostUsers: false`).

use std::fmt;
use std::str::FromStr;

/// A run of user or group IDs: from 0 on inside a namespace, from `host` on
/// outside. containerd takes one run per pod, and root is to be in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IdMapping {
    host: u32,
    size: u32,
}

/// Why something is no mapping of a pod's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MappingError {
    /// The inner IDs do not begin at 0.
    #[error("a mapping must begin at ID 0 of the container, not at {0}: it has to have a root")]
    NoRoot(u32),
    /// There is no ID in it, or one that cannot be.
    #[error("{size} IDs from {host} on are no range of IDs")]
    Range {
        /// The first outer ID.
        host: u32,
        /// How many.
        size: u32,
    },
    /// There are none, or several.
    #[error("one mapping is needed, not {0}")]
    Count(usize),
    /// It is not three numbers.
    #[error("{0:?} is no container:host:size")]
    Text(String),
}

impl IdMapping {
    /// `size` IDs, the first of which is `container` inside and `host` outside.
    ///
    /// # Errors
    /// [`MappingError`] if 0 is not the first inside, or the range is none.
    pub fn new(container: u32, host: u32, size: u32) -> Result<Self, MappingError> {
        if container != 0 {
            return Err(MappingError::NoRoot(container));
        }
        // The largest number is no ID.
        let end = host.checked_add(size).filter(|_| size > 0);
        end.ok_or(MappingError::Range { host, size })?;
        Ok(Self { host, size })
    }

    /// The only one of several: container's, host's, size.
    ///
    /// # Errors
    /// [`MappingError`], also for none and for more than one.
    pub fn only(mappings: impl IntoIterator<Item = (u32, u32, u32)>) -> Result<Self, MappingError> {
        let all: Vec<_> = mappings.into_iter().collect();
        match all[..] {
            [(container, host, size)] => Self::new(container, host, size),
            _ => Err(MappingError::Count(all.len())),
        }
    }

    /// The outer ID of root.
    #[must_use]
    pub fn root(self) -> u32 {
        self.host
    }

    /// How many IDs there are.
    #[must_use]
    pub fn size(self) -> u32 {
        self.size
    }

    /// The outer ID of `inner`, if it has one.
    #[must_use]
    pub fn outside(self, inner: u32) -> Option<u32> {
        (inner < self.size).then(|| self.host + inner)
    }
}

/// As in a snapshot's options: `container:host:size`.
impl FromStr for IdMapping {
    type Err = MappingError;

    fn from_str(text: &str) -> Result<Self, MappingError> {
        let numbers: Option<Vec<u32>> = text.split(':').map(|part| part.parse().ok()).collect();
        match numbers.as_deref() {
            Some([container, host, size]) => Self::new(*container, *host, *size),
            _ => Err(MappingError::Text(text.into())),
        }
    }
}

/// As the kernel takes it (user_namespaces(7)).
impl fmt::Display for IdMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0 {} {}", self.host, self.size)
    }
}

/// What a user namespace maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct UserNamespace {
    /// User IDs.
    pub uids: IdMapping,
    /// Group IDs.
    pub gids: IdMapping,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_one_range_that_has_root() {
        let mapping = IdMapping::new(0, 100_000, 65_536).unwrap();
        assert_eq!(mapping.to_string(), "0 100000 65536");
        assert_eq!("0:100000:65536".parse(), Ok(mapping));
        assert_eq!(IdMapping::only([(0, 100_000, 65_536)]), Ok(mapping));
        assert_eq!(mapping.outside(0), Some(100_000));
        assert_eq!(mapping.outside(65_535), Some(165_535));
        assert_eq!(mapping.outside(65_536), None);
        assert_eq!(IdMapping::new(1, 5, 5), Err(MappingError::NoRoot(1)));
        for (host, size) in [(5, 0), (u32::MAX, 1), (1, u32::MAX)] {
            let range = MappingError::Range { host, size };
            assert_eq!(IdMapping::new(0, host, size), Err(range));
        }
        // The whole of them, as the initial namespace has it.
        assert!(IdMapping::new(0, 0, u32::MAX).is_ok());
        for text in ["", "0:1", "0:1:2:3", "0:-1:2", "0:1:2,0:3:4"] {
            assert_eq!(
                text.parse::<IdMapping>(),
                Err(MappingError::Text(text.into()))
            );
        }
        assert_eq!(IdMapping::only([]), Err(MappingError::Count(0)));
        let two = [(0, 1, 1), (1, 5, 1)];
        assert_eq!(IdMapping::only(two), Err(MappingError::Count(2)));
    }
}
