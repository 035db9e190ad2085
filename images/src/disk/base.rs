//! Reading the image under a disk: chunks, decompressed and verified, a few of them kept.

use std::io;

use super::overlay::Base;
use bedplate_api::Digest;

use crate::StoreError;
use crate::frame::{self, CHUNK_SIZE};
use crate::store::PartReader;

/// Plain chunks kept: 4 MiB. Guests read ahead in order, so what this saves is decompressing one chunk sixteen times for
/// sixteen reads of 4 KiB; the guest's own page cache does the rest.
const KEPT: usize = 64;

/// A chunk that was read.
struct Kept {
    number: u64,
    /// When it was last asked for, counted in requests.
    used: u64,
    /// As many bytes as the chunk has; the buffer's rest means nothing.
    len: usize,
    plain: Box<[u8; CHUNK_SIZE]>,
}

/// One part of an image as something to read from.
pub(super) struct Image {
    reader: PartReader,
    kept: Vec<Kept>,
    requests: u64,
    /// Numbers of the chunks that were read from the store since somebody asked; none while nobody does.
    loaded: Option<Vec<u64>>,
}

/// Numbers kept for who asks what was read: more than one request reads, so that only who never asks loses some.
const MAX_LOADED: usize = 1024;

impl Image {
    pub(super) const fn new(reader: PartReader) -> Self {
        Self { reader, kept: Vec::new(), requests: 0, loaded: None }
    }

    /// From now on notes which chunks are read, or no longer.
    pub(super) fn note_loads(&mut self, noted: bool) {
        self.loaded = noted.then(Vec::new);
    }

    /// The chunks that were read from the store since the last call, in order.
    pub(super) fn take_loaded(&mut self) -> Vec<u64> {
        self.loaded.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The first `most` chunks between the bytes `start` and `end` that are not in the store, by number.
    pub(super) fn missing(&self, start: u64, end: u64, most: usize) -> Result<Vec<u64>, StoreError> {
        let mut missing = Vec::new();
        for number in start / CHUNK_SIZE as u64..end.div_ceil(CHUNK_SIZE as u64) {
            if missing.len() == most {
                break;
            }
            if !self.reader.has(number)? {
                missing.push(number);
            }
        }
        Ok(missing)
    }

    /// The bytes of chunk `number`; `None` when they are all zeros.
    fn chunk(&mut self, number: u64) -> Result<Option<&[u8]>, StoreError> {
        self.requests += 1;
        // Sixty-four compares are nothing beside one chunk's decompression, and need no second structure.
        let slot = match self.kept.iter().position(|kept| kept.number == number) {
            Some(slot) => slot,
            None => match self.load(number)? {
                Some(slot) => slot,
                None => return Ok(None),
            },
        };
        let kept = &mut self.kept[slot];
        kept.used = self.requests;
        Ok(Some(&kept.plain[..kept.len]))
    }

    /// Reads chunk `number` into the slot that was not asked for the longest.
    fn load(&mut self, number: u64) -> Result<Option<usize>, StoreError> {
        let digest = self.reader.digest(number)?;
        if digest == Digest::ZERO {
            return Ok(None);
        }
        let oldest = self.kept.iter().enumerate().min_by_key(|(_, kept)| kept.used).map(|(slot, _)| slot);
        let slot = match oldest {
            Some(slot) if self.kept.len() == KEPT => slot,
            _ => {
                self.kept.push(Kept { number: u64::MAX, used: 0, len: 0, plain: frame::chunk_buffer() });
                self.kept.len() - 1
            }
        };
        let kept = &mut self.kept[slot];
        // Until the new chunk is verified, the slot holds nothing: a failed read leaves rubbish in the buffer.
        kept.number = u64::MAX;
        kept.used = 0;
        kept.len = self.reader.read(number, &digest, &mut kept.plain)?;
        kept.number = number;
        if let Some(loaded) = self.loaded.as_mut().filter(|loaded| loaded.len() < MAX_LOADED) {
            loaded.push(number);
        }
        Ok(Some(slot))
    }
}

impl Base for Image {
    fn read(&mut self, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            let at = (offset % CHUNK_SIZE as u64) as usize;
            let take = bytes.len().min(CHUNK_SIZE - at);
            let (now, rest) = bytes.split_at_mut(take);
            match self.chunk(offset / CHUNK_SIZE as u64).map_err(io_error)? {
                // The part's last chunk is short, and so is the disk there: the overlay checked the range.
                Some(plain) => now.copy_from_slice(&plain[at..at + take]),
                None => now.fill(0),
            }
            bytes = rest;
            offset += take as u64;
        }
        Ok(())
    }
}

/// Keeps the cause apart for who must tell missing (fetch it) from damaged (fetch it, and be worried).
fn io_error(error: StoreError) -> io::Error {
    fn kind(error: &StoreError) -> io::ErrorKind {
        match error {
            StoreError::InPart { cause, .. } => kind(cause),
            StoreError::ChunkMissing { .. } => io::ErrorKind::NotFound,
            StoreError::ChunkCorrupt { .. } | StoreError::ChunkLength { .. } => io::ErrorKind::InvalidData,
            _ => io::ErrorKind::Other,
        }
    }
    io::Error::new(kind(&error), error)
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image").field("reader", &self.reader).field("kept", &self.kept.len()).finish()
    }
}
