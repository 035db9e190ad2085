//! What the guest says of its memory, Virtio 1.2, 5.5.6.3.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::virtio::View;

/// Kinds of numbers that are known, by tag.
pub const STAT_COUNT: usize = 16;
/// Entries of one report that are looked at.
const MAX_ENTRIES: usize = 64;
/// Stands for a number that the guest has not given. No count of bytes or events reaches it.
const ABSENT: u64 = u64::MAX;

/// The latest numbers, by tag. Written by the worker, read by anybody.
pub(super) struct Stats([AtomicU64; STAT_COUNT]);

impl Default for Stats {
    fn default() -> Self {
        Self([const { AtomicU64::new(ABSENT) }; STAT_COUNT])
    }
}

impl Stats {
    /// Takes over a report; returns false if it is not one. Unknown tags are of later versions, and are passed over.
    pub(super) fn update(&self, report: View<'_>) -> bool {
        let mut rest = report;
        for _ in 0..MAX_ENTRIES {
            let Some((tag, after)) = rest.split_value::<u16>() else { break };
            let Some((value, after)) = after.split_value::<u64>() else { return false };
            if let Some(stat) = self.0.get(usize::from(u16::from_le(tag))) {
                stat.store(u64::from_le(value), Ordering::Relaxed);
            }
            rest = after;
        }
        rest.is_empty()
    }

    /// The numbers that the guest has given.
    pub(super) fn values(&self) -> [Option<u64>; STAT_COUNT] {
        std::array::from_fn(|tag| Some(self.0[tag].load(Ordering::Relaxed)).filter(|value| *value != ABSENT))
    }
}
