//! The battery-backed clock and its RAM (MC146818), at ports 0x70 and 0x71.
//!
//! Time is BCD, 24 hours, UTC: the host's clock plus whatever the guest set it apart by. No alarm and no periodic
//! interrupt are offered; the DSDT gives the device no interrupt.
//!
//! | a hostile driver may | answer |
//! | --- | --- |
//! | set any date, also one that does not exist | only the difference to the host's clock is kept, bounded by two BCD digits a field |
//! | index beyond the RAM | the top bit of the index masks NMIs on a PC and is dropped |

use std::time::{SystemTime, UNIX_EPOCH};

use super::calendar::Moment;
use crate::bus::BusDevice;

/// Number of ports: index and data.
pub const RTC_LEN: u64 = 2;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
/// In KiB.
const BASE_MEMORY: usize = 0x15;
/// In KiB, from 1 MiB on, at most 63 MiB; twice.
const EXTENDED_MEMORY: usize = 0x17;
const EXTENDED_MEMORY_SEEN: usize = 0x30;
/// In units of 64 KiB.
const MEMORY_ABOVE_16_MIB: usize = 0x34;
/// In units of 64 KiB, 3 bytes.
const MEMORY_ABOVE_4_GIB: usize = 0x5b;
const MIB: u64 = 1 << 20;
/// Where the FADT says that the century is.
const CENTURY: u8 = 0x32;

/// 32.768 kHz time base; no update is ever in progress when the guest looks.
const A_VALUE: u8 = 0x20;
/// The guest sets the time: it stands still.
const B_SET: u8 = 0x80;
const B_24_HOURS: u8 = 0x02;
const D_BATTERY_GOOD: u8 = 0x80;

/// The clock.
pub struct Rtc {
    now: fn() -> i64,
    index: u8,
    ram: [u8; 128],
    /// The guest's clock minus the host's, in seconds.
    ahead: i64,
    /// While `B_SET`: the time that the guest is putting together.
    setting: Option<Moment>,
}

fn host_seconds() -> i64 {
    // A host whose clock stands before 1970 shows 1970.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(0))
}

fn to_bcd(value: i64) -> u8 {
    // At most 99 in all uses.
    (value / 10 % 10 * 16 + value % 10) as u8
}

fn from_bcd(value: u8) -> u8 {
    // 0xff counts as 165: out of range, and `Moment` copes.
    (value >> 4) * 10 + (value & 0xf)
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

impl Rtc {
    /// A clock that shows the host's time in UTC.
    pub fn new() -> Self {
        Self { now: host_seconds, index: 0, ram: [0; 128], ahead: 0, setting: None }
    }

    /// The same, with the sizes of RAM where firmware of a PC looks for them, if it is not told otherwise: `low` bytes from
    /// address 0, `high` bytes from 4 GiB.
    pub fn with_memory(low: u64, high: u64) -> Self {
        let mut clock = Self::new();
        let kib = (low.saturating_sub(MIB) >> 10).min(0xfc00);
        let above_16_mib = low.saturating_sub(16 * MIB) >> 16;
        for (index, value, len) in [
            (BASE_MEMORY, 640, 2),
            (EXTENDED_MEMORY, kib, 2),
            (EXTENDED_MEMORY_SEEN, kib, 2),
            (MEMORY_ABOVE_16_MIB, above_16_mib.min(0xffff), 2),
            (MEMORY_ABOVE_4_GIB, (high >> 16).min(0xff_ffff), 3),
        ] {
            clock.ram[index..index + len].copy_from_slice(&value.to_le_bytes()[..len]);
        }
        clock
    }

    fn moment(&self) -> Moment {
        self.setting.unwrap_or_else(|| Moment::from_unix((self.now)().saturating_add(self.ahead)))
    }

    fn read_register(&self) -> u8 {
        let moment = self.moment();
        match self.index {
            SECONDS => to_bcd(moment.second.into()),
            MINUTES => to_bcd(moment.minute.into()),
            HOURS => to_bcd(moment.hour.into()),
            WEEKDAY => to_bcd(moment.weekday.into()),
            DAY => to_bcd(moment.day.into()),
            MONTH => to_bcd(moment.month.into()),
            YEAR => to_bcd(moment.year.rem_euclid(100)),
            CENTURY => to_bcd(moment.year.div_euclid(100)),
            REGISTER_A => A_VALUE,
            REGISTER_B if self.setting.is_some() => B_24_HOURS | B_SET,
            REGISTER_B => B_24_HOURS,
            REGISTER_C => 0,
            REGISTER_D => D_BATTERY_GOOD,
            ram => self.ram[usize::from(ram)],
        }
    }

    fn write_register(&mut self, byte: u8) {
        let mut moment = self.moment();
        let value = from_bcd(byte);
        match self.index {
            SECONDS => moment.second = value,
            MINUTES => moment.minute = value,
            HOURS => moment.hour = value,
            DAY => moment.day = value,
            MONTH => moment.month = value,
            YEAR => moment.year += i64::from(value) - moment.year.rem_euclid(100),
            CENTURY => moment.year = i64::from(value) * 100 + moment.year.rem_euclid(100),
            REGISTER_B if byte & B_SET != 0 => self.setting = Some(moment),
            REGISTER_B => {
                self.setting = None;
                self.show(moment);
                return;
            }
            WEEKDAY | REGISTER_A | REGISTER_C | REGISTER_D => return,
            ram => {
                self.ram[usize::from(ram)] = byte;
                return;
            }
        }
        if let Some(setting) = &mut self.setting {
            *setting = moment;
        } else {
            self.show(moment);
        }
    }

    fn show(&mut self, moment: Moment) {
        self.ahead = moment.to_unix().saturating_sub((self.now)());
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (data, offset) {
            ([byte], 1) => *byte = self.read_register(),
            // The index cannot be read back.
            (data, _) => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (data, offset) {
            ([byte], 0) => self.index = byte & 0x7f,
            ([byte], 1) => self.write_register(*byte),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock() -> Rtc {
        // 2026-11-21 12:34:56 UTC
        Rtc { now: || 1_795_219_200 + 45_296, ..Rtc::new() }
    }

    fn get(rtc: &mut Rtc, index: u8) -> u8 {
        let mut byte = [0];
        rtc.write(0, &[index | 0x80]);
        rtc.read(1, &mut byte);
        byte[0]
    }

    fn set(rtc: &mut Rtc, index: u8, value: u8) {
        rtc.write(0, &[index]);
        rtc.write(1, &[value]);
    }

    #[test]
    fn shows_the_hosts_time_in_bcd() {
        let mut rtc = clock();
        let shown = [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, WEEKDAY].map(|r| get(&mut rtc, r));
        assert_eq!(shown, [0x20, 0x26, 0x11, 0x21, 0x12, 0x34, 0x56, 0x07]);
        assert_eq!(get(&mut rtc, REGISTER_D), D_BATTERY_GOOD);
        assert_eq!(get(&mut rtc, REGISTER_A) & 0x80, 0);
    }

    #[test]
    fn a_guest_can_set_it_and_it_goes_on_from_there() {
        let mut rtc = clock();
        set(&mut rtc, REGISTER_B, B_SET | B_24_HOURS);
        for (register, value) in
            [(YEAR, 0x31), (MONTH, 0x02), (DAY, 0x28), (HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x59)]
        {
            set(&mut rtc, register, value);
        }
        set(&mut rtc, REGISTER_B, B_24_HOURS);
        rtc.now = || 1_795_219_200 + 45_297;
        assert_eq!([YEAR, MONTH, DAY, HOURS, SECONDS].map(|r| get(&mut rtc, r)), [0x31, 0x03, 0x01, 0, 0]);
    }

    #[test]
    fn firmware_finds_the_sizes_of_ram() {
        let sizes = |low: u64, high: u64| {
            let mut rtc = Rtc::with_memory(low, high);
            [0x15, 0x16, 0x17, 0x18, 0x30, 0x31, 0x34, 0x35, 0x5b, 0x5c, 0x5d].map(|index| get(&mut rtc, index))
        };
        assert_eq!(sizes(8 * MIB, 0), [0x80, 0x02, 0, 0x1c, 0, 0x1c, 0, 0, 0, 0, 0]);
        assert_eq!(sizes(3 << 30, 5 << 30), [0x80, 0x02, 0, 0xfc, 0, 0xfc, 0x00, 0xbf, 0x00, 0x40, 0x01]);
    }

    #[test]
    fn nonsense_is_survived_and_ram_is_kept() {
        let mut rtc = clock();
        for register in 0..=0x7f {
            set(&mut rtc, register, 0xff);
            get(&mut rtc, register);
        }
        set(&mut rtc, 0x40, 0x5a);
        assert_eq!(get(&mut rtc, 0x40), 0x5a);
        let mut wide = [0; 4];
        rtc.read(1, &mut wide);
        assert_eq!(wide, [0xff; 4]);
    }
}
