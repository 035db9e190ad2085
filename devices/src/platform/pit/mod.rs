//! The interval timer (Intel 8254) at ports 0x40 to 0x43: three counters of a clock of 1.193182 MHz. And port 0x61, through which
//! a PC has the third.
//!
//! Counter 0 is interrupt 0, an edge when its output rises; the gates of 0 and 1 are high. Counter 2 is the speaker's, which nobody
//! hears: port 0x61 is its gate and its output. Systems that have no better clock calibrate with that one.
//!
//! KVM offers one, too. It is not used: at the end of a VM it waits ten milliseconds and more, which is a third of an end's
//! time, it is a thread of the kernel for each VM, and it keeps AMD's processors from delivering interrupts themselves. Most
//! guests do not use it: they have a local APIC, and a clock of KVM's.
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

use self::alarm::Alarm;
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
/// Between two interrupts of a rate, at least: the host's time is not only this guest's.
const SHORTEST: Duration = Duration::from_micros(200);

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

/// The three counters.
pub struct Pit {
    counters: [Counter; 3],
    alarm: Alarm,
    begun: Instant,
}

impl Pit {
    /// `line` is interrupt 0. It is raised and lowered by a thread, which there is once the guest wants interrupts. If the host
    /// has no thread left, there are none until the guest asks again.
    pub fn new(line: Box<dyn IrqLine>) -> Self {
        let counters = [Counter::new(true), Counter::new(true), Counter::new(false)];
        Self { counters, alarm: Alarm::new(line), begun: Instant::now() }
    }

    fn now(&self) -> u64 {
        // A thousand years fit in.
        (self.begun.elapsed().as_nanos() * HZ / NANOSECONDS) as u64
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

    fn ring(&mut self) {
        let Some(Rises { first, period }) = self.counters[0].rises() else { return };
        let period = period.map(|period| time(period).max(SHORTEST));
        // Refused: see [`Pit::new`].
        let _ = self.alarm.set(period.unwrap_or(time(first)), period);
    }
}

/// Of so many ticks.
fn time(ticks: u64) -> Duration {
    // 65,537 ticks are less than a tenth of a second.
    let nanoseconds = u128::from(ticks) * NANOSECONDS / HZ;
    Duration::from_nanos(nanoseconds as u64)
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
                    self.ring();
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
