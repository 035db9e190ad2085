//! Between a VM and who can get what its disk's image lacks on this host: a stream on a Unix socket.
//!
//! The VM sends [`Note`]s, each [`Note::LEN`] bytes; for each [`Note::Wants`] it gets one [`Arrival`] of [`Arrival::LEN`]
//! bytes, in any order and as late as need be. The chunks themselves go through the image store, never through here: what
//! is said here needs no trust, because a chunk is verified when it is read. Numbers are little-endian and count the chunks
//! of the image's part `disk`.

use serde::{Deserialize, Serialize};

/// Most chunks that a VM may want at a time; it has to wait for arrivals before it wants more.
pub const MAX_WANTED: usize = 64;

/// For so long after its start a VM tells which chunks it reads, in seconds: the time in which guests boot.
pub const NOTED_SECONDS: u64 = 90;

/// Who gets the chunks that the store lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkSource {
    /// Unix socket; it may be away for a while, and is connected to when it is needed.
    pub socket: String,
    /// So many seconds a request of the guest waits for a chunk before it fails.
    #[serde(default = "default_wait")]
    pub wait_seconds: u32,
}

/// A minute: longer than the restart of an agent or a switch, and shorter than the patience of people.
pub const DEFAULT_WAIT_SECONDS: u32 = 60;

const fn default_wait() -> u32 {
    DEFAULT_WAIT_SECONDS
}

/// What a VM says of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Note {
    /// The store lacks it, or has it damaged, and the guest waits for it.
    Wants(u64),
    /// It was read, for the first time since the start: for who wants to know what a boot needs.
    Read(u64),
}

impl Note {
    /// Bytes of one: its kind, then the chunk's number.
    pub const LEN: usize = 9;

    /// Its bytes.
    pub fn encode(self) -> [u8; Self::LEN] {
        let (kind, number) = match self {
            Self::Wants(number) => (0, number),
            Self::Read(number) => (1, number),
        };
        tagged(kind, number)
    }

    /// Reads one; `None` for a kind that this version does not know.
    pub fn parse(bytes: [u8; Self::LEN]) -> Option<Self> {
        let (kind, number) = untagged(bytes);
        match kind {
            0 => Some(Self::Wants(number)),
            1 => Some(Self::Read(number)),
            _ => None,
        }
    }
}

/// What became of a chunk that was wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// The store has it.
    Here(u64),
    /// The image has no such chunk.
    Refused(u64),
}

impl Arrival {
    /// Bytes of one: what became of it, then the chunk's number.
    pub const LEN: usize = 9;

    /// Its bytes.
    pub fn encode(self) -> [u8; Self::LEN] {
        let (kind, number) = match self {
            Self::Here(number) => (0, number),
            Self::Refused(number) => (1, number),
        };
        tagged(kind, number)
    }

    /// Reads one; `None` for an outcome that this version does not know.
    pub fn parse(bytes: [u8; Self::LEN]) -> Option<Self> {
        let (kind, number) = untagged(bytes);
        match kind {
            0 => Some(Self::Here(number)),
            1 => Some(Self::Refused(number)),
            _ => None,
        }
    }
}

fn tagged(kind: u8, number: u64) -> [u8; 9] {
    let mut bytes = [kind; 9];
    bytes[1..].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn untagged(bytes: [u8; 9]) -> (u8, u64) {
    let [kind, a, b, c, d, e, f, g, h] = bytes;
    (kind, u64::from_le_bytes([a, b, c, d, e, f, g, h]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_what_is_heard_and_nothing_else() {
        for note in [Note::Wants(0), Note::Read(u64::MAX), Note::Wants(0x0102_0304)] {
            assert_eq!(Note::parse(note.encode()), Some(note));
        }
        for arrival in [Arrival::Here(7), Arrival::Refused(u64::MAX)] {
            assert_eq!(Arrival::parse(arrival.encode()), Some(arrival));
        }
        assert_eq!(Note::Wants(0x0102).encode(), [0, 2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!((Note::parse([2; 9]), Arrival::parse([0xff; 9])), (None, None));
    }
}
