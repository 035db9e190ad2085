//! What several tests begin with.

use std::path::{Path, PathBuf};

use bedplate_api::Digest;
use bedplate_api::image::{ImageKind, Manifest, Part};

use crate::manifest::{DISK, SCHEMA};
use crate::{CHUNK_SIZE, Store};

/// A store in a directory that goes away.
pub(crate) fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path().join("store")).unwrap();
    (dir, store)
}

/// Bytes that do not compress, the same for the same seed.
pub(crate) fn noise(seed: u32, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut out);
    out
}

/// Cuts `bytes` into chunks and keeps them.
pub(crate) fn part(store: &Store, bytes: &[u8]) -> Part {
    let digests = bytes.chunks(CHUNK_SIZE).map(|chunk| store.put_chunk(chunk).unwrap()).collect();
    let index = crate::index::Index::new(bytes.len() as u64, digests).unwrap();
    Part { size: bytes.len() as u64, index: store.put_blob(&index.encode()).unwrap(), content: bytes.len() as u64 }
}

/// An image whose disk is `bytes`.
pub(crate) fn image(store: &Store, bytes: &[u8]) -> Digest {
    let manifest = Manifest {
        schema: SCHEMA,
        kind: ImageKind::Disk,
        parts: [(DISK.to_owned(), part(store, bytes))].into(),
        boot: None,
        firmware: None,
        origin: None,
        labels: Default::default(),
    };
    store.put_manifest(&manifest).unwrap()
}

/// Every regular file under `dir`.
pub(crate) fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

/// Flips one bit of a file in place.
pub(crate) fn flip(path: &Path, bit: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[bit / 8] ^= 1 << (bit % 8);
    std::fs::write(path, bytes).unwrap();
}
