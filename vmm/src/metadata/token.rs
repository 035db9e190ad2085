//! Tokens that nobody has to remember: each says until when it is good, and bears a keyed hash of that. A guest may ask
//! for as many as it likes.

use std::fmt::Write;
use std::io;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

/// Seconds for which a token may be good: Firecracker's and EC2's limits.
pub const TTL: RangeInclusive<u32> = 1..=21_600;
/// Bytes that are hashed: until when, in milliseconds, and a number that makes each token another.
const TEXT_LEN: usize = 16;

/// Makes and checks tokens.
pub struct Tokens {
    key: [u8; blake3::KEY_LEN],
    started: Instant,
    made: u64,
}

impl Tokens {
    /// Tokens that no other process takes for its own.
    pub(super) fn new() -> io::Result<Self> {
        let mut key = [0; blake3::KEY_LEN];
        getrandom::fill(&mut key).map_err(io::Error::other)?;
        Ok(Self { key, started: Instant::now(), made: 0 })
    }

    /// A token that is good for so many seconds from now on, which [`TTL`] contains.
    pub fn make(&mut self, ttl_seconds: u32) -> String {
        self.made += 1;
        let until = self.started.elapsed() + Duration::from_secs(ttl_seconds.into());
        let mut text = [0; TEXT_LEN];
        text[..8].copy_from_slice(&(until.as_millis() as u64).to_be_bytes());
        text[8..].copy_from_slice(&self.made.to_be_bytes());
        let mut token = String::with_capacity(2 * (TEXT_LEN + blake3::OUT_LEN));
        for byte in text.iter().chain(self.sign(&text).as_bytes()) {
            // A string takes all that is written to it.
            let _ = write!(token, "{byte:02x}");
        }
        token
    }

    /// Whether `token` was made here and is good still.
    pub fn is_good(&self, token: &str) -> bool {
        let mut bytes = [0; TEXT_LEN + blake3::OUT_LEN];
        if token.len() != 2 * bytes.len() || !token.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return false;
        }
        for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(&token[at..at + 2], 16).unwrap_or_default();
        }
        let (mut text, mut sign) = ([0; TEXT_LEN], [0; blake3::OUT_LEN]);
        text.copy_from_slice(&bytes[..TEXT_LEN]);
        sign.copy_from_slice(&bytes[TEXT_LEN..]);
        let until = text[..8].iter().fold(0, |until, byte| until << 8 | u64::from(*byte));
        // Hashes are compared in a time that does not depend on them.
        self.sign(&text) == blake3::Hash::from_bytes(sign) && (self.started.elapsed().as_millis() as u64) < until
    }

    fn sign(&self, text: &[u8; TEXT_LEN]) -> blake3::Hash {
        blake3::keyed_hash(&self.key, text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_a_time_and_in_one_process() {
        let mut tokens = Tokens::new().unwrap();
        let (token, other) = (tokens.make(60), tokens.make(60));
        assert_ne!(token, other);
        assert!(tokens.is_good(&token) && tokens.is_good(&other));
        assert!(!Tokens::new().unwrap().is_good(&token));
        for at in [0, 20, 40, token.len() - 1] {
            let mut changed = token.clone().into_bytes();
            changed[at] = if changed[at] == b'0' { b'1' } else { b'0' };
            assert!(!tokens.is_good(std::str::from_utf8(&changed).unwrap()), "{at}");
        }
        for wrong in ["", "x", &token[1..], &"é".repeat(48), &"g".repeat(96)] {
            assert!(!tokens.is_good(wrong), "{wrong}");
        }
        let over = tokens.make(0);
        assert!(!tokens.is_good(&over));
    }
}
