//! From the local store to a registry: packs first, then what names them, the tag last, so that no tag ever names half an
//! image. Chunks that packs of this repository have already are not sent again.

use std::collections::HashSet;

use bedplate_api::Digest;
use bedplate_api::image::Manifest;
use bedplate_images::pack::oci::{self, Artifact, Descriptor};
use bedplate_images::pack::{MAX_CHUNKS, MAX_TABLE_LEN, Table, encode};
use bedplate_images::{CHUNK_SIZE, Store, StoreError};
use oci_client::{Reference, RegistryOperation};

use super::{Registry, RegistryArgs, RegistryError};
use crate::image::{Error, print_one};
use crate::output::{self, Format};
use crate::progress::Progress;

/// Other images of the repository whose packs are looked at.
const MAX_OTHERS: usize = 15;
/// Packs whose tables are fetched: of about 128 GiB of content.
const MAX_KNOWN: usize = 4096;

/// A pack that the repository has.
struct Known {
    descriptor: Descriptor,
    table: Table,
}

pub(in crate::image) fn run(
    store: &Store,
    name: &str,
    to: &str,
    args: &RegistryArgs,
    format: Format,
) -> Result<(), Error> {
    let _lease = store.lease()?;
    let digest = store.resolve(name)?;
    let registry = Registry::open(to, args)?;
    if registry.reference.tag().is_none() || registry.reference.digest().is_some() {
        return Err(RegistryError::NoTag(registry.image()).into());
    }
    registry.runtime.block_on(registry.send(store, &digest, name))?;
    let mut summary = store.summary(name)?;
    summary.name = registry.reference.to_string();
    Ok(print_one(&summary, format)?)
}

impl Registry {
    async fn send(&self, store: &Store, image: &Digest, name: &str) -> Result<(), RegistryError> {
        self.log_in(RegistryOperation::Push).await?;
        let chunks = store.distinct_chunks(image)?;
        let progress = Progress::new(format!("push {name}"), chunks.len() as u64 * CHUNK_SIZE as u64);
        let (mut packs, covered) = choose(self.known_packs().await, &chunks);
        progress.add(covered.len() as u64 * CHUNK_SIZE as u64);
        let left: Vec<Digest> = chunks.iter().filter(|chunk| !covered.contains(chunk)).copied().collect();
        let (mut sent, mut sent_bytes) = (0, 0);
        for group in left.chunks(MAX_CHUNKS) {
            let (for_pack, digests) = (store.clone(), group.to_vec());
            let pack = tokio::task::spawn_blocking(move || {
                let frames = digests.iter().map(|digest| Ok((*digest, for_pack.frame(digest)?)));
                frames.collect::<Result<Vec<_>, StoreError>>()
            });
            // It was not aborted, and passes its panic on.
            let frames = pack.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))?;
            let bytes = encode(&frames).map_err(|e| self.oci()(e.into()))?;
            drop(frames);
            let descriptor = Descriptor::of(oci::PACK, &bytes);
            if self.put_blob(&descriptor, bytes).await? {
                sent += 1;
                sent_bytes += descriptor.size;
            }
            packs.push(descriptor);
            progress.add(group.len() as u64 * CHUNK_SIZE as u64);
        }
        let all = packs.len();
        self.put_image(store, image, &store.manifest(image)?, packs).await?;
        progress.finish(&format!("{sent} of {all} packs sent ({})", output::bytes(sent_bytes)));
        Ok(())
    }

    /// What names the packs, and the tag.
    async fn put_image(
        &self,
        store: &Store,
        image: &Digest,
        manifest: &Manifest,
        packs: Vec<Descriptor>,
    ) -> Result<(), RegistryError> {
        let mut indexes = Vec::new();
        for part in manifest.parts.values() {
            let packed = oci::pack_index(&store.blob(&part.index)?).map_err(RegistryError::Setup)?;
            let mut descriptor = Descriptor::of(oci::INDEX, &packed);
            descriptor.annotations.insert(oci::DIGEST.to_owned(), part.index.to_string());
            self.put_blob(&descriptor, packed).await?;
            indexes.push(descriptor);
        }
        let bytes = store.blob(image)?;
        let descriptor = Descriptor::of(oci::MANIFEST, &bytes);
        self.put_blob(&descriptor, bytes).await?;
        let artifact = Artifact { manifest: descriptor, indexes, packs, signature: store.signature(image)? };
        let bytes = artifact.encode(image).map_err(self.oci())?;
        let kind = oci::OCI_MANIFEST.parse().map_err(|_| RegistryError::NoTag(self.image()))?;
        self.client.push_manifest_raw(&self.reference, bytes, kind).await.map_err(self.talk("push"))?;
        Ok(())
    }

    /// Sends a blob that is not there; whether it was sent.
    async fn put_blob(&self, descriptor: &Descriptor, bytes: Vec<u8>) -> Result<bool, RegistryError> {
        let there = self.client.blob_exists(&self.reference, &descriptor.digest).await;
        if there.map_err(self.talk("look for a part of"))? {
            return Ok(false);
        }
        let sent = self.client.push_blob(&self.reference, bytes, &descriptor.digest).await;
        sent.map_err(self.talk("push"))?;
        Ok(true)
    }

    /// Packs of the image that has the tag now, and of others of the repository. What cannot be read is passed over: it
    /// costs sending something again.
    async fn known_packs(&self) -> Vec<Known> {
        let tags = self.client.list_tags(&self.reference, &self.auth, Some(MAX_OTHERS + 1), None).await;
        let tags = tags.map(|answer| answer.tags).unwrap_or_default();
        let own = self.reference.tag().map(str::to_owned);
        let others = tags.into_iter().filter(|tag| Some(tag) != own.as_ref()).take(MAX_OTHERS);
        let (mut known, mut seen) = (Vec::new(), HashSet::new());
        for tag in own.iter().cloned().chain(others) {
            let (host, repository) = (self.reference.registry().to_owned(), self.reference.repository().to_owned());
            let reference = Reference::with_tag(host, repository, tag);
            let pulled = self.client.pull_manifest_raw(&reference, &self.auth, &[oci::OCI_MANIFEST]).await;
            let Some(artifact) = pulled.ok().and_then(|(bytes, _)| Artifact::parse(&bytes).ok()) else { continue };
            for descriptor in artifact.packs {
                if known.len() >= MAX_KNOWN {
                    return known;
                }
                if seen.insert(descriptor.digest.clone())
                    && let Ok(table) = self.table(&descriptor).await
                {
                    known.push(Known { descriptor, table });
                }
            }
        }
        known
    }

    /// The table of a pack.
    pub(super) async fn table(&self, pack: &Descriptor) -> Result<Table, RegistryError> {
        // No more than the longest table.
        let len = pack.size.min(MAX_TABLE_LEN as u64);
        let mut pieces = self.range(&pack.digest, 0, len).await?;
        let bytes = self.take(&pack.digest, &mut pieces, 0, len as usize).await?;
        Table::parse(&bytes, pack.size).map_err(|e| self.oci()(e.into()))
    }
}

/// Those of `known` that are worth naming, and the chunks that they have. A pack of which less than half is of use would
/// keep the registry from ever being rid of the rest.
fn choose(known: Vec<Known>, chunks: &[Digest]) -> (Vec<Descriptor>, HashSet<Digest>) {
    let wanted: HashSet<&Digest> = chunks.iter().collect();
    let (mut packs, mut covered) = (Vec::new(), HashSet::new());
    for pack in known {
        let useful =
            |entry: &&bedplate_images::pack::Entry| wanted.contains(&entry.digest) && !covered.contains(&entry.digest);
        let bytes: u64 = pack.table.entries().iter().filter(useful).map(|entry| u64::from(entry.len)).sum();
        if bytes * 2 >= pack.table.len() {
            covered.extend(pack.table.entries().iter().map(|entry| entry.digest).filter(|d| wanted.contains(d)));
            packs.push(pack.descriptor);
        }
    }
    (packs, covered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_are_used_again_where_half_of_them_is_of_use() {
        let digest = |n: u8| Digest::from_bytes([n; 32]);
        let known = |numbers: std::ops::Range<u8>| {
            let table = Table::new(numbers.clone().map(|n| (digest(n), 1000))).unwrap();
            let descriptor = Descriptor::of(oci::PACK, &[numbers.start]);
            Known { descriptor, table }
        };
        let wanted: Vec<Digest> = (1..20).map(digest).collect();
        let (packs, covered) = choose(vec![known(1..10), known(15..40), known(5..14), known(8..13)], &wanted);
        let named = |n: u8| Descriptor::of(oci::PACK, &[n]);
        assert_eq!(packs, [named(1), named(8)], "the second is mostly foreign, half of the third is there already");
        assert_eq!(covered.len(), 12);
    }
}
