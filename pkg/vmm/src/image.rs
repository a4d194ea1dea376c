// SPDX-License-Identifier: Apache-2.0
//! Checks of files before they are handed to QEMU, whose own errors name
//! neither the setting nor the cause.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::error::VmmError;

const ELF: &[u8] = b"\x7fELF";
/// Offset of "HdrS" in a bzImage (Documentation/arch/x86/boot.rst).
const BZIMAGE: (usize, &[u8]) = (0x202, b"HdrS");
/// newc, and the compressions that kernels unpack: gzip, zstd, xz, lz4, bzip2.
const INITRAMFS: [&[u8]; 6] = [
    b"070701",
    b"\x1f\x8b",
    b"\x28\xb5\x2f\xfd",
    b"\xfd7zXZ",
    b"\x02\x21\x4c\x18",
    b"BZh",
];

fn unusable(what: &'static str, path: &Path, reason: impl ToString) -> VmmError {
    VmmError::Unusable {
        what,
        path: path.into(),
        reason: reason.to_string(),
    }
}

fn head(what: &'static str, path: &Path) -> Result<Vec<u8>, VmmError> {
    let mut head = Vec::new();
    File::open(path)
        .and_then(|file| file.take(0x206).read_to_end(&mut head))
        .map_err(|error| unusable(what, path, error))?;
    Ok(head)
}

/// What a kernel's file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// Our own: uncompressed, entered directly (PVH).
    Elf,
    /// A distribution's, with its drivers as modules.
    BzImage,
}

pub(crate) fn check_kernel(path: &Path) -> Result<Kernel, VmmError> {
    let head = head("kernel", path)?;
    if head.starts_with(ELF) {
        return Ok(Kernel::Elf);
    }
    let (at, magic) = BZIMAGE;
    if head.get(at..at + magic.len()) == Some(magic) {
        return Ok(Kernel::BzImage);
    }
    Err(unusable(
        "kernel",
        path,
        "neither an ELF file nor a bzImage",
    ))
}

pub(crate) fn check_initramfs(path: &Path) -> Result<(), VmmError> {
    let head = head("initramfs", path)?;
    if INITRAMFS.iter().any(|magic| head.starts_with(magic)) {
        return Ok(());
    }
    Err(unusable(
        "initramfs",
        path,
        "neither a cpio archive nor a compressed one",
    ))
}

pub(crate) fn check_program(what: &'static str, path: &Path) -> Result<(), VmmError> {
    let meta = std::fs::metadata(path).map_err(|error| unusable(what, path, error))?;
    if meta.is_file() && meta.permissions().mode() & 0o111 != 0 {
        Ok(())
    } else {
        Err(unusable(what, path, "not a program"))
    }
}

/// Refuses what the node cannot hold: the kernel would grant it and kill later.
pub(crate) fn check_memory(needed_mib: u32) -> Result<(), VmmError> {
    let text = std::fs::read_to_string("/proc/meminfo")
        .map_err(VmmError::file("read", "/proc/meminfo"))?;
    let needed_mib = u64::from(needed_mib);
    match available_mib(&text) {
        Some(available_mib) if available_mib < needed_mib => Err(VmmError::NoMemory {
            needed_mib,
            available_mib,
        }),
        _ => Ok(()),
    }
}

fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_known_by_its_magic() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k");
        std::fs::write(&path, b"\x7fELF\x02").unwrap();
        assert_eq!(check_kernel(&path).unwrap(), Kernel::Elf);
        let mut bzimage = vec![0; 0x206];
        bzimage[0x202..].copy_from_slice(b"HdrS");
        std::fs::write(&path, &bzimage).unwrap();
        assert_eq!(check_kernel(&path).unwrap(), Kernel::BzImage);
        std::fs::write(&path, b"#!/bin/sh").unwrap();
        let error = check_kernel(&path).unwrap_err().to_string();
        assert!(
            error.starts_with("kernel ") && error.contains("ELF"),
            "{error}"
        );
        let error = check_kernel(&folder.path().join("absent")).unwrap_err();
        assert!(error.to_string().contains("No such file"), "{error}");
    }

    #[test]
    fn an_initramfs_is_known_by_its_magic() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("i");
        std::fs::write(&path, b"070701").unwrap();
        check_initramfs(&path).unwrap();
        std::fs::write(&path, b"PK").unwrap();
        assert!(check_initramfs(&path).is_err());
    }

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal: 1 kB\nMemAvailable:   2097152 kB\n";
        assert_eq!(available_mib(text), Some(2048));
        assert!(matches!(
            check_memory(u32::MAX),
            Err(VmmError::NoMemory { .. })
        ));
    }
}
