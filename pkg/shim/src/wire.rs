// SPDX-License-Identifier: Apache-2.0
//! Small conversions between containerd's messages and our values.

use std::time::SystemTime;

use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use podhull_sandbox::{RootfsMount, SandboxError};
use podhull_types::{ContainerId, ExecId, ProcessRef};
use serde::de::DeserializeOwned;

use crate::error::ShimError;

pub(crate) fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(at.into())
}

pub(crate) fn any(type_url: &str, value: Vec<u8>) -> Any {
    Any {
        type_url: type_url.into(),
        value,
        ..Any::default()
    }
}

/// The process that `id` and `exec_id` name; an empty `exec_id` is the init's.
pub(crate) fn process(id: &str, exec_id: &str) -> Result<ProcessRef, ShimError> {
    let container = ContainerId::new(id)?;
    if exec_id.is_empty() {
        return Ok(ProcessRef::init(container));
    }
    Ok(ProcessRef::exec(container, ExecId::new(exec_id)?))
}

/// A path as containerd has it; empty if there is none.
pub(crate) fn path_text(path: Option<&std::path::PathBuf>) -> String {
    path.map(|path| path.to_string_lossy().into_owned())
        .unwrap_or_default()
}

pub(crate) fn rootfs(mounts: &[containerd_shim_protos::api::Mount]) -> Vec<RootfsMount> {
    let entry = |mount: &containerd_shim_protos::api::Mount| RootfsMount {
        fstype: mount.type_.clone(),
        source: mount.source.clone(),
        options: mount.options.clone(),
    };
    mounts.iter().map(entry).collect()
}

/// A value of `T` out of JSON. `unknown` is told each field that `T` has no member
/// for: runc passes those over, too.
///
/// # Errors
/// What is no such value, with the key and the place.
pub(crate) fn parse<T: DeserializeOwned>(
    text: &[u8],
    mut unknown: impl FnMut(String),
) -> Result<T, serde_path_to_error::Error<serde_json::Error>> {
    let mut reader = serde_json::Deserializer::from_slice(text);
    let mut track = serde_path_to_error::Track::new();
    let traced = serde_path_to_error::Deserializer::new(&mut reader, &mut track);
    let value = serde_ignored::deserialize(traced, |field| unknown(field.to_string()));
    value.map_err(|error| serde_path_to_error::Error::new(track.path(), error))
}

/// Logs a field of `what` that this version does not know.
pub(crate) fn passed_over(what: &str) -> impl FnMut(String) {
    move |field| tracing::warn!(what, field, "unknown field, passed over")
}

/// A JSON value that containerd packed into an Any.
pub(crate) fn json<T: DeserializeOwned>(field: &str, any: &Any) -> Result<T, ShimError> {
    parse(&any.value, passed_over(field)).map_err(|error| {
        let reason = format!("{}: {}", error.path(), error.inner());
        SandboxError::refused(field, reason).into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_that_no_specification_has_is_told() {
        let text = br#"{"ociVersion": "1.3.0", "linux": {"wings": 2, "resources": {"tail": {}}}}"#;
        let mut unknown = Vec::new();
        let spec: oci_spec::runtime::Spec = parse(text, |field| unknown.push(field)).unwrap();
        assert!(spec.linux().is_some());
        assert_eq!(unknown, ["linux.?.wings", "linux.?.resources.?.tail"]);
    }

    #[test]
    fn garbled_json_names_the_key_and_the_place() {
        let text = b"{\"ociVersion\": \"1.3.0\",\n\"process\": {\"cwd\": 7}}";
        let error = parse::<oci_spec::runtime::Spec>(text, |_| {}).unwrap_err();
        assert_eq!(error.path().to_string(), "process.cwd");
        assert!(error.inner().to_string().contains("line 2"), "{error}");
    }

    #[test]
    fn an_empty_exec_id_is_the_init_process() {
        assert_eq!(process("c", "").unwrap().exec, None);
        assert!(process("c", "e").unwrap().exec.is_some());
        assert!(process("../c", "").is_err());
    }
}
