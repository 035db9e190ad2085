//! Finished things are directories `{name}-{key}`; the key covers all that went in. A directory appears whole or not at all.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use crate::error::at;
use crate::{Result, Workshop};

/// Everything that a recipe depends on.
#[derive(Default)]
pub(crate) struct Key(DefaultHasher);

impl Key {
    pub(crate) fn text(mut self, text: &str) -> Self {
        text.hash(&mut self.0);
        self
    }

    pub(crate) fn file(mut self, path: &Path) -> Result<Self> {
        fs::read(path).map_err(at("read", path))?.hash(&mut self.0);
        Ok(self)
    }
}

impl Workshop<'_> {
    /// The directory of `name` for `key`; `make` fills a fresh one when it is not there yet. Older ones are removed.
    pub(crate) fn cached(&self, name: &str, key: Key, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        fs::create_dir_all(&self.cache).map_err(at("create", &self.cache))?;
        // Two builds at once (two checkouts sharing a target directory, say) take turns.
        let lock_path = self.cache.join("lock");
        let lock = File::create(&lock_path).map_err(at("create", &lock_path))?;
        lock.lock().map_err(at("lock", &lock_path))?;
        let done = self.cache.join(format!("{name}-{:016x}", key.0.finish()));
        if done.exists() {
            return Ok(done);
        }
        self.remove_older(name)?;
        let making = done.with_extension("making");
        fs::create_dir(&making).map_err(at("create", &making))?;
        make(&making)?;
        fs::rename(&making, &done).map_err(at("rename", &making))?;
        Ok(done)
    }

    /// Removes other versions of `name` and what an interrupted build left.
    fn remove_older(&self, name: &str) -> Result<()> {
        for entry in fs::read_dir(&self.cache).map_err(at("list", &self.cache))?.flatten() {
            let file_name = entry.file_name();
            let is_ours = file_name.to_string_lossy().rsplit_once('-').is_some_and(|(stem, _)| stem == name);
            if is_ours {
                fs::remove_dir_all(entry.path()).map_err(at("remove", &entry.path()))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_once_and_made_anew_when_the_key_changes() {
        let dir = tempfile::tempdir().unwrap();
        let say = |_: &str| {};
        let shop = Workshop::new(dir.path(), &say);
        let make = |dir: &Path| fs::write(dir.join("x"), "1").map_err(at("write", dir));
        let first = shop.cached("thing", Key::default().text("a"), make).unwrap();
        let again = shop.cached("thing", Key::default().text("a"), |_| panic!("made twice")).unwrap();
        assert_eq!(first, again);
        let second = shop.cached("thing", Key::default().text("b"), make).unwrap();
        assert!(second.join("x").exists() && !first.exists());
    }

    #[test]
    fn a_failed_build_does_not_block_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let say = |_: &str| {};
        let shop = Workshop::new(dir.path(), &say);
        let fail = |dir: &Path| Err(at("make", dir)(std::io::ErrorKind::StorageFull.into()));
        assert!(shop.cached("thing", Key::default(), fail).is_err());
        assert!(shop.cached("thing", Key::default(), |_| Ok(())).is_ok());
    }
}
