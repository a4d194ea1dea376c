// SPDX-License-Identifier: Apache-2.0
//! How containerd names a stream.

use std::fmt;
use std::path::Path;

use podhull_types::{ExecId, IdError};

/// How the URI of a stream of ours begins; the socket's path follows.
const SCHEME: &str = "ttrpc+unix";
const QUERY: &str = "streaming_id=";

/// Which of a process's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Stdin,
    Stdout,
    Stderr,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Stdin, Self::Stdout, Self::Stderr];

    /// As requests call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stdin => "stdin",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// A stream's id: that of a container or an exec, and which stream of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct StreamId {
    // Both are identifiers of the same form.
    owner: ExecId,
    pub(crate) kind: Kind,
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.owner, self.kind.name())
    }
}

impl StreamId {
    /// # Errors
    /// If `id` is not `OWNER-stdin`, `OWNER-stdout` or `OWNER-stderr`.
    pub(crate) fn parse(id: &str) -> Result<Self, IdError> {
        let malformed = || IdError::Malformed {
            kind: "stream",
            id: id.to_owned(),
        };
        let (owner, kind) = id.rsplit_once('-').ok_or_else(malformed)?;
        let kind = Kind::ALL.into_iter().find(|known| known.name() == kind);
        Ok(Self {
            owner: ExecId::new(owner)?,
            kind: kind.ok_or_else(malformed)?,
        })
    }
}

/// Where one stream of a process comes from, or goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    None,
    /// A FIFO of containerd's.
    Fifo(std::path::PathBuf),
    /// A stream at the shim's own socket.
    Stream(StreamId),
}

/// Reads `uri` as the stream `kind` of a process. Whatever else than a FIFO or a
/// stream at `socket`, our own, would run programs, write files or connect to
/// others.
///
/// # Errors
/// Why it is refused.
pub(super) fn parse(kind: Kind, uri: &str, socket: &Path) -> Result<Target, String> {
    if uri.is_empty() {
        return Ok(Target::None);
    }
    let path = match uri.split_once("://") {
        None => uri,
        Some(("fifo", path)) => path,
        Some((SCHEME, rest)) => return stream(kind, rest, socket).map(Target::Stream),
        Some((scheme, _)) => {
            return Err(format!(
                "scheme {scheme} is refused: only FIFOs and streams at the shim's own socket are accepted"
            ));
        }
    };
    if path.starts_with('/') {
        Ok(Target::Fifo(path.into()))
    } else {
        Err(format!("{path:?} is no absolute path"))
    }
}

fn stream(kind: Kind, rest: &str, socket: &Path) -> Result<StreamId, String> {
    let (path, query) = rest
        .split_once('?')
        .ok_or("the stream's URI has no streaming_id")?;
    if Path::new(path) != socket {
        return Err(format!("{path:?} is not the shim's own socket"));
    }
    let id = query
        .strip_prefix(QUERY)
        .ok_or("the stream's URI has no streaming_id")?;
    let id = StreamId::parse(id).map_err(|error| error.to_string())?;
    if id.kind == kind {
        Ok(id)
    } else {
        Err(format!("{id} is no id of a {}", kind.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOCKET: &str = "/run/podhull/ab/shim.sock";

    fn stdout(uri: &str) -> Result<Target, String> {
        parse(Kind::Stdout, uri, Path::new(SOCKET))
    }

    #[test]
    fn fifos_and_streams_of_our_own_are_accepted() {
        assert_eq!(stdout(""), Ok(Target::None));
        assert_eq!(stdout("/a"), Ok(Target::Fifo("/a".into())));
        assert_eq!(stdout("fifo:///a"), Ok(Target::Fifo("/a".into())));
        let uri = format!("ttrpc+unix://{SOCKET}?streaming_id=c-1-stdout");
        let Ok(Target::Stream(id)) = stdout(&uri) else {
            panic!("{uri}");
        };
        assert_eq!(id.to_string(), "c-1-stdout");
        assert_eq!(id.kind, Kind::Stdout);
    }

    #[test]
    fn any_other_uri_is_refused() {
        for (uri, why) in [
            ("binary:///bin/sh?x", "scheme binary"),
            ("file:///etc/passwd", "scheme file"),
            ("grpc+unix:///run/podhull/ab/shim.sock", "scheme grpc+unix"),
            (
                "ttrpc+vsock://3:1?streaming_id=c-stdout",
                "scheme ttrpc+vsock",
            ),
            ("relative", "no absolute path"),
            (
                "ttrpc+unix:///run/other?streaming_id=c-stdout",
                "own socket",
            ),
            ("ttrpc+unix:///run/podhull/ab/shim.sock", "no streaming_id"),
            (
                "ttrpc+unix:///run/podhull/ab/shim.sock?id=c-stdout",
                "no streaming_id",
            ),
            (
                "ttrpc+unix:///run/podhull/ab/shim.sock?streaming_id=c-stdin",
                "no id of a stdout",
            ),
            (
                "ttrpc+unix:///run/podhull/ab/shim.sock?streaming_id=../c-stdout",
                "single . _ -",
            ),
            (
                "ttrpc+unix:///run/podhull/ab/shim.sock?streaming_id=c-stdout&x=y",
                "stdout&x=y",
            ),
        ] {
            let error = stdout(uri).unwrap_err();
            assert!(error.contains(why), "{uri}: {error}");
        }
    }
}
