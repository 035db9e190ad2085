//! Addresses for files that come while the VM runs, and those that others have left behind.

use std::ops::Range;

use super::MemoryError;
use super::layout::SECTION;

/// What is free: whole sections, so that no two kinds of memory share one.
pub struct Room {
    /// In order, with something between any two.
    free: Vec<Range<u64>>,
}

impl Room {
    /// All of `range`, which begins and ends with a section.
    pub fn new(range: Range<u64>) -> Self {
        Self { free: vec![range] }
    }

    /// The lowest place for `len` bytes.
    ///
    /// # Errors
    /// None is long enough.
    pub fn take(&mut self, len: u64) -> Result<Range<u64>, MemoryError> {
        let free_len = |range: &Range<u64>| range.end - range.start;
        let Some(free) = self.free.iter_mut().find(|range| free_len(range) >= len) else {
            let longest = self.free.iter().map(free_len).max().unwrap_or(0);
            return Err(MemoryError::NoRoom { asked_mib: len >> 20, free_mib: longest >> 20 });
        };
        let start = free.start;
        // Cannot pass the end, which is a section's.
        free.start = (start + len).next_multiple_of(SECTION);
        self.free.retain(|range| !range.is_empty());
        Ok(start..start + len)
    }

    /// A place that was taken, here or by [`super::Ram::reserve`], is free again.
    pub fn give(&mut self, range: &Range<u64>) {
        self.free.push(range.start..range.end.next_multiple_of(SECTION));
        self.free.sort_by_key(|range| range.start);
        self.free.dedup_by(|next, before| {
            let touches = next.start == before.end;
            if touches {
                before.end = next.end;
            }
            touches
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_taken_again_and_holes_grow_together() {
        let mut room = Room::new(0x100 * SECTION..0x110 * SECTION);
        let [one, two, three] = [1, SECTION + 1, SECTION].map(|len| room.take(len).unwrap());
        assert_eq!((one.clone(), two.start), (0x100 * SECTION..0x100 * SECTION + 1, 0x101 * SECTION));
        assert_eq!(three.start, 0x103 * SECTION);
        room.give(&two);
        assert_eq!(room.take(2 * SECTION + 1).unwrap().start, 0x104 * SECTION, "the hole is too short");
        room.give(&one);
        assert_eq!(room.take(3 * SECTION).unwrap().start, one.start);
        // From elsewhere.
        room.give(&(0x10 * SECTION..0x10 * SECTION + 1));
        assert_eq!(room.take(SECTION).unwrap().start, 0x10 * SECTION);
    }

    #[test]
    fn what_does_not_fit_is_refused_and_changes_nothing() {
        let mut room = Room::new(0..4 * SECTION);
        let words = room.take(4 * SECTION + 1).unwrap_err().to_string();
        assert!(words.contains("512 MiB are the most"), "{words}");
        assert!(room.take(u64::MAX).is_err());
        let all = room.take(4 * SECTION).unwrap();
        assert!(matches!(room.take(1), Err(MemoryError::NoRoom { free_mib: 0, .. })));
        room.give(&all);
        assert_eq!(room.take(4 * SECTION).unwrap(), all);
        let mut none = Room::new(SECTION..SECTION);
        assert!(none.take(1).is_err());
    }
}
