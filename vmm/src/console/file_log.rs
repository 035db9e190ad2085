//! The console's log: a file that is moved aside at 1 MiB, so that a guest cannot fill the host's disk.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// At this length PATH becomes PATH.old.
const MAX_LEN: u64 = 1 << 20;

pub(super) struct FileLog {
    path: PathBuf,
    file: File,
    len: u64,
}

impl FileLog {
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        let len = file.metadata()?.len();
        Ok(Self { path: path.into(), file, len })
    }

    /// A log that cannot be written loses bytes; the guest goes on.
    pub fn append(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(MAX_LEN as usize) {
            if self.len + part.len() as u64 > MAX_LEN && self.rotate().is_err() {
                return;
            }
            if self.file.write_all(part).is_ok() {
                self.len += part.len() as u64;
            }
        }
    }

    fn rotate(&mut self) -> io::Result<()> {
        let mut old = self.path.clone().into_os_string();
        old.push(".old");
        std::fs::rename(&self.path, old)?;
        *self = Self::open(&self.path)?;
        Ok(())
    }
}
