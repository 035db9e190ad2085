//! Taking out what nothing needs any more: mark and sweep.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use bedplate_api::Digest;
use bedplate_api::image::Swept;
use rustix::fs::FlockOperation;

use super::{Store, StoreError};

/// Drafts of a crashed process are older than this; a living one writes and renames within seconds.
const DRAFT_AGE: Duration = Duration::from_secs(60 * 60);

impl Store {
    /// Removes everything that neither a tag nor one of the images `live` needs. `live` are manifests that something other
    /// than a tag relies on: disks of VMs. Content younger than `grace` stays: it may belong to an upload that comes in
    /// pieces and holds no [`Store::lease`].
    ///
    /// Refuses to run while anybody holds a lease, and when a root cannot be read, because then nobody can say what it
    /// needs.
    pub fn gc(&self, live: &[Digest], grace: Duration) -> Result<Swept, StoreError> {
        self.gc_with(grace, || Ok(live.to_vec()))
    }

    /// The same; `live` is asked once no lease can be taken any more. So whoever takes a lease before resolving a name, and
    /// holds it until `live` knows of the image, loses nothing.
    pub fn gc_with<E: From<StoreError>>(
        &self,
        grace: Duration,
        live: impl FnOnce() -> Result<Vec<Digest>, E>,
    ) -> Result<Swept, E> {
        let Some(_lock) = self.lock(FlockOperation::NonBlockingLockExclusive)? else {
            return Err(StoreError::Busy { dir: self.dir().to_owned() }.into());
        };
        self.clear_scratch()?;
        let live = live()?;
        Ok(self.sweep_all(&live, grace)?)
    }

    fn sweep_all(&self, live: &[Digest], grace: Duration) -> Result<Swept, StoreError> {
        let needed = self.mark(live)?;
        let now = SystemTime::now();
        let mut swept = Swept::default();
        for kind in ["blobs", "chunks"] {
            let dir = self.dir().join(kind);
            for shard in list(&dir)? {
                self.sweep(
                    &shard.path(),
                    &mut swept,
                    |name, age| age >= grace && hex_digest(name).is_some_and(|digest| !needed.contains(&digest)),
                    now,
                )?;
            }
        }
        let orders = self.dir().join("orders");
        if orders.is_dir() {
            let condemned = |name: &str, _| hex_digest(name).is_some_and(|digest| !needed.contains(&digest));
            self.sweep(&orders, &mut swept, condemned, now)?;
        }
        self.sweep(&self.dir().join("tmp"), &mut swept, |_, age| age >= DRAFT_AGE, now)?;
        Ok(swept)
    }

    fn mark(&self, live: &[Digest]) -> Result<HashSet<Digest>, StoreError> {
        let mut needed = HashSet::new();
        let tagged = self.tags()?.into_iter().map(|(_, digest)| digest);
        for root in tagged.chain(live.iter().copied()) {
            if !needed.insert(root) {
                continue;
            }
            for part in self.manifest(&root)?.parts.values() {
                if needed.insert(part.index) {
                    self.index(part)?.each(|_, chunk| {
                        needed.insert(chunk);
                        Ok::<_, StoreError>(())
                    })?;
                }
            }
        }
        Ok(needed)
    }

    /// Removes the files in `dir` that `condemned` says, by name and age.
    fn sweep(
        &self,
        dir: &Path,
        swept: &mut Swept,
        condemned: impl Fn(&str, Duration) -> bool,
        now: SystemTime,
    ) -> Result<(), StoreError> {
        for entry in list(dir)? {
            let path = entry.path();
            let meta = match entry.metadata() {
                Ok(meta) => meta,
                // Published or removed since the directory was listed.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(StoreError::io("examine", &path)(e)),
            };
            // A file from the future is young.
            let age = meta.modified().ok().and_then(|time| now.duration_since(time).ok()).unwrap_or_default();
            let name = entry.file_name();
            if meta.is_file() && name.to_str().is_some_and(|name| condemned(name, age)) {
                match fs::remove_file(&path) {
                    Ok(()) => {
                        swept.removed += 1;
                        swept.bytes += meta.len();
                    }
                    // A reader has just found it damaged, and set it aside.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => return Err(StoreError::io("remove", &path)(e)),
                }
            }
        }
        Ok(())
    }
}

fn list(dir: &Path) -> Result<Vec<fs::DirEntry>, StoreError> {
    fs::read_dir(dir).and_then(Iterator::collect).map_err(StoreError::io("list", dir))
}

fn hex_digest(name: &str) -> Option<Digest> {
    format!("blake3:{name}").parse().ok()
}
