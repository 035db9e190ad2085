//! One chunk as it is stored and sent: a zstd frame of its plain bytes.
//!
//! zstd keeps bytes that do not compress as they are inside the frame, so a frame is never much longer than its chunk.
//! Decompression writes into a buffer of one chunk and fails when more would come: a frame cannot be a bomb.

use std::cell::RefCell;
use std::io;

use bedplate_api::Digest;
use zstd::bulk::{Compressor, Decompressor};

use crate::digest_of;

/// Bytes of a part that one chunk covers; the last chunk of a part may be shorter. Part of the format: changing it
/// changes every digest. `docs/image-format.md` has the measurements behind it.
pub const CHUNK_SIZE: usize = 64 << 10;

/// No frame of a chunk is longer. zstd's own bound for 64 KiB is 256 bytes less.
pub const MAX_FRAME_LEN: usize = CHUNK_SIZE + 512;

/// Fast enough to keep up with a disk, and within a few per cent of the levels that are not.
const LEVEL: i32 = 3;

/// Bytes that are not the chunk that they are said to be.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// More than any frame can have.
    #[error("it is {len} bytes long and no chunk's frame is longer than {MAX_FRAME_LEN}")]
    TooLong {
        /// Length of what was given.
        len: usize,
    },
    /// Not a zstd frame of at most one chunk.
    #[error("it does not decompress to a chunk ({cause})")]
    Garbled {
        /// What zstd says.
        cause: io::Error,
    },
    /// A chunk, but another one.
    #[error("its content has the digest {found}")]
    Mismatch {
        /// Digest of the content.
        found: Digest,
    },
}

struct Codec {
    compressor: Compressor<'static>,
    decompressor: Decompressor<'static>,
}

thread_local! {
    // The contexts are some hundred KiB and dear to make, so each thread keeps one pair.
    static CODEC: RefCell<Option<Codec>> = const { RefCell::new(None) };
}

fn with_codec<T>(work: impl FnOnce(&mut Codec) -> io::Result<T>) -> io::Result<T> {
    CODEC.with_borrow_mut(|slot| {
        let codec = match slot {
            Some(codec) => codec,
            None => slot.insert(Codec { compressor: Compressor::new(LEVEL)?, decompressor: Decompressor::new()? }),
        };
        work(codec)
    })
}

/// The frame of one chunk.
pub fn compress(plain: &[u8]) -> io::Result<Vec<u8>> {
    with_codec(|codec| codec.compressor.compress(plain))
}

/// Decompresses `frame` to the front of `chunk`, checks that it is the chunk named `digest`, and returns its length.
/// After an error the content of `chunk` means nothing.
pub fn decompress(digest: &Digest, frame: &[u8], chunk: &mut [u8; CHUNK_SIZE]) -> Result<usize, FrameError> {
    if frame.len() > MAX_FRAME_LEN {
        return Err(FrameError::TooLong { len: frame.len() });
    }
    let len = with_codec(|codec| codec.decompressor.decompress_to_buffer(frame, &mut chunk[..]))
        .map_err(|cause| FrameError::Garbled { cause })?;
    let found = digest_of(&chunk[..len]);
    if found != *digest {
        return Err(FrameError::Mismatch { found });
    }
    Ok(len)
}

/// A buffer for [`decompress`].
pub fn chunk_buffer() -> Box<[u8; CHUNK_SIZE]> {
    // Through a Vec, because a boxed array literal would pass 64 KiB over the stack.
    match vec![0; CHUNK_SIZE].into_boxed_slice().try_into() {
        Ok(buffer) => buffer,
        Err(_) => unreachable!("the slice was made with exactly this length"),
    }
}

/// Whether `bytes` are all zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Words of 32 bytes become wide compares, which matters because every byte of an import passes here.
    let (words, rest) = bytes.as_chunks::<32>();
    words.iter().all(|word| *word == [0; 32]) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_of_every_kind_of_content() {
        let noise: Vec<u8> = (0..CHUNK_SIZE as u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        for plain in [&[][..], b"x", &[7; CHUNK_SIZE], &noise[..CHUNK_SIZE]] {
            let frame = compress(plain).unwrap();
            assert!(frame.len() <= MAX_FRAME_LEN);
            let mut out = chunk_buffer();
            assert_eq!(decompress(&digest_of(plain), &frame, &mut out).unwrap(), plain.len());
            assert_eq!(&out[..plain.len()], plain);
        }
    }

    #[test]
    fn bombs_and_lies_are_refused() {
        let mut out = chunk_buffer();
        let bomb = compress(&vec![0; 1 << 30]).unwrap();
        assert!(bomb.len() < MAX_FRAME_LEN, "the bomb is small enough to get as far as zstd");
        let digest = digest_of(b"x");
        assert!(matches!(decompress(&digest, &bomb, &mut out), Err(FrameError::Garbled { .. })));
        assert!(matches!(decompress(&digest, b"noise", &mut out), Err(FrameError::Garbled { .. })));
        assert!(matches!(decompress(&digest, &[0; MAX_FRAME_LEN + 1], &mut out), Err(FrameError::TooLong { .. })));
        let other = compress(b"y").unwrap();
        assert!(matches!(decompress(&digest, &other, &mut out), Err(FrameError::Mismatch { .. })));
    }

    #[test]
    fn zero_is_seen_at_every_place() {
        let mut bytes = [0; 100];
        assert!(is_zero(&bytes));
        for at in 0..bytes.len() {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "byte {at}");
            bytes[at] = 0;
        }
    }
}
