// SPDX-License-Identifier: Apache-2.0
//! Threads that open, read and close a file all the time. If a descriptor of
//! ours were closed twice, or used after its end, its number would be one of
//! theirs; each finds its own bytes and nothing else.

use std::fs;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// A byte that only these files have.
pub(crate) const STRANGER: u8 = 0xee;

pub(crate) struct Storm {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u32>>,
    _folder: tempfile::TempDir,
}

impl Storm {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("strangers");
        fs::write(&file, [STRANGER; 16]).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = move || {
            let mut rounds = 0;
            while !stopped.load(Ordering::Relaxed) || rounds == 0 {
                let mut bytes = Vec::new();
                let mut opened = fs::File::open(&file).unwrap();
                opened.read_to_end(&mut bytes).unwrap();
                assert_eq!(bytes, [STRANGER; 16], "a stranger's file has our bytes");
                rounds += 1;
            }
            rounds
        };
        Self {
            stop,
            threads: (0..2).map(|_| std::thread::spawn(thread.clone())).collect(),
            _folder: folder,
        }
    }

    pub(crate) fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            assert!(thread.join().unwrap() > 0);
        }
    }
}
