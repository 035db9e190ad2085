//! Files that appear whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FlockOperation, flock};

use super::StoreError;

/// A file under a name that nobody looks at, until it is published. Dropped before that, it is removed.
#[derive(Debug)]
pub(crate) struct Draft {
    file: File,
    path: PathBuf,
    published: bool,
}

impl Draft {
    /// A new empty file in `dir`, which is on the same file system as what it shall become.
    pub(crate) fn create(dir: &Path) -> Result<Self, StoreError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        loop {
            // The process id keeps processes apart, the counter threads. A leftover of an earlier process with the same
            // id is stepped over.
            let name = format!(".{}-{}.tmp", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = dir.join(name);
            match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
                Ok(file) => return Ok(Self { file, path, published: false }),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(StoreError::io("create", &path)(e)),
            }
        }
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.file.write_all(bytes).map_err(StoreError::io("write", &self.path))
    }

    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        self.file.sync_all().map_err(StoreError::io("sync", &self.path))
    }

    /// Gives the file the name `target`, replacing what has it.
    pub(crate) fn publish(mut self, target: &Path) -> Result<(), StoreError> {
        self.rename(target).map_err(StoreError::io("write", target))
    }

    /// The same, and makes the directory that `target` is in where that lacks.
    pub(crate) fn publish_within(mut self, target: &Path) -> Result<(), StoreError> {
        match (self.rename(target), target.parent()) {
            // Nearly always it is there, and to ask first would cost as much as the renaming.
            (Err(e), Some(parent)) if e.kind() == io::ErrorKind::NotFound => {
                make_dir(parent)?;
                self.publish(target)
            }
            (renamed, _) => renamed.map_err(StoreError::io("write", target)),
        }
    }

    fn rename(&mut self, target: &Path) -> io::Result<()> {
        fs::rename(&self.path, target)?;
        self.published = true;
        Ok(())
    }
}

/// Whether a draft may be called `name`.
pub(super) fn is_draft_name(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".tmp")
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.published {
            // Nothing more can be done about a failure here; `gc` removes what stays.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes what was renamed within `dir` survive a power cut.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|file| file.sync_all()).map_err(StoreError::io("sync", dir))
}

/// Makes `dir` and its missing parents.
pub(crate) fn make_dir(dir: &Path) -> Result<(), StoreError> {
    fs::create_dir_all(dir).map_err(StoreError::io("create", dir))
}

/// Bytes that an ordinary user may still write to the file system of `path`.
pub(crate) fn free_space(path: &Path) -> Result<u64, StoreError> {
    let stat = rustix::fs::statvfs(path).map_err(|e| StoreError::io("examine", path)(e.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Refuses `what` when `needs` bytes more do not fit on the file system of `path`.
pub(crate) fn need_space(what: &'static str, path: &Path, needs: u64) -> Result<(), StoreError> {
    let has = free_space(path)?;
    if needs > has { Err(StoreError::NoRoom { what, path: path.to_owned(), needs, has }) } else { Ok(()) }
}

/// A file that is locked (`flock`) until this is dropped.
#[derive(Debug)]
pub(crate) struct Locked(File);

impl Locked {
    /// Takes a lock on `file`; `None` when somebody else has it and `operation` does not wait.
    pub(crate) fn take(file: File, operation: FlockOperation) -> io::Result<Option<Self>> {
        loop {
            match flock(&file, operation) {
                Ok(()) => return Ok(Some(Self(file))),
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // Closing would not do: a child that another thread is just starting holds a copy of the descriptor until it
        // executes its program, and the lock with it.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}
