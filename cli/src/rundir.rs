//! Directories of VMs that `bedplate run` starts, beside the images that their disks are children of.
//!
//! ```text
//! {store}/runs/{name}-{process id}/   one run: lock, kernel, initrd, the VMM's files, and the disk unless it is kept
//! {store}/disks/{name}/               a persistent disk, and nothing else
//! {store}/lab-disks/{name}.raw        a persistent disk of `run --lab`
//! ```
//!
//! A run's directory goes with the run. Where the process was killed it stays, unlocked, and the next one sweeps it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use bedplate_api::Digest;
use bedplate_images::Store;
use bedplate_images::disk::Disk;
use rustix::fs::{FlockOperation, flock};

use crate::net;

const RUNS: &str = "runs";
const DISKS: &str = "disks";
const LAB_DISKS: &str = "lab-disks";
const LOCK: &str = "lock";
/// The disk in a run's directory.
pub const DISK: &str = "disk";

/// A directory that cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}: {source}", path.display())]
pub struct RunDirError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The directory of one run; removed when dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Held as long as the run lasts.
    _lock: File,
}

impl RunDir {
    /// Makes one for a VM called `name`, after removing what killed runs left.
    ///
    /// # Errors
    /// The store's file system refuses.
    pub fn create(store: &Path, name: &str) -> Result<Self, RunDirError> {
        sweep(store);
        let path = store.join(RUNS).join(format!("{name}-{}", std::process::id()));
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| RunDirError { what, path, source }
        };
        fs::create_dir_all(&path).map_err(failed("create", &path))?;
        let lock_path = path.join(LOCK);
        let lock = File::create(&lock_path).map_err(failed("create", &lock_path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(io::Error::from)
            .map_err(failed("lock", &lock_path))?;
        Ok(Self { path, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next run.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Where the persistent disk of the VM `name` is, or will be.
///
/// # Errors
/// It is a shared one, which cannot be reached.
pub fn persistent_disk(store: &Path, name: &str) -> Result<PathBuf, RunDirError> {
    let path = store.join(DISKS).join(name);
    match fs::read_link(&path) {
        Ok(shared) => fs::canonicalize(&shared).map_err(|source| RunDirError { what: "reach", path: shared, source }),
        Err(_) => Ok(path),
    }
}

/// Makes the directory `shared`, which other machines mount too, that of the persistent disk of the VM `name`: a link among
/// the disks keeps its image alive here.
///
/// # Errors
/// The VM has another disk; a file system refuses.
pub fn shared_disk(store: &Path, name: &str, shared: &Path) -> Result<PathBuf, RunDirError> {
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |source| RunDirError { what, path, source }
    };
    fs::create_dir_all(shared).map_err(failed("create", shared))?;
    let real = fs::canonicalize(shared).map_err(failed("reach", shared))?;
    let link = store.join(DISKS).join(name);
    fs::create_dir_all(store.join(DISKS)).map_err(failed("create", &store.join(DISKS)))?;
    match std::os::unix::fs::symlink(&real, &link) {
        Ok(()) => Ok(real),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && fs::read_link(&link).is_ok_and(|old| old == real) => {
            Ok(real)
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let other = io::Error::new(e.kind(), "the VM of this name has another disk, so choose another with --name");
            Err(failed("make", &link)(other))
        }
        Err(e) => Err(failed("make", &link)(e)),
    }
}

/// Where the persistent disk of the VM `name` in the lab is: another format, so another disk.
pub fn persistent_lab_disk(store: &Path, name: &str) -> PathBuf {
    store.join(LAB_DISKS).join(format!("{name}.raw"))
}

/// Removes the directories, and the networks, of runs whose process is gone.
fn sweep(store: &Path) {
    for dir in children(&store.join(RUNS)) {
        // A directory without a lock is being made or removed at this moment; the next sweep decides.
        let Ok(lock) = File::open(dir.join(LOCK)) else { continue };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            net::remove_stale(&dir);
            let _ = fs::remove_dir_all(&dir);
        }
    }
}

/// The images that disks of VMs are children of: besides names, what keeps content alive.
///
/// # Errors
/// A shared disk cannot be read, so that nobody knows what it needs.
pub fn images_in_use(store: &Store) -> Result<Vec<Digest>, RunDirError> {
    let runs = children(&store.dir().join(RUNS)).into_iter().map(|dir| dir.join(DISK));
    let disks = children(&store.dir().join(DISKS));
    let mut images = Vec::new();
    for dir in runs.chain(disks) {
        match Disk::spec_of(&dir) {
            Ok(spec) => images.push(spec.image),
            // A directory that is no disk, whole, needs nothing; behind a link may be a file system that is not mounted.
            Err(error) if dir.is_symlink() => {
                let message = format!("{error}; mount what it is on, or remove the link if the disk is gone");
                return Err(RunDirError {
                    what: "know what image is needed by",
                    path: dir,
                    source: io::Error::other(message),
                });
            }
            Err(_) => {}
        }
    }
    Ok(images)
}

fn children(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_shared_disk_needs_stays_also_while_it_cannot_be_reached() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(dir.path().join("store")).unwrap();
        let mounted = dir.path().join("mounted");
        let real = shared_disk(store.dir(), "db", &mounted).unwrap();
        assert_eq!(real, fs::canonicalize(&mounted).unwrap());
        assert_eq!(persistent_disk(store.dir(), "db").unwrap(), real);
        shared_disk(store.dir(), "db", &mounted).unwrap();
        let other = shared_disk(store.dir(), "db", &dir.path().join("other")).unwrap_err().to_string();
        assert!(other.contains("another disk"), "{other}");
        fs::remove_dir(&mounted).unwrap();
        assert!(persistent_disk(store.dir(), "db").unwrap_err().to_string().contains("cannot reach"));
        let refused = images_in_use(&store).unwrap_err().to_string();
        assert!(refused.contains("mount what it is on"), "{refused}");
    }

    #[test]
    fn a_run_leaves_nothing_and_a_killed_one_is_swept() {
        let store = tempfile::tempdir().unwrap();
        let dead = store.path().join("runs/old-1");
        fs::create_dir_all(dead.join("disk")).unwrap();
        fs::write(dead.join(LOCK), "").unwrap();
        let run = RunDir::create(store.path(), "web").unwrap();
        assert!(!dead.exists(), "left by a killed run");
        let path = run.path().to_owned();
        fs::write(path.join("kernel"), "x").unwrap();
        sweep(store.path());
        assert!(path.join("kernel").exists(), "a living run");
        drop(run);
        assert!(!path.exists());
    }
}
