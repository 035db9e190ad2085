//! Copying what an image lacks here: its manifest, the indexes that it names, the chunks that they name.
//!
//! Four batches of chunks are in flight at a time, so that memory is bounded by a few megabytes and the network does not
//! wait for the disk. What has landed is kept: after a break the copy goes on from there.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};

use bedplate_api::Digest;
use bedplate_api::client::Client;
use bedplate_api::image::{MAX_CHUNK_LIST, Manifest};
use bedplate_api::node::CopyProgress;
use bedplate_images::index::chunk_len;
use bedplate_images::{Store, StoreError};
use futures_util::{StreamExt, TryStreamExt};
use tokio::sync::watch;

use super::{ImageError, blocking, check};

/// Batches in flight.
const IN_FLIGHT: usize = 4;
/// Chunks per batch: 4 MiB before compression, so that progress moves and a break loses little.
const BATCH: usize = 64;
const _: () = assert!(BATCH <= MAX_CHUNK_LIST);
/// Never fill a disk to the last byte: others write there too.
const KEEP_FREE: u64 = 64 << 20;

/// Distinct chunks of an image with their lengths, and which of them lack.
struct Inventory {
    lengths: HashMap<Digest, u64>,
    missing: Vec<Digest>,
    total: u64,
}

/// Completes the image `digest` in `store` from `source`, and names it so that it stays.
pub(super) async fn complete(
    store: &Store,
    source: Option<&Client>,
    digest: Digest,
    progress: &watch::Sender<Option<CopyProgress>>,
) -> Result<Manifest, ImageError> {
    let for_lease = store.clone();
    let _lease = blocking(move || Ok(for_lease.lease()?)).await?;
    fetch_blob(store, source, digest, digest).await?;
    let manifest = store.manifest(&digest)?;
    check(digest, &manifest)?;
    for part in manifest.parts.values() {
        fetch_blob(store, source, digest, part.index).await?;
    }
    let (for_inventory, parts) = (store.clone(), manifest.clone());
    let inventory = blocking(move || take_inventory(&for_inventory, &parts)).await?;
    if !inventory.missing.is_empty() {
        let source = source.ok_or(ImageError::NoSource(digest))?;
        fetch_chunks(store, source, &inventory, progress).await?;
    }
    if source.is_some() {
        let for_tag = store.clone();
        blocking(move || Ok(for_tag.set_tag(&digest.hex(), &digest)?)).await?;
    }
    Ok(manifest)
}

/// Gets the blob `wanted` of image `image` unless it is here.
async fn fetch_blob(store: &Store, source: Option<&Client>, image: Digest, wanted: Digest) -> Result<(), ImageError> {
    if store.has_blob(&wanted) {
        return Ok(());
    }
    let source = source.ok_or(ImageError::NoSource(image))?;
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

fn take_inventory(store: &Store, manifest: &Manifest) -> Result<Inventory, ImageError> {
    let mut inventory = Inventory { lengths: HashMap::new(), missing: Vec::new(), total: 0 };
    for part in manifest.parts.values() {
        store.index(part)?.each(|number, chunk| {
            let len = chunk_len(part.size, number) as u64;
            if chunk != Digest::ZERO && inventory.lengths.insert(chunk, len).is_none() {
                inventory.total += len;
                if !store.has_chunk(&chunk) {
                    inventory.missing.push(chunk);
                }
            }
            Ok::<_, StoreError>(())
        })?;
    }
    Ok(inventory)
}

async fn fetch_chunks(
    store: &Store,
    source: &Client,
    inventory: &Inventory,
    progress: &watch::Sender<Option<CopyProgress>>,
) -> Result<(), ImageError> {
    let length = |digest: &Digest| inventory.lengths.get(digest).copied().unwrap_or(0);
    let lacking: u64 = inventory.missing.iter().map(length).sum();
    // As much as they can take at most: compressed they take less, but nobody knows how much before they are here.
    store.need_space("copying the image", lacking.saturating_add(KEEP_FREE))?;
    let done = AtomicU64::new(inventory.total - lacking);
    let report = |more: u64| {
        let done = done.fetch_add(more, Ordering::Relaxed) + more;
        progress.send_replace(Some(CopyProgress { done, total: inventory.total }));
    };
    report(0);
    let batches: Vec<Vec<Digest>> = inventory.missing.chunks(BATCH).map(<[Digest]>::to_vec).collect();
    let fetches = batches.into_iter().map(|batch| {
        let bytes = batch.iter().map(length).sum();
        let report = &report;
        async move {
            fetch_batch(store.clone(), source.clone(), batch).await?;
            report(bytes);
            Ok::<_, ImageError>(())
        }
    });
    futures_util::stream::iter(fetches).buffer_unordered(IN_FLIGHT).try_collect::<Vec<()>>().await?;
    Ok(())
}

/// Fetches the chunks of one batch and verifies each as it lands.
async fn fetch_batch(store: Store, source: Client, batch: Vec<Digest>) -> Result<(), ImageError> {
    store.need_space("copying the image", KEEP_FREE)?;
    let asked: HashSet<Digest> = batch.iter().copied().collect();
    let mut frames = source.open_chunks(batch.clone()).await?;
    while let Some((digest, frame)) = frames.next().await.map_err(ImageError::Frames)? {
        if !asked.contains(&digest) {
            return Err(ImageError::NotAsked(digest));
        }
        let store = store.clone();
        blocking(move || Ok(store.put_frame(&digest, &frame)?)).await?;
    }
    match store.missing(&batch).len() {
        0 => Ok(()),
        missing => Err(ImageError::NotSent { missing, asked: batch.len() }),
    }
}
