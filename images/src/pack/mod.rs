//! Packs: chunks grouped into one blob, for repositories that keep blobs and not chunks.
//!
//! ```text
//! 0   8  magic "bp-pack\n"
//! 8   4  version, 1
//! 12  4  count of chunks, 1 to 512
//! 16  8  length of the whole pack in bytes
//! 24     count × 36 bytes: digest of the chunk, length of its frame (4 bytes)
//! …      the frames, back to back, in the same order
//! ```
//!
//! Numbers are little-endian; nothing follows the last frame. The table in front can be read alone, by range, and says where
//! each frame is: places are sums of lengths, so that none can overlap another. [`oci`] says how an image names its packs.

pub mod oci;
pub mod offer;

use std::collections::HashSet;

use bedplate_api::Digest;

use crate::MAX_FRAME_LEN;

/// Most chunks of one pack: 32 MiB of plain bytes, which is what a sender holds at a time.
pub const MAX_CHUNKS: usize = 512;

/// No table is longer. A reader that knows nothing of a pack fetches as much.
pub const MAX_TABLE_LEN: usize = HEADER_LEN + MAX_CHUNKS * ENTRY_LEN;

/// No pack is longer.
pub const MAX_PACK_LEN: u64 = (MAX_TABLE_LEN + MAX_CHUNKS * MAX_FRAME_LEN) as u64;

const MAGIC: &[u8; 8] = b"bp-pack\n";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 24;
const ENTRY_LEN: usize = 36;

/// Bytes that are no pack.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// Another kind of file, or too short to be one.
    #[error("this is not a pack of chunks")]
    NotAPack,
    /// Written by a later version.
    #[error("this is a pack of version {0} and this program knows version {VERSION}: update Bedplate")]
    Version(u32),
    /// None, or too many.
    #[error("a pack claims {0} chunks; 1 to {MAX_CHUNKS} are possible")]
    Count(u32),
    /// The table is cut off.
    #[error("the table of a pack is cut off")]
    Short,
    /// A frame that no chunk has.
    #[error("a pack claims a frame of {0} bytes; 1 to {MAX_FRAME_LEN} are possible")]
    Frame(u32),
    /// The same chunk twice, or the name of zeros.
    #[error("a pack names the chunk {0}, which has no place in it (twice, or zeros)")]
    Chunk(Digest),
    /// Cut off, or something follows.
    #[error("a pack has {found} bytes and its table accounts for {expected}")]
    Length {
        /// Bytes there are.
        found: u64,
        /// Bytes that header, table and frames take.
        expected: u64,
    },
}

/// Where one chunk is in its pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Which chunk.
    pub digest: Digest,
    /// Where its frame begins.
    pub offset: u64,
    /// Length of its frame.
    pub len: u32,
}

/// What is in a pack, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    entries: Vec<Entry>,
    len: u64,
}

impl Table {
    /// The table of a pack with these chunks, each with the length of its frame, in this order.
    pub fn new(chunks: impl IntoIterator<Item = (Digest, u32)>) -> Result<Self, PackError> {
        let chunks: Vec<(Digest, u32)> = chunks.into_iter().take(MAX_CHUNKS + 1).collect();
        if chunks.is_empty() || chunks.len() > MAX_CHUNKS {
            return Err(PackError::Count(chunks.len() as u32));
        }
        let mut offset = (HEADER_LEN + chunks.len() * ENTRY_LEN) as u64;
        let mut seen = HashSet::new();
        let mut entries = Vec::with_capacity(chunks.len());
        for (digest, len) in chunks {
            if len == 0 || len as usize > MAX_FRAME_LEN {
                return Err(PackError::Frame(len));
            }
            if digest == Digest::ZERO || !seen.insert(digest) {
                return Err(PackError::Chunk(digest));
            }
            entries.push(Entry { digest, offset, len });
            offset += u64::from(len);
        }
        Ok(Self { entries, len: offset })
    }

    /// Reads the table at the front of `bytes`, the pack being `total` bytes long.
    pub fn parse(bytes: &[u8], total: u64) -> Result<Self, PackError> {
        let header = bytes.first_chunk::<HEADER_LEN>().ok_or(PackError::NotAPack)?;
        if &header[..8] != MAGIC {
            return Err(PackError::NotAPack);
        }
        let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (version, count) = (u32_at(8), u32_at(12));
        if version != VERSION {
            return Err(PackError::Version(version));
        }
        if count == 0 || count as usize > MAX_CHUNKS {
            return Err(PackError::Count(count));
        }
        let entries = bytes.get(HEADER_LEN..HEADER_LEN + count as usize * ENTRY_LEN).ok_or(PackError::Short)?;
        let table = Self::new(entries.as_chunks::<ENTRY_LEN>().0.iter().map(|entry| {
            let mut digest = [0; 32];
            digest.copy_from_slice(&entry[..32]);
            (Digest::from_bytes(digest), u32::from_le_bytes([entry[32], entry[33], entry[34], entry[35]]))
        }))?;
        let claimed = u64::from(u32_at(16)) | u64::from(u32_at(20)) << 32;
        for found in [claimed, total] {
            if found != table.len {
                return Err(PackError::Length { found, expected: table.len });
            }
        }
        Ok(table)
    }

    /// Reads a table that stands alone, its pack being as long as it claims.
    pub fn parse_alone(bytes: &[u8]) -> Result<Self, PackError> {
        let claimed = bytes.get(16..24).and_then(|bytes| bytes.first_chunk()).ok_or(PackError::NotAPack)?;
        Self::parse(bytes, u64::from_le_bytes(*claimed))
    }

    /// Header and table: what the frames follow.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.entries.len() * ENTRY_LEN);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(self.entries.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&self.len.to_le_bytes());
        for entry in &self.entries {
            bytes.extend_from_slice(entry.digest.as_bytes());
            bytes.extend_from_slice(&entry.len.to_le_bytes());
        }
        bytes
    }

    /// The chunks, in the order of their places.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Length of the whole pack in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: a pack has a chunk at least.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// A whole pack of these chunks and their frames.
pub fn encode(frames: &[(Digest, Vec<u8>)]) -> Result<Vec<u8>, PackError> {
    // No frame comes near 4 GiB; one that did would be refused as too long.
    let len = |frame: &[u8]| u32::try_from(frame.len()).unwrap_or(u32::MAX);
    let table = Table::new(frames.iter().map(|(digest, frame)| (*digest, len(frame))))?;
    let mut bytes = table.encode();
    frames.iter().for_each(|(_, frame)| bytes.extend_from_slice(frame));
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        encode(&[
            (Digest::from_bytes([0xab; 32]), b"first".to_vec()),
            (Digest::from_bytes([0xcd; 32]), b"2nd".to_vec()),
        ])
        .unwrap()
    }

    /// What version 1 looks like. If this fails, packs in every registry changed: see "How to change it" in
    /// `docs/image-format.md`.
    #[test]
    fn golden() {
        let golden = include_bytes!("../../golden/pack-v1.bin");
        assert_eq!(sample(), golden);
        let table = Table::parse(golden, golden.len() as u64).unwrap();
        assert_eq!(table.encode(), golden[..24 + 72]);
        assert_eq!(table.entries()[1], Entry { digest: Digest::from_bytes([0xcd; 32]), offset: 101, len: 3 });
        assert_eq!(table.len(), golden.len() as u64);
    }

    #[test]
    fn each_lie_is_refused() {
        let good = sample();
        let refused = |at: usize, new: &[u8], error: PackError| {
            let mut bytes = good.clone();
            bytes[at..at + new.len()].copy_from_slice(new);
            assert_eq!(Table::parse(&bytes, bytes.len() as u64), Err(error));
        };
        refused(0, b"x", PackError::NotAPack);
        refused(8, &[2], PackError::Version(2));
        refused(12, &[0], PackError::Count(0));
        refused(12, &513_u32.to_le_bytes(), PackError::Count(513));
        refused(12, &u32::MAX.to_le_bytes(), PackError::Count(u32::MAX));
        refused(12, &[3], PackError::Short);
        refused(16, &[1], PackError::Length { found: 1, expected: 104 });
        refused(24, &[0; 32], PackError::Chunk(Digest::ZERO));
        refused(60, &[0xab; 32], PackError::Chunk(Digest::from_bytes([0xab; 32])));
        refused(56, &[0], PackError::Frame(0));
        refused(56, &u32::MAX.to_le_bytes(), PackError::Frame(u32::MAX));
        refused(56, &[6], PackError::Length { found: 104, expected: 105 });
        for cut in 0..24 + 72 {
            assert!(Table::parse(&good[..cut], good.len() as u64).is_err(), "{cut}");
        }
        assert!(Table::parse(&good, good.len() as u64 + 1).is_err(), "something follows");
        let many = (0..=MAX_CHUNKS as u32).map(|n| (crate::digest_of(&n.to_le_bytes()), 1));
        assert_eq!(Table::new(many), Err(PackError::Count(513)));
    }

    proptest::proptest! {
        #[test]
        fn noise_never_panics_and_what_is_read_is_written_back(mut bytes in proptest::collection::vec(0_u8.., 0..200)) {
            if bytes.len() > 16 {
                bytes[..12].copy_from_slice(b"bp-pack\n\x01\0\0\0");
                let count = bytes[12] % 6;
                bytes[12..16].copy_from_slice(&[count, 0, 0, 0]);
            }
            if let Ok(table) = Table::parse(&bytes, bytes.len() as u64) {
                assert!(bytes.starts_with(&table.encode()));
            }
        }
    }
}
