//! Copying what an image lacks here, in two steps: what a start needs ([`begin`]), then the rest while VMs run ([`finish`]).
//!
//! The rest comes in the order in which earlier boots of the image read it, as far as that is known, and then from front to
//! back. Some batches of chunks are in flight at a time, so that memory is bounded by a few megabytes and the network does
//! not wait for the disk. What has landed is kept: after a break the copy goes on from there.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};

use bedplate_api::Digest;
use bedplate_api::client::Client;
use bedplate_api::image::{MAX_CHUNK_LIST, Manifest};
use bedplate_api::node::CopyProgress;
use bedplate_images::index::chunk_len;
use bedplate_images::{Store, StoreError};
use futures_util::StreamExt;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::fetch::{Fetcher, Urgency};
use super::{DISK_PART, ImageError, Images, KEEP_FREE, blocking, check};

/// Chunks per batch: 4 MiB before compression, so that progress moves and a break loses little.
const BATCH: usize = 64;
const _: () = assert!(BATCH <= MAX_CHUNK_LIST);
/// Bytes, before compression, after which what has landed is written to the disk while the copy goes on. Otherwise the system
/// leaves that to the sync at the end, which then takes a fifth of the whole time, and longer for what guests flush meanwhile.
const WRITE_OUT: u64 = 256 << 20;

/// Distinct chunks of some parts of an image with their lengths, and which of them lack.
struct Inventory {
    lengths: HashMap<Digest, u64>,
    missing: Vec<Digest>,
    total: u64,
}

impl Inventory {
    fn length(&self, digest: &Digest) -> u64 {
        self.lengths.get(digest).copied().unwrap_or(0)
    }

    fn lacking(&self) -> u64 {
        self.missing.iter().map(|digest| self.length(digest)).sum()
    }

    /// Moves the chunks `first` to the front, in their order.
    fn prefer(&mut self, first: Vec<Digest>) {
        let lacks: HashSet<Digest> = self.missing.iter().copied().collect();
        let mut taken = HashSet::new();
        let front: Vec<Digest> = first.into_iter().filter(|d| lacks.contains(d) && taken.insert(*d)).collect();
        let rest = self.missing.iter().copied().filter(|digest| !taken.contains(digest));
        self.missing = front.iter().copied().chain(rest).collect();
    }
}

/// Gets everything that a start of the image `digest` needs: manifest, indexes, kernel and initial RAM disk. Where there is
/// nowhere to get anything from, the whole image has to be here already.
pub(super) async fn begin(
    images: &Images,
    digest: Digest,
    progress: &watch::Sender<Option<CopyProgress>>,
) -> Result<Manifest, ImageError> {
    let (store, fetcher) = (&images.store, images.fetcher.as_deref());
    let for_lease = store.clone();
    let _lease = blocking(move || Ok(for_lease.lease()?)).await?;
    fetch_blob(store, fetcher, digest, digest).await?;
    let manifest = store.manifest(&digest)?;
    check(digest, &manifest)?;
    // Before much is copied.
    images.check_trust(digest).await?;
    for part in manifest.parts.values() {
        fetch_blob(store, fetcher, digest, part.index).await?;
    }
    let content: u64 = manifest.parts.values().map(|part| part.content).fold(0, u64::saturating_add);
    let roomy = store.need_space("copying the image", content.saturating_add(KEEP_FREE)).is_ok();
    if !roomy || fetcher.is_none() {
        let all = take_inventory(store, &manifest, |_| true).await?;
        if !all.missing.is_empty() {
            if fetcher.is_none() {
                return Err(ImageError::NoSource(digest));
            }
            // As much as they can take at most: compressed they take less, but nobody knows how much before they are here.
            store.need_space("copying the image", all.lacking().saturating_add(KEEP_FREE))?;
        }
    }
    let boot = take_inventory(store, &manifest, |part| part != DISK_PART).await?;
    if let Some(fetcher) = fetcher.filter(|_| !boot.missing.is_empty()) {
        fetch_chunks(store, fetcher, digest, &boot, Urgency::Guest, progress, content).await?;
    }
    Ok(manifest)
}

/// Gets the rest of the image `digest`, whose `manifest` and indexes are here, and names it so that it stays.
pub(super) async fn finish(
    images: &Images,
    digest: Digest,
    manifest: &Manifest,
    progress: &watch::Sender<Option<CopyProgress>>,
) -> Result<(), ImageError> {
    let store = &images.store;
    // One that was here whole when it began has nobody to get more from, and needs no name of ours.
    let Some(fetcher) = images.fetcher.as_deref() else { return Ok(()) };
    let for_lease = store.clone();
    let _lease = blocking(move || Ok(for_lease.lease()?)).await?;
    let mut all = take_inventory(store, manifest, |_| true).await?;
    if !all.missing.is_empty() {
        all.prefer(images.boot_order(digest).await?);
        fetch_chunks(store, fetcher, digest, &all, Urgency::Copy, progress, all.total).await?;
        let (repository, peers) = fetcher.received_mib();
        tracing::info!(
            "image {} is here whole; since its start this agent got {repository} MiB from the repository and {peers} MiB from \
             other nodes",
            digest.short()
        );
    }
    let for_tag = store.clone();
    blocking(move || Ok(for_tag.set_tag(&digest.hex(), &digest)?)).await
}

/// Gets the blob `wanted` of image `image` unless it is here.
async fn fetch_blob(store: &Store, fetcher: Option<&Fetcher>, image: Digest, wanted: Digest) -> Result<(), ImageError> {
    if store.has_blob(&wanted) {
        return Ok(());
    }
    let source = fetcher.ok_or(ImageError::NoSource(image))?.source();
    let bytes = match source.blob(&wanted).await {
        Err(e) if Client::is_not_found(&e) => return Err(ImageError::Unknown(image)),
        other => other?,
    };
    let store = store.clone();
    blocking(move || {
        store.need_space("copying the image's index", KEEP_FREE.saturating_add(bytes.len() as u64))?;
        Ok(store.put_blob_as(&wanted, &bytes)?)
    })
    .await
}

/// Looks which chunks of the parts that `counts` says are here.
async fn take_inventory(
    store: &Store,
    manifest: &Manifest,
    counts: impl Fn(&str) -> bool,
) -> Result<Inventory, ImageError> {
    let parts: Vec<_> = manifest.parts.iter().filter(|(name, _)| counts(name)).map(|(_, part)| part.clone()).collect();
    let store = store.clone();
    blocking(move || {
        let mut inventory = Inventory { lengths: HashMap::new(), missing: Vec::new(), total: 0 };
        for part in &parts {
            store.index(part)?.each(|number, chunk| {
                let len = chunk_len(part.size, number) as u64;
                if inventory.lengths.insert(chunk, len).is_none() {
                    inventory.total += len;
                    if !store.has_chunk(&chunk) {
                        inventory.missing.push(chunk);
                    }
                }
                Ok::<_, StoreError>(())
            })?;
        }
        Ok(inventory)
    })
    .await
}

/// Gets what `inventory` of `image` lacks; `total` is what progress is counted against.
async fn fetch_chunks(
    store: &Store,
    fetcher: &Fetcher,
    image: Digest,
    inventory: &Inventory,
    urgency: Urgency,
    progress: &watch::Sender<Option<CopyProgress>>,
    total: u64,
) -> Result<(), ImageError> {
    let done = AtomicU64::new(inventory.total - inventory.lacking());
    let report = |more: u64| {
        let done = done.fetch_add(more, Ordering::Relaxed) + more;
        progress.send_replace(Some(CopyProgress { done: done.min(total), total }));
    };
    report(0);
    let batches: Vec<Vec<Digest>> = inventory.missing.chunks(BATCH).map(<[Digest]>::to_vec).collect();
    let fetches = batches.into_iter().map(|batch| async move {
        fetcher.get(image, &batch, urgency).await?;
        Ok::<_, ImageError>(batch.iter().map(|digest| inventory.length(digest)).sum::<u64>())
    });
    let mut landing = futures_util::stream::iter(fetches).buffer_unordered(fetcher.limits().parallel.max(1));
    let (mut dirty, mut writing) = (0, None::<JoinHandle<Result<(), ImageError>>>);
    let mut landed = Ok(());
    while let Some(next) = landing.next().await {
        let bytes = match next {
            Ok(bytes) => bytes,
            Err(e) => {
                landed = Err(e);
                break;
            }
        };
        report(bytes);
        dirty += bytes;
        // Not waited for: what comes meanwhile goes with the next.
        if dirty >= WRITE_OUT && writing.as_ref().is_none_or(JoinHandle::is_finished) {
            dirty = 0;
            let store = store.clone();
            let next = tokio::spawn(blocking(move || Ok(store.sync()?)));
            if let Err(e) = written(writing.replace(next)).await {
                landed = Err(e);
                break;
            }
        }
    }
    // Also where the copy failed: what could not be written has to be known before anything of it counts.
    written(writing).await.and(landed)
}

/// A failure to write counts, because the next to sync is not told of it any more.
async fn written(writing: Option<JoinHandle<Result<(), ImageError>>>) -> Result<(), ImageError> {
    match writing {
        Some(writing) => writing.await.map_err(|_| ImageError::Aborted)?,
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_boots_read_comes_first_in_their_order_and_the_rest_follows() {
        let digest = |n: u8| Digest::from_bytes([n; 32]);
        let all: Vec<Digest> = (1..=6).map(digest).collect();
        let lengths = all.iter().map(|digest| (*digest, 10)).collect();
        let mut inventory = Inventory { lengths, missing: all[1..].to_vec(), total: 60 };
        assert_eq!(inventory.lacking(), 50);
        // The first is here already, one comes twice, one is of another image.
        inventory.prefer([5, 1, 3, 5, 99].map(digest).to_vec());
        assert_eq!(inventory.missing, [5, 3, 2, 4, 6].map(digest));
    }
}
