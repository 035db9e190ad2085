//! From a registry to the local store. Of the packs only what is missing is read, by range; every chunk is verified as it
//! is kept, so a pull that broke off goes on where it stopped.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Mutex;

use bedplate_api::Digest;
use bedplate_images::pack::Entry;
use bedplate_images::pack::oci::{self, Artifact, Descriptor};
use bedplate_images::store::is_tag_name;
use bedplate_images::{CHUNK_SIZE, Store, StoreError};
use futures_util::{StreamExt, TryStreamExt};
use oci_client::RegistryOperation;

use super::{Registry, RegistryArgs, RegistryError};
use crate::image::{Error, note_moved, print_one};
use crate::output::{self, Format};
use crate::progress::Progress;

/// Packs read at a time, so that the network does not wait for the disk. Each holds a frame or two.
const IN_FLIGHT: usize = 4;

/// Bytes between two wanted frames that are read and dropped rather than asked for anew: a request costs as much.
const MAX_GAP: u64 = 128 << 10;

pub(in crate::image) fn run(
    store: &Store,
    from: &str,
    to: Option<String>,
    args: &RegistryArgs,
    format: Format,
) -> Result<(), Error> {
    let lease = store.lease()?;
    let registry = Registry::open(from, args)?;
    let tag = to.unwrap_or_else(|| registry.short_name().to_owned());
    // Better said before the work than after it.
    if !is_tag_name(&tag) {
        return Err(StoreError::TagName(tag).into());
    }
    let digest = registry.runtime.block_on(registry.fetch(store))?;
    let before = store.tag(&tag).ok();
    store.set_tag(&tag, &digest)?;
    drop(lease);
    note_moved(&tag, before, &digest);
    Ok(print_one(&store.summary(&tag)?, format)?)
}

/// What is still to come.
struct Missing {
    chunks: Mutex<HashSet<Digest>>,
    received: Mutex<u64>,
}

impl Missing {
    /// Takes those of `entries` that are missing, in the order of their places: nobody else fetches them then.
    fn claim(&self, entries: &[Entry]) -> Vec<Entry> {
        // Poisoned only by a panic, which ends the process.
        let mut missing = self.chunks.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        entries.iter().filter(|entry| missing.remove(&entry.digest)).copied().collect()
    }

    fn is_empty(&self) -> bool {
        self.chunks.lock().is_ok_and(|missing| missing.is_empty())
    }
}

impl Registry {
    async fn fetch(&self, store: &Store) -> Result<Digest, RegistryError> {
        self.log_in(RegistryOperation::Pull).await?;
        let pulled = self.client.pull_manifest_raw(&self.reference, &self.auth, &[oci::OCI_MANIFEST]).await;
        let artifact = Artifact::parse(&pulled.map_err(self.talk("pull"))?.0).map_err(self.oci())?;
        let bytes = self.blob(&artifact.manifest).await?;
        let image = bedplate_images::digest_of(&bytes);
        let refused = |cause| RegistryError::Oci { image: self.image(), cause };
        let manifest = bedplate_images::manifest::parse(&bytes).map_err(|e| refused(e.into()))?;
        artifact.check_parts(&manifest).map_err(refused)?;
        for ((name, part), descriptor) in manifest.parts.iter().zip(&artifact.indexes) {
            if !store.has_blob(&part.index) {
                let packed = self.blob(descriptor).await?;
                let index = oci::unpack_index(&packed, name, part.size).map_err(refused)?;
                store.put_blob_as(&part.index, &index)?;
            }
        }
        store.put_blob_as(&image, &bytes)?;
        if let Some(signature) = &artifact.signature {
            store.put_signature(&image, signature)?;
        }
        let chunks = store.distinct_chunks(&image)?;
        let missing = store.missing(&chunks);
        store.need_space("the pull", missing.len() as u64 * CHUNK_SIZE as u64)?;
        let progress = Progress::new(format!("pull {}", self.short_name()), missing.len() as u64 * CHUNK_SIZE as u64);
        let fetched = missing.len();
        let missing = Missing { chunks: Mutex::new(missing.into_iter().collect()), received: Mutex::new(0) };
        let packs = artifact.packs.iter().map(|pack| self.fetch_pack(store, pack, &missing, &progress));
        futures_util::stream::iter(packs).buffer_unordered(IN_FLIGHT).try_collect::<()>().await?;
        let left = missing.chunks.lock().map_or(0, |missing| missing.len());
        if left > 0 {
            return Err(RegistryError::Missing { image: self.image(), count: left });
        }
        let received = missing.received.lock().map_or(0, |bytes| *bytes);
        let all = chunks.len();
        progress.finish(&format!("{fetched} of {all} chunks fetched ({})", output::bytes(received)));
        Ok(image)
    }

    async fn fetch_pack(
        &self,
        store: &Store,
        pack: &Descriptor,
        missing: &Missing,
        progress: &Progress,
    ) -> Result<(), RegistryError> {
        if missing.is_empty() {
            return Ok(());
        }
        let table = self.table(pack).await?;
        let wanted = missing.claim(table.entries());
        for run in runs(&wanted) {
            let entries = &wanted[run];
            let (Some(first), Some(last)) = (entries.first(), entries.last()) else { continue };
            let len = last.offset + u64::from(last.len) - first.offset;
            let mut pieces = self.range(&pack.digest, first.offset, len).await?;
            for entry in entries {
                let frame = self.take(&pack.digest, &mut pieces, entry.offset, entry.len as usize).await?;
                if let Ok(mut received) = missing.received.lock() {
                    *received += frame.len() as u64;
                }
                let (store, digest) = (store.clone(), entry.digest);
                let kept = tokio::task::spawn_blocking(move || store.put_frame(&digest, &frame)).await;
                // It was not aborted, and passes its panic on.
                kept.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))
                    .map_err(|e| self.refused_frame(pack, e))?;
                progress.add(CHUNK_SIZE as u64);
            }
        }
        Ok(())
    }

    /// Names the pack that a bad frame came from.
    fn refused_frame(&self, pack: &Descriptor, error: StoreError) -> RegistryError {
        match error {
            StoreError::FrameRefused { .. } => RegistryError::Talk {
                what: "use a chunk of",
                image: self.image(),
                cause: format!("{error} (pack {})", pack.digest),
                hint: "",
            },
            other => other.into(),
        }
    }
}

/// Groups entries, sorted by place, that are worth one request.
fn runs(entries: &[Entry]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (number, entry) in entries.iter().enumerate() {
        match (runs.last_mut(), number.checked_sub(1).map(|before| entries[before])) {
            (Some(run), Some(before)) if entry.offset - (before.offset + u64::from(before.len)) <= MAX_GAP => {
                run.end = number + 1;
            }
            _ => runs.push(number..number + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_frames_are_one_request_and_far_ones_are_not() {
        let entry = |offset| Entry { digest: Digest::ZERO, offset, len: 100 };
        let entries = [0, 100, 100 + MAX_GAP, 201 + 2 * MAX_GAP + 100, 5 << 20].map(entry);
        assert_eq!(runs(&entries), [0..3, 3..4, 4..5]);
        assert!(runs(&[]).is_empty());
    }
}
