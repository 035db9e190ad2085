//! A store's image as an artifact: what a registry over a store serves.

use std::io;

use bedplate_api::Digest;
use sha2::{Digest as _, Sha256};

use super::oci::{self, Artifact, Descriptor, OciError, hex_of};
use super::{MAX_CHUNKS, Table};
use crate::{Store, StoreError};

/// Why an image cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum OfferError {
    /// It is not whole, or the store fails.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It is too large for a registry.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// What was made cannot be kept.
    #[error("cannot keep what the registry serves: {0}")]
    Keep(#[from] io::Error),
}

/// Describes the image `image`. Its chunks are all read once, since a registry names blobs by a digest of their bytes.
/// `keep` is given what a registry has to keep beside the store, each under its registry's digest: config and indexes as
/// they are, and of each pack the table, which with the store's frames is the pack.
pub fn offer(
    store: &Store,
    image: &Digest,
    mut keep: impl FnMut(&str, &[u8]) -> io::Result<()>,
) -> Result<Artifact, OfferError> {
    let manifest = store.manifest(image)?;
    let mut indexes = Vec::new();
    for part in manifest.parts.values() {
        let packed = oci::pack_index(&store.blob(&part.index)?)?;
        let mut descriptor = Descriptor::of(oci::INDEX, &packed);
        descriptor.annotations.insert(oci::DIGEST.to_owned(), part.index.to_string());
        keep(&descriptor.digest, &packed)?;
        indexes.push(descriptor);
    }
    let mut packs = Vec::new();
    for group in store.distinct_chunks(image)?.chunks(MAX_CHUNKS) {
        // At most 32 MiB: the table with all lengths comes before the first frame.
        let frames = group.iter().map(|digest| store.frame(digest)).collect::<Result<Vec<_>, _>>()?;
        let lens = frames.iter().map(|frame| frame.len() as u32);
        let table = Table::new(group.iter().copied().zip(lens)).map_err(OciError::from)?;
        let head = table.encode();
        let mut hasher = Sha256::new();
        hasher.update(&head);
        frames.iter().for_each(|frame| hasher.update(frame));
        let digest = hex_of(hasher);
        keep(&digest, &head)?;
        let (media_type, annotations) = (oci::PACK.to_owned(), Default::default());
        packs.push(Descriptor { media_type, digest, size: table.len(), annotations });
    }
    let bytes = store.blob(image)?;
    let manifest = Descriptor::of(oci::MANIFEST, &bytes);
    keep(&manifest.digest, &bytes)?;
    Ok(Artifact { manifest, indexes, packs, signature: store.signature(image)? })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::fixtures::{image, noise, store};
    use crate::{CHUNK_SIZE, digest_of};

    #[test]
    fn what_is_offered_and_the_stores_frames_are_what_the_digests_say() {
        let (_dir, store) = store();
        let digest = image(&store, &noise(1, 600 * CHUNK_SIZE));
        let mut kept = BTreeMap::new();
        let artifact = offer(&store, &digest, |name, bytes| {
            kept.insert(name.to_owned(), bytes.to_vec());
            Ok(())
        })
        .unwrap();
        assert_eq!(digest_of(&kept[&artifact.manifest.digest]), digest);
        assert_eq!((artifact.indexes.len(), artifact.packs.len()), (1, 2));
        for pack in &artifact.packs {
            let mut bytes = kept[&pack.digest].clone();
            let table = Table::parse(&bytes, pack.size).unwrap();
            table.entries().iter().for_each(|entry| bytes.extend(store.frame(&entry.digest).unwrap()));
            assert_eq!((oci::sha256(&bytes), bytes.len() as u64), (pack.digest.clone(), pack.size));
        }
        let again = offer(&store, &digest, |_, _| Ok(())).unwrap();
        assert_eq!(again, artifact, "the same image is offered as the same blobs");
    }
}
