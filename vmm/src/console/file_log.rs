//! The console's log: a file that is moved aside at 1 MiB, so that a guest cannot fill the host's disk.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::files;

/// At this length PATH becomes PATH.old.
const MAX_LEN: u64 = 1 << 20;

pub(super) struct FileLog {
    path: PathBuf,
    file: File,
    len: u64,
    /// What is no file, such as a device, is not full and is never moved.
    regular: bool,
}

impl FileLog {
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = files::append_to(path)?;
        let there = file.metadata()?;
        Ok(Self { path: path.into(), file, len: there.len(), regular: there.is_file() })
    }

    /// A log that cannot be written loses bytes; the guest goes on.
    pub fn append(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(MAX_LEN as usize) {
            if self.regular && self.len + part.len() as u64 > MAX_LEN && self.rotate().is_err() {
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
