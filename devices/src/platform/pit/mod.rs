//! The interval timer (Intel 8254) at ports 0x40 to 0x43: three counters of a clock of 1.193182 MHz. And port 0x61, through which
//! a PC has the third.
//!
//! Counter 0 is interrupt 0, an edge when its output rises; the gates of 0 and 1 are high. Counter 2 is the speaker's, which nobody
//! hears: port 0x61 is its gate and its output. Systems that have no better clock calibrate with that one.
//!
//! KVM offers one, too. It is not used: at the end of a VM it waits ten milliseconds and more, which is a third of an end's
//! time, it is a thread of the kernel for each VM, and it keeps AMD's processors from delivering interrupts themselves. Most
//! guests do no more with it than stop it: they have a local APIC, and a clock of KVM's.
//!
//! Interrupts that a guest had no processor for are not made up for.
//!
//! | a hostile driver may | answer |
//! | --- | --- |
//! | ask for a rate that there is no time for | one interrupt each 200 µs, at most; the count is read as it was written. Of delays each is an exit of its own |
//! | write half a count, read half, latch and leave it | the next control word forgets it |
//! | use digits that there are not | a count is at most what the counter can count |

mod alarm;
mod counter;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use self::alarm::{Alarm, Plan};
use self::counter::{Counter, Rises};
use super::IrqLine;
use crate::bus::BusDevice;

/// First port.
pub const PIT_PORT: u64 = 0x40;
/// Number of ports: three counters and the control word.
pub const PIT_LEN: u64 = 4;
/// System control port B.
pub const SPEAKER_PORT: u64 = 0x61;
/// Number of ports.
pub const SPEAKER_LEN: u64 = 1;

/// Ticks in a second.
const HZ: u128 = 1_193_182;
const NANOSECONDS: u128 = 1_000_000_000;
/// Ticks between two interrupts of a rate, at least, 200 µs: the host's time is not only this guest's.
const SHORTEST: u64 = 239;

const CONTROL: u64 = 3;
/// Control word: the read-back command.
const READ_BACK: u8 = 3;
const NO_COUNT: u8 = 1 << 5;
const NO_STATUS: u8 = 1 << 4;

/// Of port 0x61.
const GATE: u8 = 1 << 0;
const SPEAKER: u8 = 1 << 1;
const REFRESH: u8 = 1 << 4;
const OUTPUT: u8 = 1 << 5;
/// Memory was refreshed each 15 µs, and this bit changed each time.
const REFRESH_TICKS: u64 = 18;

/// The clock that they count.
#[derive(Debug, Clone, Copy)]
struct Clock {
    begun: Instant,
}

impl Clock {
    /// Ticks until now.
    fn now(self) -> u64 {
        // Half a million years fit in.
        (self.begun.elapsed().as_nanos() * HZ / NANOSECONDS) as u64
    }

    /// From now until `tick` is reached.
    fn until(self, tick: u64) -> Duration {
        let nanoseconds = (u128::from(tick) * NANOSECONDS).div_ceil(HZ);
        Duration::from_nanos(nanoseconds as u64).saturating_sub(self.begun.elapsed())
    }
}

/// The three counters.
pub struct Pit {
    counters: [Counter; 3],
    alarm: Alarm,
    clock: Clock,
}

impl Pit {
    /// `line` is interrupt 0. It is raised and lowered by a thread, which there is while counter 0 counts what the guest has
    /// written. If the host has no thread left, there are no interrupts until the guest writes another count.
    pub fn new(line: Box<dyn IrqLine>) -> Self {
        let counters = [Counter::new(true), Counter::new(true), Counter::new(false)];
        let clock = Clock { begun: Instant::now() };
        Self { counters, alarm: Alarm::new(line, clock), clock }
    }

    fn now(&self) -> u64 {
        self.clock.now()
    }

    fn control(&mut self, word: u8, now: u64) {
        let number = word >> 6;
        if number == READ_BACK {
            for (number, counter) in self.counters.iter_mut().enumerate() {
                if word & 2 << number != 0 {
                    // The status is read first.
                    if word & NO_COUNT == 0 {
                        counter.latch_count(now);
                    }
                    if word & NO_STATUS == 0 {
                        counter.latch_status(now);
                    }
                }
            }
        } else if self.counters[usize::from(number)].control(word, now) && number == 0 {
            self.alarm.stop();
        }
    }

    /// A count was written at `now`: counter 0 interrupts when its output rises.
    fn ring(&mut self, now: u64) {
        let Some(Rises { first, period }) = self.counters[0].rises() else { return };
        // Each time, or each second time, or as often as there is time for.
        let period = period.map(|period| period * SHORTEST.div_ceil(period));
        // Refused: see [`Pit::new`].
        let _ = self.alarm.set(Plan { at: now + period.unwrap_or(first), period });
    }
}

impl BusDevice for Pit {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let now = self.now();
        match (data, self.counters.get_mut(offset as usize)) {
            ([byte], Some(counter)) => *byte = counter.read(now),
            (data, _) => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let now = self.now();
        match (data, self.counters.get_mut(offset as usize)) {
            ([byte], Some(counter)) => {
                let complete = counter.write(*byte, now);
                if complete && offset == 0 {
                    self.ring(now);
                }
            }
            ([word], None) if offset == CONTROL => self.control(*word, now),
            _ => {}
        }
    }
}

/// System control port B, as far as it has to do with the timer.
pub struct Speaker {
    pit: Arc<Mutex<Pit>>,
    /// The bits that are read as they were written.
    bits: u8,
}

impl Speaker {
    /// That of counter 2 of `pit`.
    pub const fn new(pit: Arc<Mutex<Pit>>) -> Self {
        Self { pit, bits: 0 }
    }
}

impl BusDevice for Speaker {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        let [byte] = data else { return data.fill(0xff) };
        let pit = self.pit.lock().unwrap_or_else(|e| e.into_inner());
        let now = pit.now();
        let refresh = !(now / REFRESH_TICKS).is_multiple_of(2);
        let output = pit.counters[2].output(now);
        *byte = self.bits | if refresh { REFRESH } else { 0 } | if output { OUTPUT } else { 0 };
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let [byte] = data else { return };
        self.bits = byte & (GATE | SPEAKER);
        let mut pit = self.pit.lock().unwrap_or_else(|e| e.into_inner());
        let now = pit.now();
        pit.counters[2].set_gate(byte & GATE != 0, now);
    }
}

#[cfg(test)]
mod tests;
