//! One of the three counters, in ticks of its clock: what it is told, what it counts, and what its output is.
//!
//! Unlike in the chip, a count that is written takes effect at once, where that first ends the period or the shot that runs; the
//! first of two bytes does nothing, where that stops a delay; and odd counts of mode 3 are read as odd.

/// Which bytes of a count are read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Low = 1,
    High = 2,
    /// The low one first.
    Both = 3,
}

/// What the counter counts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Since {
    /// Nothing: it waits for a count, or for its gate to rise.
    Never,
    /// This moment.
    Moment(u64),
    /// It stands still after so many ticks, as long as its gate is low.
    Held(u64),
}

/// When the output rises, in ticks after the count was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rises {
    /// At least 1.
    pub first: u64,
    /// And then each time after so many, at least 1.
    pub period: Option<u64>,
}

/// A counter. Moments are ticks since the clock began, and never go back.
#[derive(Debug)]
pub(super) struct Counter {
    access: Access,
    /// 0 to 5.
    mode: u8,
    /// Counts are of four decimal digits.
    bcd: bool,
    gate: bool,
    /// Written last, 1 to 65536; none since the control word.
    count: Option<u64>,
    since: Since,
    /// The first of two bytes of a count.
    half_written: Option<u8>,
    /// The second of two bytes is read next.
    half_read: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Counter {
    /// As firmware leaves it, which a kernel may go by: it counts all that it can, from moment 0 on.
    pub const fn new(gate: bool) -> Self {
        Self {
            access: Access::Both,
            mode: 3,
            bcd: false,
            gate,
            count: Some(0x1_0000),
            since: if gate { Since::Moment(0) } else { Since::Held(0) },
            half_written: None,
            half_read: false,
            latched_count: None,
            latched_status: None,
        }
    }

    /// Takes a control word. True if the counter was given a mode and waits for a count now.
    pub const fn control(&mut self, word: u8, now: u64) -> bool {
        let access = match word >> 4 & 3 {
            0 => {
                self.latch_count(now);
                return false;
            }
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        // Of three bits; modes 2 and 3 do not look at the first.
        let mode = match word >> 1 & 7 {
            6 => 2,
            7 => 3,
            mode => mode,
        };
        let bcd = word & 1 != 0;
        *self = Self { access, mode, bcd, count: None, since: Since::Never, ..Self::new(self.gate) };
        true
    }

    /// Keeps the count for the next read. One that is kept already stays.
    pub const fn latch_count(&mut self, now: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value(now));
            self.half_read = false;
        }
    }

    /// Keeps the status for the next read. One that is kept already stays.
    pub const fn latch_status(&mut self, now: u64) {
        if self.latched_status.is_none() {
            let bits = (self.output(now) as u8) << 7 | (self.count.is_none() as u8) << 6;
            self.latched_status = Some(bits | (self.access as u8) << 4 | self.mode << 1 | self.bcd as u8);
        }
    }

    pub fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.value(now)).to_le_bytes();
        let first = self.access == Access::Both && !self.half_read;
        self.half_read = first;
        if !first {
            self.latched_count = None;
        }
        if first || self.access == Access::Low { low } else { high }
    }

    /// Takes a byte of a count. True if it is complete.
    pub fn write(&mut self, byte: u8, now: u64) -> bool {
        let written = match (self.access, self.half_written.take()) {
            (Access::Low, _) => [byte, 0],
            (Access::High, _) => [0, byte],
            (Access::Both, Some(low)) => [low, byte],
            (Access::Both, None) => {
                self.half_written = Some(byte);
                return false;
            }
        };
        let written = u16::from_le_bytes(written);
        let count = if self.bcd { from_bcd(written) } else { written.into() };
        self.count = Some(if count == 0 { self.modulus() } else { count });
        self.since = match self.mode {
            1 | 5 => Since::Never,
            _ if self.gate => Since::Moment(now),
            _ => Since::Held(0),
        };
        true
    }

    /// Raises or lowers the gate.
    pub const fn set_gate(&mut self, gate: bool, now: u64) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        if self.count.is_none() {
            return;
        }
        self.since = match (self.mode, gate, self.since) {
            (0 | 4, true, Since::Held(elapsed)) => Since::Moment(now.saturating_sub(elapsed)),
            (1 | 2 | 3 | 5, true, _) => Since::Moment(now),
            (0 | 2 | 3 | 4, false, Since::Moment(begun)) => Since::Held(now.saturating_sub(begun)),
            (_, _, since) => since,
        };
    }

    /// The output.
    pub const fn output(&self, now: u64) -> bool {
        let (Some(count), Some(elapsed)) = (self.count, self.elapsed(now)) else { return self.mode != 0 };
        match self.mode {
            0 | 1 => elapsed >= count,
            2 => !self.gate || elapsed % count != count - 1,
            3 => !self.gate || elapsed % count < count.div_ceil(2),
            _ => elapsed != count,
        }
    }

    /// When the output rises, if the gate is high and stays so.
    pub const fn rises(&self) -> Option<Rises> {
        let Some(count) = self.count else { return None };
        match self.mode {
            0 => Some(Rises { first: count, period: None }),
            2 | 3 => Some(Rises { first: count, period: Some(count) }),
            4 => Some(Rises { first: count + 1, period: None }),
            // They wait for a gate that rises.
            _ => None,
        }
    }

    const fn elapsed(&self, now: u64) -> Option<u64> {
        match self.since {
            Since::Never => None,
            Since::Moment(begun) => Some(now.saturating_sub(begun)),
            Since::Held(elapsed) => Some(elapsed),
        }
    }

    /// What the count is, as it is read.
    const fn value(&self, now: u64) -> u16 {
        let Some(count) = self.count else { return 0 };
        let modulus = self.modulus();
        let elapsed = match self.elapsed(now) {
            Some(elapsed) => elapsed,
            None => 0,
        };
        let left = match self.mode {
            2 => count - elapsed % count,
            // By two, twice in each period.
            3 => count - (elapsed % count * 2) % count,
            _ => count + modulus - elapsed % modulus,
        } % modulus;
        if self.bcd { to_bcd(left) } else { left as u16 }
    }

    const fn modulus(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }
}

/// Four decimal digits. Of others, which the chip does not define, no more than it can count.
const fn from_bcd(digits: u16) -> u64 {
    let digits = digits as u64;
    let value = (digits >> 12) * 1000 + (digits >> 8 & 0xf) * 100 + (digits >> 4 & 0xf) * 10 + (digits & 0xf);
    if value > 10_000 { 10_000 } else { value }
}

/// Of a number below 10,000.
const fn to_bcd(value: u64) -> u16 {
    (value / 1000 * 0x1000 + value / 100 % 10 * 0x100 + value / 10 % 10 * 0x10 + value % 10) as u16
}
