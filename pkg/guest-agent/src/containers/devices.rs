// SPDX-License-Identifier: Apache-2.0
//! The guest's devices, for a container that may use them all.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceType};

use crate::error::GuestError;

/// What each container has of its own in /dev.
const OWN: [&str; 5] = ["console", "mqueue", "ptmx", "pts", "shm"];

/// Adds a node for each device that the guest has, as containerd does on a node
/// (`HostDevices` of its pkg/oci), if every device may be used.
pub(super) fn complete(linux: &mut Linux) -> Result<(), GuestError> {
    let rules = linux
        .resources()
        .as_ref()
        .and_then(|it| it.devices().as_ref());
    let open = rules.and_then(|rules| rules.last()).is_some_and(|rule| {
        let all = rule.typ().unwrap_or_default() == LinuxDeviceType::A;
        rule.allow() && all && rule.major().is_none() && rule.minor().is_none()
    });
    if open {
        let mut devices = linux.devices().clone().unwrap_or_default();
        add(&mut devices, Path::new("/dev"))?;
        linux.set_devices(Some(devices));
    }
    Ok(())
}

fn add(devices: &mut Vec<LinuxDevice>, folder: &Path) -> Result<(), GuestError> {
    const LOOK: &str = "look for devices at";
    for entry in fs::read_dir(folder).map_err(GuestError::file(LOOK, folder))? {
        let entry = entry.map_err(GuestError::file(LOOK, folder))?;
        let path = entry.path();
        let node = entry.metadata().map_err(GuestError::file(LOOK, &path))?;
        let kind = node.file_type();
        if OWN.iter().any(|own| entry.file_name() == *own) {
            continue;
        }
        if kind.is_dir() {
            add(devices, &path)?;
            continue;
        }
        let typ = match (kind.is_block_device(), kind.is_char_device()) {
            (true, _) => LinuxDeviceType::B,
            (_, true) => LinuxDeviceType::C,
            _ => continue,
        };
        let mut device = LinuxDevice::default();
        device
            .set_path(path)
            .set_typ(typ)
            .set_major(rustix::fs::major(node.rdev()).into())
            .set_minor(rustix::fs::minor(node.rdev()).into())
            .set_file_mode(Some(node.mode() & 0o7777))
            .set_uid(Some(node.uid()))
            .set_gid(Some(node.gid()));
        devices.push(device);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with_rules(rules: serde_json::Value) -> Vec<LinuxDevice> {
        let linux = json!({ "resources": { "devices": rules } });
        let mut linux: Linux = serde_json::from_value(linux).unwrap();
        complete(&mut linux).unwrap();
        linux.devices().clone().unwrap_or_default()
    }

    #[test]
    fn who_may_use_every_device_has_nodes_of_them() {
        let all = with_rules(json!([{ "allow": false }, { "allow": true, "access": "rwm" }]));
        let null = all.iter().find(|it| it.path() == Path::new("/dev/null"));
        let null = null.unwrap();
        assert_eq!(
            (null.typ(), null.major(), null.minor()),
            (LinuxDeviceType::C, 1, 3)
        );
        let own = |device: &&LinuxDevice| device.path().starts_with("/dev/pts");
        assert_eq!(all.iter().find(own), None);
    }

    #[test]
    fn who_may_use_some_devices_has_none_of_the_guests() {
        for rules in [
            json!([]),
            json!([{ "allow": true, "access": "rwm" }, { "allow": false, "access": "rwm" }]),
            json!([{ "allow": true, "type": "c", "major": 1, "minor": 3, "access": "r" }]),
            json!([{ "allow": true, "type": "c", "access": "m" }]),
        ] {
            assert_eq!(with_rules(rules.clone()), [], "{rules}");
        }
    }
}
