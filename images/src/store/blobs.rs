//! Manifests and indexes.

use std::fs::File;
use std::io::{self, Read};

use bedplate_api::Digest;
use bedplate_api::image::{Manifest, Part};

use super::{Store, StoreError};
use crate::digest::digest_of_reader;
use crate::index::{IndexFile, index_len};
use crate::manifest::{self, MAX_MANIFEST_LEN, ManifestError};
use crate::{digest_of, index};

impl Store {
    /// Keeps `bytes` and returns their name.
    pub fn put_blob(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = digest_of(bytes);
        self.keep_blob(&digest, bytes)?;
        Ok(digest)
    }

    /// Keeps `bytes`, which somebody says are `digest`; refused when they are not.
    pub fn put_blob_as(&self, digest: &Digest, bytes: &[u8]) -> Result<(), StoreError> {
        let found = digest_of(bytes);
        if found != *digest {
            return Err(StoreError::BlobRefused { wanted: *digest, found });
        }
        self.keep_blob(digest, bytes)
    }

    fn keep_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.content_path("blobs", digest);
        // There are few blobs, so each is read again and synced at once; a damaged one is replaced.
        if self.blob(digest).is_ok() {
            return Ok(());
        }
        let mut draft = self.draft()?;
        draft.write(bytes)?;
        draft.sync()?;
        draft.publish_within(&path)
    }

    /// Whether the blob is there. It is verified when it is read.
    pub fn has_blob(&self, digest: &Digest) -> bool {
        self.content_path("blobs", digest).metadata().is_ok_and(|m| m.len() > 0)
    }

    /// The bytes of a blob, verified.
    pub fn blob(&self, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        let (mut file, path) = self.open_blob(digest)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(StoreError::io("read", &path))?;
        let found = digest_of(&bytes);
        if found != *digest {
            self.set_aside(&path, &file);
            return Err(StoreError::BlobCorrupt { path, found });
        }
        Ok(bytes)
    }

    fn open_blob(&self, digest: &Digest) -> Result<(File, std::path::PathBuf), StoreError> {
        let path = self.content_path("blobs", digest);
        match File::open(&path) {
            Ok(file) => Ok((file, path)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(StoreError::BlobMissing { digest: *digest, dir: self.dir().to_owned() })
            }
            Err(e) => Err(StoreError::io("read", &path)(e)),
        }
    }

    /// Checks a manifest and keeps it. Everything added before it survives a power cut from here on.
    pub fn put_manifest(&self, manifest: &Manifest) -> Result<Digest, StoreError> {
        let bytes = manifest::encode(manifest).map_err(|cause| StoreError::Manifest { digest: Digest::ZERO, cause })?;
        self.sync()?;
        self.put_blob(&bytes)
    }

    /// The manifest named `digest`, verified and checked.
    pub fn manifest(&self, digest: &Digest) -> Result<Manifest, StoreError> {
        let path = self.content_path("blobs", digest);
        let refused = |cause| StoreError::Manifest { digest: *digest, cause };
        if let Ok(meta) = path.metadata()
            && meta.len() > MAX_MANIFEST_LEN
        {
            return Err(refused(ManifestError::TooLong(meta.len())));
        }
        manifest::parse(&self.blob(digest)?).map_err(refused)
    }

    /// The index of `part`, its file verified, its entries to be read one by one.
    pub fn index(&self, part: &Part) -> Result<IndexFile, StoreError> {
        let digest = part.index;
        let (mut file, path) = self.open_blob(&digest)?;
        // Before anything is read: an index of another length cannot be the one, however long somebody made it.
        let wanted = index_len(part.size);
        let len = file.metadata().map_err(StoreError::io("examine", &path))?.len();
        let read = || StoreError::io("read", &path);
        if len != wanted {
            // Either damage, or an honest index of another part: only its digest can tell.
            return Err(self.wrong_index(&digest, &mut file, &path, part.size)?);
        }
        let (found, _) = digest_of_reader(&mut file).map_err(read())?;
        if found != digest {
            self.set_aside(&path, &file);
            return Err(StoreError::BlobCorrupt { path, found });
        }
        let index = IndexFile::open(file).map_err(read())?.map_err(|cause| StoreError::Index { digest, cause })?;
        if index.size() != part.size {
            return Err(StoreError::IndexSize { digest, found: index.size(), wanted: part.size });
        }
        Ok(index)
    }

    fn wrong_index(
        &self,
        digest: &Digest,
        file: &mut File,
        path: &std::path::Path,
        wanted: u64,
    ) -> Result<StoreError, StoreError> {
        let (found, len) = digest_of_reader(&mut *file).map_err(StoreError::io("read", path))?;
        if found == *digest {
            let size = len.saturating_sub(index::HEADER_LEN as u64) / 32 * crate::CHUNK_SIZE as u64;
            return Ok(StoreError::IndexSize { digest: *digest, found: size, wanted });
        }
        self.set_aside(path, file);
        Ok(StoreError::BlobCorrupt { path: path.to_owned(), found })
    }
}
