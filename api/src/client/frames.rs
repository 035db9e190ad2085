//! The stream of chunks that `POST /v1/chunks/fetch` answers with and `POST /v1/chunks` takes.

use std::convert::Infallible;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::{Stream, StreamExt};

use crate::Digest;
use crate::image::{FRAME_HEADER_LEN, MAX_FRAME_LEN};

/// A stream of chunks that cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// A length that no chunk can have.
    #[error("a frame claims {0} bytes; at most {MAX_FRAME_LEN} are possible")]
    TooLong(usize),
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame, {0} bytes into it")]
    Truncated(usize),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(String),
}

/// Cuts a stream of bytes into chunks as they arrive; holds one frame at a time. Nothing is verified here: the digest is
/// what the peer claims.
pub struct Frames<S> {
    stream: S,
    pending: BytesMut,
}

impl<S, E> Frames<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    E: std::fmt::Display,
{
    /// Frames of `stream`.
    pub fn new(stream: S) -> Self {
        Self { stream, pending: BytesMut::new() }
    }

    /// The next chunk: its claimed digest and its compressed bytes. `None` at the end of the stream.
    ///
    /// # Errors
    /// See [`FrameError`]; the stream is of no further use then.
    pub async fn next(&mut self) -> Result<Option<(Digest, Bytes)>, FrameError> {
        loop {
            if let Some(frame) = self.take()? {
                return Ok(Some(frame));
            }
            match self.stream.next().await {
                Some(Ok(bytes)) => self.pending.put(bytes),
                Some(Err(e)) => return Err(FrameError::Broken(e.to_string())),
                None if self.pending.is_empty() => return Ok(None),
                None => return Err(FrameError::Truncated(self.pending.len())),
            }
        }
    }

    fn take(&mut self) -> Result<Option<(Digest, Bytes)>, FrameError> {
        let Some((header, _)) = self.pending.split_first_chunk::<FRAME_HEADER_LEN>() else { return Ok(None) };
        let mut digest = [0; 32];
        digest.copy_from_slice(&header[..32]);
        let len = u32::from_le_bytes([header[32], header[33], header[34], header[35]]) as usize;
        if len > MAX_FRAME_LEN {
            return Err(FrameError::TooLong(len));
        }
        if self.pending.len() < FRAME_HEADER_LEN + len {
            // At once, so that what is there is not moved again with each piece that comes.
            self.pending.reserve(FRAME_HEADER_LEN + len - self.pending.len());
            return Ok(None);
        }
        self.pending.advance(FRAME_HEADER_LEN);
        Ok(Some((Digest::from_bytes(digest), self.pending.split_to(len).freeze())))
    }
}

/// The frame of one chunk, `compressed` being at most [`MAX_FRAME_LEN`] bytes.
pub fn encode_frame(digest: &Digest, compressed: &[u8]) -> Bytes {
    let mut wire = Vec::with_capacity(FRAME_HEADER_LEN + compressed.len());
    let Ok(()) = append_frame(&mut wire, digest, |wire| {
        wire.extend_from_slice(compressed);
        Ok::<_, Infallible>(())
    });
    wire.into()
}

/// Appends the frame of one chunk to `wire`, where `compressed` appends at most [`MAX_FRAME_LEN`] bytes. If that fails, `wire`
/// is as it was.
///
/// # Errors
/// What `compressed` says.
pub fn append_frame<E>(
    wire: &mut Vec<u8>,
    digest: &Digest,
    compressed: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    let begin = wire.len();
    wire.extend_from_slice(digest.as_bytes());
    wire.extend_from_slice(&[0; size_of::<u32>()]);
    let body = wire.len();
    if let Err(error) = compressed(wire) {
        wire.truncate(begin);
        return Err(error);
    }
    // The store never holds a frame that comes near 4 GiB.
    let len = u32::try_from(wire.len() - body).unwrap_or(u32::MAX);
    wire[body - size_of::<u32>()..body].copy_from_slice(&len.to_le_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read_all(pieces: Vec<Bytes>) -> Result<Vec<(Digest, Bytes)>, FrameError> {
        let mut frames = Frames::new(futures_util::stream::iter(pieces.into_iter().map(Ok::<_, FrameError>)));
        let mut all = Vec::new();
        while let Some(frame) = frames.next().await? {
            all.push(frame);
        }
        Ok(all)
    }

    #[tokio::test]
    async fn frames_survive_any_cut_and_a_short_stream_is_noticed() {
        let chunks = [(Digest::from_bytes([1; 32]), &b"one"[..]), (Digest::from_bytes([2; 32]), &[][..])];
        let wire: Vec<u8> = chunks.iter().flat_map(|(d, c)| encode_frame(d, c)).collect();
        for cut in 0..=wire.len() {
            let (a, b) = wire.split_at(cut);
            let read = read_all(vec![Bytes::copy_from_slice(a), Bytes::copy_from_slice(b)]).await.unwrap();
            assert_eq!(read.len(), 2);
            assert!(read.iter().zip(&chunks).all(|(got, want)| got.0 == want.0 && got.1 == want.1));
            let whole_frames = cut == 0 || cut == FRAME_HEADER_LEN + 3 || cut == wire.len();
            assert_eq!(read_all(vec![Bytes::copy_from_slice(a)]).await.is_ok(), whole_frames, "cut at {cut}");
        }
    }

    #[test]
    fn a_frame_that_fails_leaves_nothing_behind() {
        let mut wire = encode_frame(&Digest::ZERO, b"whole").to_vec();
        let before = wire.clone();
        let failing = |wire: &mut Vec<u8>| {
            wire.push(1);
            Err("no")
        };
        assert_eq!(append_frame(&mut wire, &Digest::from_bytes([1; 32]), failing), Err("no"));
        assert_eq!(wire, before);
    }

    #[tokio::test]
    async fn an_absurd_length_is_refused_before_it_is_buffered() {
        let mut wire = encode_frame(&Digest::ZERO, b"").to_vec();
        wire[32..].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(read_all(vec![wire.into()]).await, Err(FrameError::TooLong(_))));
    }
}
