//! A VM's disk: a writable child of an image.
//!
//! ```text
//! disk.json   what it is a child of (see [`Spec`]); written last when a disk is made, never changed
//! data        the clusters that were written, each at its own offset; holes elsewhere
//! map         two bits per cluster: in the image, in `data`, or zeros
//! ```
//!
//! One process at a time has a disk open: the directory is locked (`flock`) while a [`Disk`] lives. The owner is one
//! thread, the block device's. What was flushed survives `kill -9` and power cuts; how is written in `overlay.rs`. A
//! *shared* disk is in a directory that several nodes mount; instead of the lock it has a lease, see `lease.rs`.
//!
//! A *non-persistent* disk starts from the image each time it is opened.

mod backing;
mod base;
mod fork;
mod lease;
mod map;
mod overlay;
#[cfg(test)]
mod power_tests;
mod record;
mod snapshot;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bedplate_api::Digest;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::manifest::DISK;
use crate::store::{Locked, Store, StoreError, sync_dir};
pub use lease::{Holder, LeaseError};
use lease::{IfHeld, Lease};
use map::{CLUSTER, Map};
use overlay::Overlay;
pub use snapshot::ReceiveError;

/// The version of `disk.json` and `map` that this program writes and reads.
const SCHEMA: u32 = 1;

/// Bytes that are read of `disk.json`, which is far shorter: a VMM may write there, and on a shared disk other nodes.
const MAX_SPEC: u64 = 64 << 10;

/// Whether what a guest wrote is there after a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Yes.
    Persistent,
    /// No: every time the disk is opened it is the image again.
    NonPersistent,
}

/// `disk.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Version of the directory's format.
    pub schema: u32,
    /// Digest of the manifest of the image that this is a child of.
    pub image: Digest,
    /// Absolute path of the store that has the image.
    pub store: PathBuf,
    /// Size in bytes.
    pub size: u64,
    /// Bytes per entry of the map, 4096.
    pub cluster: u64,
    /// Whether writes are kept.
    pub mode: Mode,
    /// Several nodes can reach the directory: who opens the disk takes its lease. Such a disk is persistent.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
}

/// Why a disk cannot be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Its image.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Made before.
    #[error("{dir} is a disk already: open it, or remove the directory to start anew")]
    Exists {
        /// The directory.
        dir: PathBuf,
    },
    /// Never made, or only by half.
    #[error("{dir} is not a disk (it has no disk.json): create one there")]
    NotADisk {
        /// The directory.
        dir: PathBuf,
    },
    /// Locked.
    #[error("the disk {dir} is open in another process: stop the VM that uses it first")]
    InUse {
        /// The directory.
        dir: PathBuf,
    },
    /// Only a shared disk has a lease.
    #[error("{dir} is a disk of this node alone: it can be opened here and not taken over")]
    NotShared {
        /// The directory.
        dir: PathBuf,
    },
    /// A shared disk is not reset while it is open.
    #[error("{dir} is shared by several nodes and cannot be reset: make a new one in another directory")]
    SharedReset {
        /// The directory.
        dir: PathBuf,
    },
    /// Whoever has it open may write to it.
    #[error("{dir} is shared by several nodes and cannot be copied while it is in use: open it, and capture that")]
    SharedSnapshot {
        /// The directory.
        dir: PathBuf,
    },
    /// A shared disk whose lease cannot be had.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// `disk.json` does not say what it must.
    #[error("{path} is damaged or of a later version ({cause}): restore it, or remove the disk and create it again")]
    BadSpec {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// `map` or `data` cannot be relied on.
    #[error("{path} is damaged ({cause}): restore the disk from a backup, or remove it and create it again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// The operating system said no.
    #[error("cannot {what} {path}: {cause}")]
    Io {
        /// A verb.
        what: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
}

impl DiskError {
    /// Whether a file system is full.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Store(error) => error.is_full(),
            Self::Io { cause, .. } => matches!(cause.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded),
            _ => false,
        }
    }
}

fn io_at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    move |cause| DiskError::Io { what, path: path.to_owned(), cause }
}

/// What keeps everybody else from the disk.
#[derive(Debug)]
enum Hold {
    /// The directory itself, locked.
    Local(#[allow(dead_code, reason = "held, not read")] Locked),
    Shared(Lease),
}

/// An open disk.
///
/// Offsets and lengths are in bytes, of any alignment. A request past the end fails with `InvalidInput` and changes
/// nothing. A chunk of the image that is missing fails with `NotFound`, one that is damaged with `InvalidData`, both with
/// a [`StoreError`] inside that names image, part, chunk and file; a full host disk with `StorageFull`, after which
/// everything reads as before the request or as it asked, cluster by cluster.
#[derive(Debug)]
pub struct Disk {
    overlay: Overlay<File, base::Image>,
    spec: Spec,
    dir: PathBuf,
    /// Goes last: after it, somebody else may have the disk.
    hold: Hold,
}

impl Disk {
    /// Makes the directory `dir` a disk that is a child of the image `image` of `store`, and opens it. A directory left by
    /// a creation that was interrupted is used again.
    pub fn create(dir: &Path, store: &Store, image: &Digest, mode: Mode) -> Result<Self, DiskError> {
        let size = store.part(image, DISK)?.size();
        fs::create_dir_all(dir).map_err(io_at("create", dir))?;
        let lock = lock_dir(dir)?;
        let spec_path = dir.join("disk.json");
        if fs::exists(&spec_path).map_err(io_at("examine", &spec_path))? {
            return Err(DiskError::Exists { dir: dir.to_owned() });
        }
        let spec = make_files(dir, store, image, size, mode, false)?;
        Self::open_local(dir, spec, lock)
    }

    /// Makes the directory `dir`, which several nodes mount, a persistent disk that is a child of the image `image` of
    /// `store`, and opens it for `holder`, as [`Disk::open_shared`] does. Each node that is to open it has that store, at
    /// the same path. A directory left by a creation that was interrupted has to be removed.
    pub fn create_shared(dir: &Path, store: &Store, image: &Digest, holder: &Holder) -> Result<Self, DiskError> {
        let size = store.part(image, DISK)?.size();
        fs::create_dir_all(dir).map_err(io_at("create", dir))?;
        let exists = fs::exists(dir.join("disk.json")).map_err(io_at("examine", dir))?;
        match if exists { Err(io::ErrorKind::AlreadyExists.into()) } else { Lease::create(dir) } {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(DiskError::Exists { dir: dir.to_owned() });
            }
            Err(e) => return Err(io_at("create a lease in", dir)(e)),
        }
        make_files(dir, store, image, size, Mode::Persistent, true)?;
        Lease::created(dir)?;
        Self::open_shared(dir, holder)
    }

    /// Opens the disk in `dir`, which nobody else can open until this is dropped.
    ///
    /// A shared disk is opened for [`Holder::this_host`]. No thread is left behind: its lease is renewed by each flush and
    /// by [`Disk::renew`] alone, and who does neither for longer than the period may find it taken over.
    pub fn open(dir: &Path) -> Result<Self, DiskError> {
        let spec = Self::spec_of(dir)?;
        if spec.shared {
            return Self::open_leased(dir, spec, &Holder::this_host()?, IfHeld::Refuse, false);
        }
        let lock = lock_dir(dir)?;
        Self::open_local(dir, spec, lock)
    }

    /// Opens the shared disk in `dir` for `holder`, and renews its lease by a thread of its own. While another holder has
    /// it, this fails with [`LeaseError::Held`]. A holder of the same name whose process is dead is no obstacle.
    pub fn open_shared(dir: &Path, holder: &Holder) -> Result<Self, DiskError> {
        Self::open_leased(dir, Self::spec_of(dir)?, holder, IfHeld::Refuse, true)
    }

    /// Like [`Disk::open_shared`], but where another holder has the disk, watches him for his period and takes it, with
    /// everything that he flushed, if he gave no sign of life. He will find his flushes failing. This takes time, and where
    /// the file system has no reflinks, space for another copy of what was written.
    pub fn take_over(dir: &Path, holder: &Holder) -> Result<Self, DiskError> {
        Self::open_leased(dir, Self::spec_of(dir)?, holder, IfHeld::TakeOver, true)
    }

    fn open_local(dir: &Path, spec: Spec, lock: Locked) -> Result<Self, DiskError> {
        if spec.mode == Mode::NonPersistent {
            reset(dir, &spec)?;
        }
        let overlay = open_overlay(dir, 0, &spec)?;
        Ok(Self { overlay, spec, dir: dir.to_owned(), hold: Hold::Local(lock) })
    }

    fn open_leased(dir: &Path, spec: Spec, holder: &Holder, if_held: IfHeld, timer: bool) -> Result<Self, DiskError> {
        if !spec.shared {
            return Err(DiskError::NotShared { dir: dir.to_owned() });
        }
        let mut lease = Lease::take(dir, holder, if_held)?;
        if timer || lease.fork().is_some() {
            lease.start_timer()?;
        }
        if let Some(epochs) = lease.fork() {
            fork::make(dir, spec.size, epochs, || lease.current())?;
        }
        if !timer {
            // Renewing while files were copied was all that it was there for.
            lease.stop_timer();
        }
        lease.ready()?;
        let overlay = open_overlay(dir, lease.files(), &spec)?;
        Ok(Self { overlay, spec, dir: dir.to_owned(), hold: Hold::Shared(lease) })
    }

    /// What `disk.json` in `dir` says, without opening the disk: for who must know which image it needs.
    pub fn spec_of(dir: &Path) -> Result<Spec, DiskError> {
        let path = dir.join("disk.json");
        let bad = |cause: String| DiskError::BadSpec { path: path.clone(), cause };
        let mut bytes = Vec::new();
        let read = fork::no_links().read(true).open(&path).and_then(|file| file.take(MAX_SPEC).read_to_end(&mut bytes));
        match read {
            Ok(_) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Err(DiskError::NotADisk { dir: dir.to_owned() });
            }
            Err(e) => return Err(io_at("read", &path)(e)),
        }
        let spec: Spec = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
        if spec.schema != SCHEMA {
            return Err(bad(format!("schema {}, and this program knows {SCHEMA}", spec.schema)));
        }
        if spec.cluster != CLUSTER {
            return Err(bad(format!("clusters of {} bytes, and this program knows {CLUSTER}", spec.cluster)));
        }
        if spec.shared && spec.mode != Mode::Persistent {
            return Err(bad("a shared disk is persistent".to_owned()));
        }
        Ok(spec)
    }

    /// What it is a child of.
    pub const fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Size in bytes.
    pub const fn size(&self) -> u64 {
        self.overlay.size()
    }

    /// Bytes that the guest has written and that are kept apart from the image.
    pub fn written(&self) -> u64 {
        self.overlay.map().data_clusters() * CLUSTER
    }

    /// From now on notes which chunks of the image are read, or no longer: see [`Disk::take_loaded`].
    pub fn note_loads(&mut self, noted: bool) {
        self.overlay.base_mut().note_loads(noted);
    }

    /// Numbers of the image's chunks that were read from the store since the last call, in order: a chunk comes again
    /// when it had left memory. Some are left out if this is not called after each request.
    pub fn take_loaded(&mut self) -> Vec<u64> {
        self.overlay.base_mut().take_loaded()
    }

    /// Number of the chunk that an error of this disk is about, where it is missing from the store or was found damaged:
    /// once the store has it, the same request fares better.
    pub fn lacks_chunk(error: &io::Error) -> Option<u64> {
        error.get_ref()?.downcast_ref::<StoreError>()?.lacks_chunk()
    }

    /// The first `most` chunks of the image, by number, that the range needs and that are not in the store.
    pub fn missing(&self, offset: u64, len: u64, most: usize) -> Result<Vec<u64>, StoreError> {
        let mut missing = Ok(Vec::new());
        self.overlay.each_base_range(offset, len, |start, end| {
            let Ok(found) = &mut missing else { return };
            match self.overlay.base().missing(start, end, most - found.len()) {
                // Two ranges may lie in one chunk.
                Ok(more) => more.into_iter().for_each(|number| {
                    if found.last() != Some(&number) {
                        found.push(number);
                    }
                }),
                Err(error) => missing = Err(error),
            }
        });
        missing
    }

    /// Fills `bytes` from `offset`.
    pub fn read_at(&mut self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        if let Hold::Shared(lease) = &self.hold {
            lease.current().map_err(io::Error::other)?;
        }
        self.overlay.read_at(bytes, offset)
    }

    /// Writes `bytes` at `offset`. They survive `kill -9` and power cuts after the next [`Disk::flush`].
    pub fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.writable()?;
        self.overlay.write_at(bytes, offset)
    }

    /// Returns when everything written so far survives a power cut; on a shared disk, also whatever another node does.
    /// There it fails for good once the disk was taken over, with a [`LeaseError`] inside.
    pub fn flush(&mut self) -> io::Result<()> {
        let Hold::Shared(lease) = &self.hold else { return self.overlay.flush() };
        lease.current().map_err(io::Error::other)?;
        self.overlay.flush()?;
        // Last: whoever claims the lease after this copies what was just synced.
        lease.renew().map_err(io::Error::other)
    }

    /// Gives the space of a range back; it reads as zeros from then on.
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        // With a map that knows zeros there is nothing that a discard could do more cheaply.
        self.write_zeroes(offset, len)
    }

    /// Makes a range read as zeros.
    pub fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.writable()?;
        self.overlay.write_zeroes(offset, len)
    }

    /// Forgets everything written: the disk is the image again. Not for a shared disk.
    pub fn reset(&mut self) -> Result<(), DiskError> {
        if let Hold::Shared(_) = &self.hold {
            // It would change files under whoever takes the disk over meanwhile.
            return Err(DiskError::SharedReset { dir: self.dir.clone() });
        }
        reset(&self.dir, &self.spec)?;
        self.overlay = open_overlay(&self.dir, 0, &self.spec)?;
        Ok(())
    }

    /// How often [`Disk::renew`] is to be called; `None` for a disk of this node alone.
    pub fn renewal(&self) -> Option<Duration> {
        match &self.hold {
            Hold::Local(_) => None,
            Hold::Shared(lease) => Some(lease.renewal()),
        }
    }

    /// Renews a shared disk's lease, which whoever opened it with [`Disk::open`] does several times per period.
    pub fn renew(&self) -> Result<(), LeaseError> {
        match &self.hold {
            Hold::Local(_) => Ok(()),
            Hold::Shared(lease) => lease.renew(),
        }
    }

    fn writable(&self) -> io::Result<()> {
        match &self.hold {
            Hold::Local(_) => Ok(()),
            Hold::Shared(lease) => lease.writable().map_err(io::Error::other),
        }
    }
}

impl Drop for Disk {
    /// A VM that ends without a last flush keeps what its disk has acknowledged, as with a file.
    fn drop(&mut self) {
        // Who needs to know whether this works calls `flush`.
        let _ = self.flush();
    }
}

fn lock_dir(dir: &Path) -> Result<Locked, DiskError> {
    let file = match File::open(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(DiskError::NotADisk { dir: dir.to_owned() }),
        opened => opened.map_err(io_at("open", dir))?,
    };
    let lock = Locked::take(file, FlockOperation::NonBlockingLockExclusive).map_err(io_at("lock", dir))?;
    lock.ok_or_else(|| DiskError::InUse { dir: dir.to_owned() })
}

/// Makes the files of a disk, `disk.json` last.
fn make_files(
    dir: &Path,
    store: &Store,
    image: &Digest,
    size: u64,
    mode: Mode,
    shared: bool,
) -> Result<Spec, DiskError> {
    for (name, len) in [("data", size), ("map", Map::file_len(size))] {
        let path = dir.join(name);
        let mut options = if shared { fork::no_links() } else { File::options() };
        let made = options
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .and_then(|file| file.set_len(len).and_then(|()| file.sync_all()));
        made.map_err(io_at("create", &path))?;
    }
    let store = fs::canonicalize(store.dir()).map_err(io_at("examine", store.dir()))?;
    let spec = Spec { schema: SCHEMA, image: *image, store, size, cluster: CLUSTER, mode, shared };
    write_spec(&spec, &dir.join("disk.json"))?;
    sync_dir(dir)?;
    Ok(spec)
}

fn write_spec(spec: &Spec, path: &Path) -> Result<(), DiskError> {
    let mut bytes = serde_json::to_vec_pretty(spec)
        .map_err(|e| DiskError::BadSpec { path: path.to_owned(), cause: e.to_string() })?;
    bytes.push(b'\n');
    // The directory is locked, so nobody else uses this name.
    let draft = path.with_extension("json.tmp");
    fork::no_links()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&draft)
        .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&draft, path))
        .map_err(io_at("write", path))
}

/// The map goes first: without it, whatever is left in `data` is not looked at.
fn reset(dir: &Path, spec: &Spec) -> Result<(), DiskError> {
    for (name, len) in [("map", Map::file_len(spec.size)), ("data", spec.size)] {
        let path = dir.join(name);
        fork::no_links()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(0).and_then(|()| file.set_len(len)).and_then(|()| file.sync_all()))
            .map_err(io_at("reset", &path))?;
    }
    Ok(())
}

fn open_overlay(dir: &Path, files: u64, spec: &Spec) -> Result<Overlay<File, base::Image>, DiskError> {
    let reader = Store::open(&spec.store)?.part(&spec.image, DISK)?;
    let damaged = |path: PathBuf, cause: String| DiskError::Damaged { path, cause };
    if reader.size() != spec.size {
        return Err(damaged(
            dir.join("disk.json"),
            format!("it says {} bytes and the image has {}", spec.size, reader.size()),
        ));
    }
    let file = |name: &str, len: u64| -> Result<File, DiskError> {
        let path = fork::path(dir, name, files);
        let mut options = if spec.shared { fork::no_links() } else { File::options() };
        let file = options.read(true).write(true).open(&path).map_err(io_at("open", &path))?;
        let found = file.metadata().map_err(io_at("examine", &path))?.len();
        if found != len {
            return Err(damaged(path, format!("it has {found} bytes and should have {len}")));
        }
        Ok(file)
    };
    let (data, map_file) = (file("data", spec.size)?, file("map", Map::file_len(spec.size))?);
    let map =
        Map::load(&map_file, spec.size).map_err(io_at("read", &fork::path(dir, "map", files)))?.map_err(|cluster| {
            damaged(fork::path(dir, "map", files), format!("the sector of cluster {cluster} fails its checksum"))
        })?;
    Ok(Overlay::new(spec.size, data, map_file, map, base::Image::new(reader)))
}
