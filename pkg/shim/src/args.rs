// SPDX-License-Identifier: Apache-2.0
//! The command line that containerd gives a shim (containerd's
//! `core/runtime/v2/README.md`): flags of Go's `flag` package, then an action.

use std::path::PathBuf;

use crate::error::ShimError;

/// What the shim is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Make, or find, the process that serves a container's pod.
    Start,
    /// Release what a dead shim left.
    Delete,
    /// Be the process that serves a pod; only `start` asks for this.
    Serve,
    /// Say which version this is.
    Version,
    /// Describe the runtime as containerd's `introspection.proto` has it.
    Info,
}

/// The parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Args {
    /// What to do.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// The container's or sandbox's id.
    pub id: String,
    /// The bundle's folder; only `delete` is given it.
    pub bundle: Option<PathBuf>,
    /// containerd's gRPC socket.
    pub address: String,
    /// Whether containerd itself logs at debug level.
    pub debug: bool,
}

impl Args {
    /// Parses the arguments behind the program's name.
    ///
    /// # Errors
    /// [`ShimError::Argument`] naming the flag or action.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, ShimError> {
        let mut args = Self {
            action: Action::Start,
            namespace: String::new(),
            id: String::new(),
            bundle: None,
            address: String::new(),
            debug: false,
        };
        let mut action = None;
        let mut rest = arguments.into_iter();
        while let Some(argument) = rest.next() {
            let Some(flag) = argument.strip_prefix('-') else {
                action = Some(action_named(&argument)?);
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let mut text = || {
                let value = value.clone().or_else(|| rest.next());
                value.ok_or_else(|| ShimError::Argument(format!("flag -{name} needs a value")))
            };
            match name {
                "namespace" => args.namespace = text()?,
                "id" => args.id = text()?,
                "bundle" => args.bundle = Some(text()?.into()),
                "address" => args.address = text()?,
                // Events are sent over ttrpc; this is an older way.
                "publish-binary" | "socket" => drop(text()?),
                "debug" => args.debug = value.as_deref() != Some("false"),
                "v" | "version" => action = Some(Action::Version),
                "info" => action = Some(Action::Info),
                _ => return Err(ShimError::Argument(format!("unknown flag -{name}"))),
            }
        }
        args.action = action.ok_or_else(|| {
            ShimError::Argument("no action: expected start, delete, -v or -info".into())
        })?;
        args.check()?;
        Ok(args)
    }

    fn check(&self) -> Result<(), ShimError> {
        if matches!(self.action, Action::Version | Action::Info) {
            return Ok(());
        }
        for (flag, value) in [("namespace", &self.namespace), ("id", &self.id)] {
            if value.is_empty() {
                return Err(ShimError::Argument(format!("flag -{flag} is missing")));
            }
        }
        Ok(())
    }
}

fn action_named(name: &str) -> Result<Action, ShimError> {
    match name {
        "start" => Ok(Action::Start),
        "delete" => Ok(Action::Delete),
        "serve" => Ok(Action::Serve),
        _ => Err(ShimError::Argument(format!("unknown action {name:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, ShimError> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn containerds_command_lines_are_understood() {
        let args = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock \
             -publish-binary /usr/bin/containerd -id abc -debug start",
        )
        .unwrap();
        assert_eq!(args.action, Action::Start);
        assert_eq!(args.namespace, "k8s.io");
        assert_eq!(args.id, "abc");
        assert!(args.debug);
        let args = parse("--namespace=x -id=abc -bundle /b delete").unwrap();
        assert_eq!(args.action, Action::Delete);
        assert_eq!(args.bundle.unwrap(), std::path::Path::new("/b"));
        for flag in ["-v", "-version", "--version"] {
            assert_eq!(parse(flag).unwrap().action, Action::Version);
        }
        assert_eq!(parse("-info").unwrap().action, Action::Info);
    }

    #[test]
    fn what_is_missing_or_unknown_is_named() {
        for (line, named) in [
            ("-namespace x start", "-id"),
            ("-namespace x -id", "-id"),
            ("-colour red start", "-colour"),
            ("-namespace x -id y restart", "restart"),
            ("", "no action"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(named), "{line}: {error}");
        }
    }
}
