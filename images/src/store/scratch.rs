//! Room for work that takes more space than memory has.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FlockOperation;

use super::{Lease, Store, StoreError};

const PREFIX: &str = "scratch-";

/// An empty directory that nobody else may enter. It goes, with all that is in it, when this is dropped.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    /// While there is one, [`Store::gc`] does not take this for a leftover.
    _lease: Lease,
}

impl Scratch {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays goes with the next.
        let _ = fs::remove_dir_all(&self.path);
    }
}

impl Store {
    /// A directory to work in, on the store's file system. What killed processes left there is removed first, if nobody
    /// uses the store at this moment.
    pub fn scratch(&self) -> Result<Scratch, StoreError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        if let Some(_lock) = self.lock(FlockOperation::NonBlockingLockExclusive)? {
            self.clear_scratch()?;
        }
        let lease = self.lease()?;
        loop {
            // Another process, in another container, may have our number.
            let name = format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = self.dir().join("tmp").join(name);
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Scratch { path, _lease: lease }),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(StoreError::io("create", &path)(e)),
            }
        }
    }

    /// Removes what killed processes left. The caller has the lock, so that nobody works in any of them.
    pub(super) fn clear_scratch(&self) -> Result<(), StoreError> {
        let tmp = self.dir().join("tmp");
        for entry in fs::read_dir(&tmp).map_err(StoreError::io("list", &tmp))? {
            let entry = entry.map_err(StoreError::io("list", &tmp))?;
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX)) {
                fs::remove_dir_all(entry.path()).map_err(StoreError::io("remove", &entry.path()))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::fixtures::store;

    #[test]
    fn a_scratch_goes_with_its_owner_or_with_the_next() {
        let (_dir, store) = store();
        let dead = store.scratch().unwrap();
        let left = dead.path().to_owned();
        std::fs::write(left.join("file"), "x").unwrap();
        let living = store.scratch().unwrap();
        assert!(left.exists(), "it is in use");
        drop(dead);
        assert!(!left.exists() && living.path().exists());
        drop(living);
        // As a killed process leaves it.
        std::fs::create_dir_all(left.join("deep")).unwrap();
        drop(store.scratch().unwrap());
        assert!(!left.exists());
        std::fs::create_dir_all(left.join("deep")).unwrap();
        store.gc(&[], std::time::Duration::ZERO).unwrap();
        assert!(!left.exists());
    }
}
