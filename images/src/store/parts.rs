//! Parts of images: what is missing of them, and their bytes.

use std::collections::HashSet;
use std::io;

use bedplate_api::Digest;
use bedplate_api::image::Part;

use super::{Store, StoreError};
use crate::frame::{self, CHUNK_SIZE};
use crate::index::{self, IndexFile};
use crate::manifest;

/// What an image lacks in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing {
    /// Distinct chunks that the image has.
    pub total: u64,
    /// Distinct chunks that are not there.
    pub chunks: u64,
}

impl From<io::Error> for StoreError {
    /// For reads of an index that is open: its path is gone from sight, its name is not needed to act.
    fn from(cause: io::Error) -> Self {
        Self::Io { what: "read", path: "a chunk index".into(), cause }
    }
}

impl Store {
    /// Counts the chunks of the image `digest` that are not here. Manifest and indexes must be: else an error.
    pub fn missing_of(&self, digest: &Digest) -> Result<Missing, StoreError> {
        let mut missing = Missing { total: 0, chunks: 0 };
        let mut seen = HashSet::new();
        for part in self.manifest(digest)?.parts.values() {
            self.index(part)?.each(|_, chunk| {
                if seen.insert(chunk) {
                    missing.total += 1;
                    missing.chunks += u64::from(!self.has_chunk(&chunk));
                }
                Ok::<_, StoreError>(())
            })?;
        }
        Ok(missing)
    }

    /// The chunks of the image `digest`, each once and none of zeros, in the order in which a reader meets them.
    pub fn distinct_chunks(&self, digest: &Digest) -> Result<Vec<Digest>, StoreError> {
        let (mut seen, mut chunks) = (HashSet::new(), Vec::new());
        for part in self.manifest(digest)?.parts.values() {
            self.index(part)?.each(|_, chunk| {
                if seen.insert(chunk) {
                    chunks.push(chunk);
                }
                Ok::<_, StoreError>(())
            })?;
        }
        Ok(chunks)
    }

    /// Reads every chunk of the image `digest` and reports the first that is missing or damaged.
    pub fn verify(&self, digest: &Digest) -> Result<(), StoreError> {
        let mut plain = frame::chunk_buffer();
        for (name, part) in &self.manifest(digest)?.parts {
            self.index(part)?.each(|number, chunk| {
                let read = self.read_chunk(&chunk, &mut plain).and_then(|len| right_length(len, part, number, &chunk));
                read.map_err(|e| e.in_part(*digest, name, number))
            })?;
        }
        Ok(())
    }

    /// Opens part `name` of the image `image` for reading.
    pub fn part(&self, image: &Digest, name: &str) -> Result<PartReader, StoreError> {
        let manifest = self.manifest(image)?;
        let part = manifest::part(&manifest, name).map_err(|cause| StoreError::Manifest { digest: *image, cause })?;
        Ok(PartReader {
            index: self.index(part)?,
            part: part.clone(),
            store: self.clone(),
            image: *image,
            name: name.to_owned(),
        })
    }
}

/// A chunk must be as long as its place in the part; an index can be wrong about that only if who made it was.
fn right_length(len: usize, part: &Part, number: u64, chunk: &Digest) -> Result<(), StoreError> {
    let wanted = index::chunk_len(part.size, number);
    if len == wanted {
        return Ok(());
    }
    Err(StoreError::ChunkLength { digest: *chunk, found: len, wanted })
}

/// One part of an image, read chunk by chunk, each verified.
#[derive(Debug)]
pub struct PartReader {
    store: Store,
    image: Digest,
    name: String,
    part: Part,
    index: IndexFile,
}

impl PartReader {
    /// Size of the part in bytes.
    pub const fn size(&self) -> u64 {
        self.index.size()
    }

    /// Number of chunks.
    pub const fn count(&self) -> u64 {
        self.index.count()
    }

    /// The index.
    pub const fn index(&self) -> &IndexFile {
        &self.index
    }

    /// Digest of chunk `number`, which must be below the count.
    pub fn digest(&self, number: u64) -> Result<Digest, StoreError> {
        Ok(self.index.digest(number)?)
    }

    /// Whether chunk `number`, which must be below the count, is in the store. It is verified when it is read.
    pub fn has(&self, number: u64) -> Result<bool, StoreError> {
        Ok(self.store.has_chunk(&self.digest(number)?))
    }

    /// Reads chunk `number`, whose digest `digest` is not [`Digest::ZERO`], to the front of `plain`; returns its length.
    pub fn read(&self, number: u64, digest: &Digest, plain: &mut [u8; CHUNK_SIZE]) -> Result<usize, StoreError> {
        self.store
            .read_chunk(digest, plain)
            .and_then(|len| right_length(len, &self.part, number, digest).map(|()| len))
            .map_err(|e| e.in_part(self.image, &self.name, number))
    }
}
