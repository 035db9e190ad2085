//! Chunks.

use std::fs::File;
use std::io;

use bedplate_api::Digest;
use rustix::buffer::spare_capacity;

use super::{Store, StoreError};
use crate::digest_of;
use crate::frame::{self, CHUNK_SIZE, FrameError, MAX_FRAME_LEN, is_zero};

impl Store {
    /// Keeps the chunk `plain`, [`CHUNK_SIZE`] bytes at most, and returns its name: [`Digest::ZERO`], and nothing kept,
    /// when it is all zeros. A chunk that is there already is not written again.
    pub fn put_chunk(&self, plain: &[u8]) -> Result<Digest, StoreError> {
        self.keep_chunk(plain).map(|(digest, _)| digest)
    }

    /// [`Store::put_chunk`], and whether the chunk was not there before.
    pub(crate) fn keep_chunk(&self, plain: &[u8]) -> Result<(Digest, bool), StoreError> {
        if is_zero(plain) {
            return Ok((Digest::ZERO, false));
        }
        let digest = digest_of(plain);
        let new = !self.has_chunk(&digest);
        if new {
            let path = self.content_path("chunks", &digest);
            let frame = frame::compress(plain).map_err(StoreError::io("compress", &path))?;
            self.keep_frame(&digest, &frame)?;
        }
        Ok((digest, new))
    }

    /// Keeps a chunk that somebody sent: `bytes` is its frame, verified before it is kept.
    pub fn put_frame(&self, digest: &Digest, bytes: &[u8]) -> Result<(), StoreError> {
        let mut plain = frame::chunk_buffer();
        self.put_frame_with(digest, bytes, &mut plain)
    }

    /// [`Store::put_frame`] for many frames in a row: `scratch` is only room to work in.
    pub fn put_frame_with(
        &self,
        digest: &Digest,
        bytes: &[u8],
        scratch: &mut [u8; CHUNK_SIZE],
    ) -> Result<(), StoreError> {
        frame::decompress(digest, bytes, scratch)
            .map_err(|cause| StoreError::FrameRefused { digest: *digest, cause })?;
        // Also over a file that is there: it may be damaged, and this one is known to be whole.
        self.keep_frame(digest, bytes)
    }

    fn keep_frame(&self, digest: &Digest, bytes: &[u8]) -> Result<(), StoreError> {
        let mut draft = self.draft()?;
        draft.write(bytes)?;
        draft.publish_within(&self.content_path("chunks", digest))
    }

    /// Whether the chunk is there. It is verified when it is read.
    pub fn has_chunk(&self, digest: &Digest) -> bool {
        *digest == Digest::ZERO || self.content_path("chunks", digest).metadata().is_ok_and(|m| m.len() > 0)
    }

    /// Those of `digests` that are not here, in the same order, each once.
    pub fn missing(&self, digests: &[Digest]) -> Vec<Digest> {
        let mut seen = std::collections::HashSet::new();
        digests.iter().filter(|digest| seen.insert(**digest) && !self.has_chunk(digest)).copied().collect()
    }

    /// Reads and verifies a chunk to the front of `plain` and returns its length. A damaged one is set aside, so that it
    /// counts as missing from then on.
    pub fn read_chunk(&self, digest: &Digest, plain: &mut [u8; CHUNK_SIZE]) -> Result<usize, StoreError> {
        self.read_frame(digest, plain).map(|(_, len)| len)
    }

    /// The frame of a chunk as it is stored, verified.
    pub fn frame(&self, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        self.read_frame(digest, &mut frame::chunk_buffer()).map(|(frame, _)| frame)
    }

    /// Appends the frame of a chunk to `bytes` as it is stored and **not verified**: for who sends it to another store, which
    /// verifies what it keeps. Should it turn out damaged there, [`Store::check_chunk`] says whether it is so here.
    pub fn append_frame(&self, digest: &Digest, bytes: &mut Vec<u8>) -> Result<(), StoreError> {
        self.open_frame(digest, bytes).map(drop)
    }

    /// Verifies a chunk and keeps nothing of it. A damaged one is set aside.
    pub fn check_chunk(&self, digest: &Digest) -> Result<(), StoreError> {
        self.read_frame(digest, &mut frame::chunk_buffer()).map(drop)
    }

    fn read_frame(&self, digest: &Digest, plain: &mut [u8; CHUNK_SIZE]) -> Result<(Vec<u8>, usize), StoreError> {
        let mut bytes = Vec::new();
        let file = self.open_frame(digest, &mut bytes)?;
        match frame::decompress(digest, &bytes, plain) {
            Ok(len) => Ok((bytes, len)),
            Err(cause) => Err(self.damaged(digest, &file, cause)),
        }
    }

    /// Appends what the file of a chunk has to `bytes`, and returns that file. Of one that is too long for a frame it takes
    /// a byte more than a frame can have, so that whoever verifies it sees that.
    fn open_frame(&self, digest: &Digest, bytes: &mut Vec<u8>) -> Result<File, StoreError> {
        let path = self.content_path("chunks", digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::ChunkMissing { digest: *digest, path });
            }
            Err(e) => return Err(StoreError::io("read", &path)(e)),
        };
        let (begin, most) = (bytes.len(), MAX_FRAME_LEN + 1);
        // Room for all of it from the start, so that it is read in one piece.
        bytes.reserve(most);
        while bytes.len() - begin < most {
            match rustix::io::read(&file, spare_capacity(bytes)) {
                Ok(0) => break,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(StoreError::io("read", &path)(e.into())),
            }
        }
        // There may have been more room than was asked for.
        bytes.truncate(begin + most);
        if bytes.len() == begin {
            return Err(StoreError::ChunkMissing { digest: *digest, path });
        }
        Ok(file)
    }

    fn damaged(&self, digest: &Digest, file: &File, cause: FrameError) -> StoreError {
        let path = self.content_path("chunks", digest);
        self.set_aside(&path, file);
        StoreError::ChunkCorrupt { digest: *digest, path, cause }
    }
}
