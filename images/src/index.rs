//! The index of a part: from chunk number to chunk digest.
//!
//! ```text
//! 0   8  magic "bpindex\n"
//! 8   4  version, 1
//! 12  4  chunk size in bytes, 65536
//! 16  8  size of the part in bytes
//! 24  8  count of digests: the size divided by the chunk size, rounded up
//! 32     count × 32 bytes, one digest per chunk in order; 32 zero bytes mean a chunk that is all zeros
//! ```
//!
//! Numbers are little-endian. Nothing follows the last digest. The header can be read alone.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use bedplate_api::Digest;

use crate::frame::CHUNK_SIZE;

/// Length of the header in bytes.
pub const HEADER_LEN: usize = 32;

/// Largest part: 64 TiB, which no disk that we met comes near.
pub const MAX_PART_SIZE: u64 = 64 << 40;

const MAGIC: &[u8; 8] = b"bpindex\n";
const VERSION: u32 = 1;
const DIGEST_LEN: usize = 32;

/// Bytes that are no index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// Shorter than a header, or another kind of file.
    #[error("this is not a chunk index")]
    NotAnIndex,
    /// Written by a later version.
    #[error("this is a chunk index of version {0} and this program knows version {VERSION}: update Bedplate")]
    Version(u32),
    /// Another chunk size.
    #[error("this chunk index uses chunks of {0} bytes and this program knows {CHUNK_SIZE}")]
    ChunkSize(u32),
    /// Larger than any part may be.
    #[error("this chunk index claims a part of {0} bytes; the most is {MAX_PART_SIZE}")]
    TooLarge(u64),
    /// The count does not follow from the size.
    #[error("this chunk index claims {count} chunks for a part of {size} bytes")]
    Count {
        /// As claimed.
        count: u64,
        /// As claimed.
        size: u64,
    },
    /// Cut off, or something follows.
    #[error("this chunk index has {found} bytes and its header promises {expected}")]
    Length {
        /// Bytes there are.
        found: u64,
        /// Bytes there should be.
        expected: u64,
    },
}

/// What the header of an index says, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    size: u64,
}

/// Number of chunks of a part of `size` bytes.
pub const fn chunk_count(size: u64) -> u64 {
    size.div_ceil(CHUNK_SIZE as u64)
}

/// Length in bytes of chunk `number` of a part of `size` bytes; 0 past its end.
pub fn chunk_len(size: u64, number: u64) -> usize {
    let start = number.saturating_mul(CHUNK_SIZE as u64);
    // At most CHUNK_SIZE, which fits.
    size.saturating_sub(start).min(CHUNK_SIZE as u64) as usize
}

/// Length in bytes of the index of a part of `size` bytes.
pub const fn index_len(size: u64) -> u64 {
    // No overflow for any u64: the count is at most 2^48.
    HEADER_LEN as u64 + chunk_count(size) * DIGEST_LEN as u64
}

impl Header {
    /// The header of a part of `size` bytes.
    pub fn new(size: u64) -> Result<Self, IndexError> {
        if size > MAX_PART_SIZE { Err(IndexError::TooLarge(size)) } else { Ok(Self { size }) }
    }

    /// Reads the header at the front of `bytes`, the index being `total` bytes long.
    pub fn parse(bytes: &[u8], total: u64) -> Result<Self, IndexError> {
        let header = bytes.first_chunk::<HEADER_LEN>().ok_or(IndexError::NotAnIndex)?;
        let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if &header[..8] != MAGIC {
            return Err(IndexError::NotAnIndex);
        }
        if u32_at(8) != VERSION {
            return Err(IndexError::Version(u32_at(8)));
        }
        if u32_at(12) as usize != CHUNK_SIZE {
            return Err(IndexError::ChunkSize(u32_at(12)));
        }
        let this = Self::new(u64_at(16))?;
        if u64_at(24) != this.count() {
            return Err(IndexError::Count { count: u64_at(24), size: this.size });
        }
        if total != index_len(this.size) {
            return Err(IndexError::Length { found: total, expected: index_len(this.size) });
        }
        Ok(this)
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(CHUNK_SIZE as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.size.to_le_bytes());
        bytes[24..].copy_from_slice(&self.count().to_le_bytes());
        bytes
    }

    /// Size of the part in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Number of chunks.
    pub const fn count(&self) -> u64 {
        chunk_count(self.size)
    }
}

/// A whole index in memory: what an importer makes and a copier reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    header: Header,
    digests: Vec<Digest>,
}

impl Index {
    /// The index of a part of `size` bytes whose chunks are `digests`, in order.
    pub fn new(size: u64, digests: Vec<Digest>) -> Result<Self, IndexError> {
        let header = Header::new(size)?;
        if digests.len() as u64 != header.count() {
            return Err(IndexError::Count { count: digests.len() as u64, size });
        }
        Ok(Self { header, digests })
    }

    /// Reads an index; `bytes` must be exactly one.
    pub fn parse(bytes: &[u8]) -> Result<Self, IndexError> {
        let header = Header::parse(bytes, bytes.len() as u64)?;
        let (entries, _) = bytes[HEADER_LEN..].as_chunks::<DIGEST_LEN>();
        Ok(Self { header, digests: entries.iter().map(|entry| Digest::from_bytes(*entry)).collect() })
    }

    /// The bytes of the blob.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.digests.len() * DIGEST_LEN);
        bytes.extend_from_slice(&self.header.encode());
        for digest in &self.digests {
            bytes.extend_from_slice(digest.as_bytes());
        }
        bytes
    }

    /// Size of the part in bytes.
    pub fn size(&self) -> u64 {
        self.header.size
    }

    /// The digests in order, [`Digest::ZERO`] for chunks that are all zeros.
    pub fn digests(&self) -> &[Digest] {
        &self.digests
    }
}

/// An index in its file, read entry by entry: the page cache holds it, shared by all VMs of an image.
///
/// The store verified the file's digest before it handed this out. Should an entry rot afterwards, it names a chunk that
/// does not exist, so what is read is an error and never other data.
#[derive(Debug)]
pub struct IndexFile {
    file: File,
    header: Header,
}

impl IndexFile {
    /// Reads the header of the index in `file`, whose content the caller has verified.
    pub(crate) fn open(file: File) -> io::Result<Result<Self, IndexError>> {
        let total = file.metadata()?.len();
        let mut bytes = [0; HEADER_LEN];
        if total < HEADER_LEN as u64 {
            return Ok(Err(IndexError::NotAnIndex));
        }
        file.read_exact_at(&mut bytes, 0)?;
        Ok(Header::parse(&bytes, total).map(|header| Self { file, header }))
    }

    /// Size of the part in bytes.
    pub const fn size(&self) -> u64 {
        self.header.size
    }

    /// Number of chunks.
    pub const fn count(&self) -> u64 {
        self.header.count()
    }

    /// Digest of chunk `number`, which must be below the count.
    pub fn digest(&self, number: u64) -> io::Result<Digest> {
        let mut bytes = [0; DIGEST_LEN];
        self.file.read_exact_at(&mut bytes, HEADER_LEN as u64 + number * DIGEST_LEN as u64)?;
        Ok(Digest::from_bytes(bytes))
    }

    /// Calls `visit` with the number and digest of every chunk that is not all zeros, in order; stops at its first error.
    pub fn each<E: From<io::Error>>(&self, mut visit: impl FnMut(u64, Digest) -> Result<(), E>) -> Result<(), E> {
        const BATCH: u64 = 2048;
        let mut bytes = vec![0; BATCH as usize * DIGEST_LEN];
        let mut first = 0;
        while first < self.count() {
            let count = BATCH.min(self.count() - first);
            let batch = &mut bytes[..count as usize * DIGEST_LEN];
            self.file.read_exact_at(batch, HEADER_LEN as u64 + first * DIGEST_LEN as u64)?;
            for (number, entry) in (first..).zip(batch.as_chunks::<DIGEST_LEN>().0) {
                let digest = Digest::from_bytes(*entry);
                if digest != Digest::ZERO {
                    visit(number, digest)?;
                }
            }
            first += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What version 1 looks like, byte by byte. If this fails, the format changed: see "How to change it" in
    /// `docs/image-format.md`.
    #[test]
    fn golden() {
        let index = Index::new(CHUNK_SIZE as u64 + 5, vec![Digest::from_bytes([0xab; 32]), Digest::ZERO]).unwrap();
        let golden = include_bytes!("../golden/index-v1.bin");
        assert_eq!(index.encode(), golden);
        assert_eq!(Index::parse(golden).unwrap(), index);
    }

    #[test]
    fn every_damage_to_the_header_and_every_length_is_refused() {
        let good = Index::new(3 * CHUNK_SIZE as u64, vec![Digest::from_bytes([1; 32]); 3]).unwrap().encode();
        for bit in 0..HEADER_LEN * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let parsed = Index::parse(&bad);
            // Only the low bits of the size can change without a contradiction: the last chunk may be short.
            assert!(parsed.is_err() || (128..144).contains(&bit), "bit {bit}: {parsed:?}");
        }
        for len in 0..good.len() {
            assert!(Index::parse(&good[..len]).is_err(), "cut to {len}");
        }
        assert!(matches!(Index::parse(&[&good[..], &[0]].concat()), Err(IndexError::Length { .. })));
    }

    #[test]
    fn absurd_sizes_are_refused_before_anything_is_allocated() {
        let mut bytes = Header { size: 0 }.encode();
        bytes[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        bytes[24..].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(Index::parse(&bytes), Err(IndexError::TooLarge(u64::MAX)));
        assert_eq!(Header::new(MAX_PART_SIZE + 1), Err(IndexError::TooLarge(MAX_PART_SIZE + 1)));
    }

    #[test]
    fn chunk_lengths() {
        let size = CHUNK_SIZE as u64 + 5;
        assert_eq!([0, 1, 2, u64::MAX].map(|n| chunk_len(size, n)), [CHUNK_SIZE, 5, 0, 0]);
        assert_eq!([0, 1, size].map(chunk_count), [0, 1, 2]);
    }

    proptest::proptest! {
        #[test]
        fn random_bytes_never_panic(mut bytes: Vec<u8>, fix in 0..4_usize) {
            // Let some inputs pass the first checks, so that the later ones are reached.
            let good = Header { size: 70_000 }.encode();
            let keep = [0, 8, 16, 24][fix].min(bytes.len());
            bytes[..keep].copy_from_slice(&good[..keep]);
            let _ = Index::parse(&bytes);
        }
    }
}
