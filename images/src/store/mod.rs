//! A directory of content-addressed blobs and chunks, and names for some of them.
//!
//! ```text
//! format            the text "bedplate-images 1"
//! blobs/ab/{hex}    manifests and indexes, as they are
//! chunks/ab/{hex}   chunks, each one zstd frame, named by the digest of the plain bytes
//! tags/{name}       the digest of a manifest, as text
//! orders/{hex}      in which order a boot of the image reads its chunks, if that is known
//! tmp/              drafts, and chunks that were found damaged
//! lock              taken shared by who adds (see [`Store::lease`]), exclusively by [`Store::gc`]
//! ```
//!
//! Any number of threads and processes may use one store at once: files appear by rename, whole, and never change.
//!
//! **After a power cut** everything that a tag names is there: chunks are written without syncing each, and
//! [`Store::put_manifest`] and [`Store::set_tag`] sync the file system before they publish a name. What was added since may be gone
//! or damaged; that is found when it is read, because every read verifies the digest, and a file of no length counts as missing.

mod blobs;
mod chunks;
mod error;
mod files;
mod gc;
mod materialise;
mod order;
mod parts;
mod scratch;
mod tags;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bedplate_api::Digest;
use rustix::fs::FlockOperation;

pub use error::StoreError;
pub(crate) use files::{Draft, Locked, free_space, make_dir, need_space, sync_dir};
pub use parts::{Missing, PartReader};
pub use scratch::Scratch;
pub use tags::{FoundTag, is_tag_name};

const FORMAT: &str = "bedplate-images 1";

const DIRS: [&str; 4] = ["blobs", "chunks", "tags", "tmp"];

/// An open store. Cheap to clone; methods take `&self` and block on the disk.
#[derive(Debug, Clone)]
pub struct Store {
    dir: Arc<PathBuf>,
}

/// While one of these lives, no [`Store::gc`] of any process runs: what was just added but is not named yet stays.
#[derive(Debug)]
pub struct Lease {
    _lock: Locked,
}

impl Store {
    /// Opens the store in `dir`, making it when there is none. A directory with other things in it is refused: the
    /// store's files among somebody's own would be a mess that nobody could take apart.
    pub fn create(dir: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let this = Self { dir: Arc::new(dir.into()) };
        let format = this.dir.join("format");
        let not_made = |cause| match cause {
            StoreError::Io { .. } => StoreError::NotMade { dir: this.dir.to_path_buf(), cause: Box::new(cause) },
            other => other,
        };
        let there = || fs::exists(&format).map_err(StoreError::io("examine", &format)).map_err(not_made);
        if there()? {
            return this.checked();
        }
        if let Some(found) = foreign(&this.dir).map_err(not_made)? {
            // Another process may have made the store, and begun to fill it, since we looked.
            if there()? {
                return this.checked();
            }
            return Err(StoreError::NotEmpty { dir: this.dir.to_path_buf(), found });
        }
        this.make(&format).map_err(not_made)?;
        Ok(this)
    }

    fn make(&self, format: &Path) -> Result<(), StoreError> {
        for sub in DIRS {
            make_dir(&self.dir.join(sub))?;
        }
        // Two processes may get here at once; both write the same.
        let mut draft = self.draft()?;
        draft.write(FORMAT.as_bytes())?;
        draft.write(b"\n")?;
        draft.sync()?;
        draft.publish(format)?;
        sync_dir(&self.dir)
    }

    /// Opens the store in `dir`.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, StoreError> {
        Self { dir: Arc::new(dir.into()) }.checked()
    }

    fn checked(self) -> Result<Self, StoreError> {
        let path = self.dir.join("format");
        let found = match fs::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).trim_end().to_owned(),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Err(StoreError::NotAStore { dir: self.dir.to_path_buf() });
            }
            Err(e) => return Err(StoreError::io("read", &path)(e)),
        };
        if found != FORMAT {
            return Err(StoreError::Version { dir: self.dir.to_path_buf(), found, known: FORMAT });
        }
        Ok(self)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Keeps [`Store::gc`] away until the lease is dropped. Take one before the first chunk of an image and drop it after the tag is
    /// set, or after a disk that refers to the image was made. Waits for a `gc` under way.
    pub fn lease(&self) -> Result<Lease, StoreError> {
        match self.lock(FlockOperation::LockShared)? {
            Some(lock) => Ok(Lease { _lock: lock }),
            // Waiting ends with the lock; this is for the compiler.
            None => Err(StoreError::Busy { dir: self.dir.to_path_buf() }),
        }
    }

    /// Bytes that may still be written to the store's file system.
    pub fn free_space(&self) -> Result<u64, StoreError> {
        free_space(&self.dir)
    }

    /// Refuses, with both figures, when `needs` more bytes do not fit; `what` says what for ("the copy").
    pub fn need_space(&self, what: &'static str, needs: u64) -> Result<(), StoreError> {
        need_space(what, &self.dir, needs)
    }

    /// Makes everything added so far survive a power cut.
    pub fn sync(&self) -> Result<(), StoreError> {
        // One call for all the chunks of an image: syncing each would cost a journal commit per 64 KiB.
        File::open(&*self.dir).and_then(|dir| Ok(rustix::fs::syncfs(dir)?)).map_err(StoreError::io("sync", &self.dir))
    }

    fn lock(&self, operation: FlockOperation) -> Result<Option<Locked>, StoreError> {
        let path = self.dir.join("lock");
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .and_then(|file| Locked::take(file, operation))
            .map_err(StoreError::io("lock", &path))
    }

    fn draft(&self) -> Result<Draft, StoreError> {
        Draft::create(&self.dir.join("tmp"))
    }

    /// `{dir}/{kind}/ab/{hex}`
    fn content_path(&self, kind: &str, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        let mut path = self.dir.join(kind);
        path.push(&hex[..2]);
        path.push(hex);
        path
    }

    /// Moves damaged content out of the way, so that it counts as missing. `read` is the file that was found damaged: what
    /// somebody has put in its place in the meantime is left alone.
    fn set_aside(&self, path: &Path, read: &File) {
        use std::os::unix::fs::MetadataExt;
        let same = |a: &fs::Metadata, b: &fs::Metadata| a.ino() == b.ino() && a.dev() == b.dev();
        let (Ok(now), Ok(then)) = (fs::metadata(path), read.metadata()) else { return };
        if let (true, Some(name)) = (same(&now, &then), path.file_name()) {
            let mut aside = OsString::from("damaged-");
            aside.push(name);
            // A store that may only be read keeps its damaged file; the caller reports the damage in any case.
            let _ = fs::rename(path, self.dir.join("tmp").join(aside));
        }
    }
}

/// Something in `dir` that the making of a store, broken off anywhere, does not leave; `None` where there is nothing of
/// the kind, or no directory.
fn foreign(dir: &Path) -> Result<Option<String>, StoreError> {
    let names = |dir: &Path| match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry.map_err(StoreError::io("list", dir))?.file_name())).collect(),
        // Who goes on to make it is told, in better words, what is wrong with something that is no directory.
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(Vec::new()),
        Err(e) => Err(StoreError::io("list", dir)(e)),
    };
    for name in names(dir)? {
        // A file system that was made for the store has the first from the start; the second are keys that somebody put
        // there before anything could be run without them.
        if name == "lost+found" || name == "trust" {
            continue;
        }
        let sub = dir.join(&name);
        if !DIRS.iter().any(|known| name == *known) || !sub.is_dir() {
            return Ok(Some(name.to_string_lossy().into_owned()));
        }
        // Nothing is put into the directories before the version file is there, except for its own draft.
        let own = |inner: &OsString| name == "tmp" && inner.to_str().is_some_and(files::is_draft_name);
        if let Some(inner) = names(&sub)?.into_iter().find(|inner| !own(inner)) {
            return Ok(Some(Path::new(&name).join(inner).display().to_string()));
        }
    }
    Ok(None)
}
