// SPDX-License-Identifier: Apache-2.0
//! Checks of files before they are handed to QEMU, whose own errors name
//! neither the setting nor the cause.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use crate::error::VmmError;

const ELF: &[u8] = b"\x7fELF";
/// Type and owner of the note that says where QEMU enters a kernel
/// (XEN_ELFNOTE_PHYS32_ENTRY of Linux' include/xen/interface/elfnote.h).
const PVH_NOTE: (u64, &[u8]) = (18, b"Xen\0");
/// Bytes of notes that are looked at.
const NOTES: usize = 64 * 1024;
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
        let entered = File::open(path).and_then(|file| has_pvh_note(&file));
        return match entered {
            Ok(true) => Ok(Kernel::Elf),
            Ok(false) => Err(unusable("kernel", path, "an ELF file without a PVH note")),
            Err(error) => Err(unusable("kernel", path, format!("an ELF file: {error}"))),
        };
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

/// Looks for the note in an ELF file of 64 bits (elf(5)); one of 32 has none for us.
fn has_pvh_note(file: &File) -> io::Result<bool> {
    const NOTE_SEGMENT: u64 = 4;
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0)?;
    let (table, size, count) = (
        number(&header, 32, 8),
        number(&header, 54, 2),
        number(&header, 56, 2),
    );
    for index in 0..count {
        let mut segment = [0; 56];
        file.read_exact_at(&mut segment, table.saturating_add(index * size))?;
        if number(&segment, 0, 4) != NOTE_SEGMENT {
            continue;
        }
        let length = usize::try_from(number(&segment, 32, 8)).unwrap_or(NOTES);
        let mut notes = vec![0; length.min(NOTES)];
        file.read_exact_at(&mut notes, number(&segment, 8, 8))?;
        if pvh_note_in(&notes, number(&segment, 48, 8)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Notes follow each other: sizes of name and content, type, and both of them.
fn pvh_note_in(mut notes: &[u8], align: u64) -> bool {
    let padded = |size: u64| usize::try_from(size.next_multiple_of(align.clamp(4, 8)));
    while notes.len() >= 12 {
        let (name, content, kind) = (
            number(notes, 0, 4),
            number(notes, 4, 4),
            number(notes, 8, 4),
        );
        let behind = &notes[12..];
        if kind == PVH_NOTE.0 && behind.starts_with(PVH_NOTE.1) {
            return true;
        }
        let (Ok(name), Ok(content)) = (padded(name), padded(content)) else {
            return false;
        };
        notes = behind.get(name.saturating_add(content)..).unwrap_or(&[]);
    }
    false
}

/// A little-endian number; absent bytes are 0.
fn number(bytes: &[u8], at: usize, size: usize) -> u64 {
    let bytes = bytes.get(at..at + size).unwrap_or_default();
    let digits = bytes.iter().rev();
    digits.fold(0, |number, byte| number << 8 | u64::from(*byte))
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

    /// An ELF file with one segment, which holds `notes`.
    fn elf(notes: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 64 + 56];
        file[..4].copy_from_slice(ELF);
        for (at, value) in [
            (32, 64),
            (54, 56),
            (56, 1),
            (64, 4),
            (64 + 8, 120),
            (64 + 32, u8::try_from(notes.len()).unwrap()),
            (64 + 48, 4),
        ] {
            file[at] = value;
        }
        file.extend_from_slice(notes);
        file
    }

    fn note(name: &[u8; 4], kind: u8) -> Vec<u8> {
        let numbers = [[4, 0, 0, 0], [5, 0, 0, 0], [kind, 0, 0, 0]];
        [&numbers.concat()[..], name, b"12345\0\0\0"].concat()
    }

    #[test]
    fn an_elf_file_is_a_kernel_by_its_note() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k");
        let check = |content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            check_kernel(&path).map_err(|error| error.to_string())
        };
        let build_id = note(b"GNU\0", 3);
        let kernel = elf(&[build_id.clone(), note(b"Xen\0", 18)].concat());
        assert_eq!(check(&kernel), Ok(Kernel::Elf));
        for other in [note(b"Xen\0", 17), note(b"GNU\0", 18), build_id, vec![]] {
            let error = check(&elf(&other)).unwrap_err();
            assert!(error.ends_with("without a PVH note"), "{error}");
        }
        for cut in [5, 70, kernel.len() - 1] {
            let error = check(&kernel[..cut]).unwrap_err();
            assert!(error.starts_with("kernel "), "{cut}: {error}");
        }
        let mut sizes = note(b"Xen\0", 1);
        sizes[..8].fill(0xff);
        check(&elf(&sizes)).unwrap_err();
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
