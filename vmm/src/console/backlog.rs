//! The last bytes of a stream.

use std::collections::VecDeque;

/// Keeps the last `limit` bytes.
pub(super) struct Backlog {
    bytes: VecDeque<u8>,
    limit: usize,
}

impl Backlog {
    pub fn new(limit: usize) -> Self {
        Self { bytes: VecDeque::new(), limit }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(self.limit)..];
        let excess = (self.bytes.len() + bytes.len()).saturating_sub(self.limit);
        self.bytes.drain(..excess);
        self.bytes.extend(bytes);
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The oldest bytes, as many as lie together.
    pub fn front(&self) -> &[u8] {
        self.bytes.as_slices().0
    }

    pub fn consume(&mut self, len: usize) {
        self.bytes.drain(..len);
    }

    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes.iter().copied().collect()
    }
}
