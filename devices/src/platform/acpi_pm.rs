//! ACPI fixed hardware (ACPI 6.4, chapter 4.8): PM1 event and control blocks, the PM timer, a reset register, and a block
//! of general-purpose events, of which there is one: hot-plug.
//!
//! The power button is the fixed one: a press sets a status bit and raises the SCI, which is a level, so that a press
//! before the guest listens is not lost. The hot-plug event follows a level: a guest that clears its status, as systems
//! do while they start, finds it set again for as long as there is something to be told. `SLP_TYP` 5 with `SLP_EN` is soft
//! off, as the DSDT's `\_S5` says.
//!
//! | a hostile driver may | answer |
//! | --- | --- |
//! | clear, enable or write anything at any width | bits that the spec does not give keep their value |
//! | write any other sleep type | ignored: the DSDT offers only S5 |
//! | leave the SCI asserted | its own interrupt storm; the host does nothing |

use std::time::Instant;

use super::{IrqLine, PowerRequest, PowerSink};
use crate::bus::BusDevice;

/// Offset of the PM1a event block, 4 bytes: status, enable.
pub const PM1_EVENT_OFFSET: u64 = 0;
/// Offset of the PM1a control block, 2 bytes.
pub const PM1_CONTROL_OFFSET: u64 = 4;
/// Offset of the PM timer, 4 bytes.
pub const PM_TIMER_OFFSET: u64 = 8;
/// Offset of the reset register, 1 byte: any write of [`AcpiPm::RESET_VALUE`] resets.
pub const RESET_OFFSET: u64 = 12;
/// Offset of the general-purpose event block, 2 bytes: status, enable.
pub const GPE_OFFSET: u64 = 14;
/// Number of the event that devices have come, or are to go. A level: `_L01` in the DSDT.
pub const GPE_HOTPLUG: u8 = 1;
/// Number of ports.
pub const PM_BLOCK_LEN: u64 = 16;
/// `SLP_TYP` of soft off.
pub const SLEEP_TYPE_S5: u8 = 5;

const ENABLE_OFFSET: u64 = PM1_EVENT_OFFSET + 2;
const GPE_ENABLE_OFFSET: u64 = GPE_OFFSET + 1;
/// The events that there are.
const GPE_MASK: u8 = 1 << GPE_HOTPLUG;
const POWER_BUTTON: u16 = 1 << 8;
/// The bits that may be enabled: timer, global lock, power button, sleep button, RTC.
const ENABLE_MASK: u16 = 1 | 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10;
/// The machine is always in ACPI mode.
const SCI_EN: u16 = 1;
const SLP_TYP_SHIFT: u32 = 10;
const SLP_EN: u16 = 1 << 13;
/// Bits of PM1 control that keep what was written: `BM_RLD` and `SLP_TYP`.
const CONTROL_MASK: u16 = 1 << 1 | 7 << SLP_TYP_SHIFT;
/// The PM timer counts at 3.579545 MHz.
const PM_TIMER_HZ: u128 = 3_579_545;

/// The register block.
pub struct AcpiPm {
    sink: PowerSink,
    sci: Box<dyn IrqLine>,
    start: Instant,
    status: u16,
    enable: u16,
    control: u16,
    gpe_level: u8,
    gpe_status: u8,
    gpe_enable: u8,
}

impl AcpiPm {
    /// What the guest writes to the reset register.
    pub const RESET_VALUE: u8 = 1;

    /// A block that reports off and reset to `sink` and raises `sci`.
    pub fn new(sink: PowerSink, sci: Box<dyn IrqLine>) -> Self {
        let start = Instant::now();
        Self { sink, sci, start, status: 0, enable: 0, control: 0, gpe_level: 0, gpe_status: 0, gpe_enable: 0 }
    }

    /// Somebody presses the power button. It stays pressed, for the guest to see, until the guest clears it.
    pub fn press_power_button(&mut self) {
        self.status |= POWER_BUTTON;
        self.update_sci();
    }

    /// There is something to be told about devices that come and go, or nothing any more.
    pub fn set_hotplug(&mut self, asserted: bool) {
        self.gpe_level = if asserted { GPE_MASK } else { 0 };
        self.gpe_status |= self.gpe_level;
        self.update_sci();
    }

    fn update_sci(&self) {
        self.sci.set(self.status & self.enable != 0 || self.gpe_status & self.gpe_enable != 0);
    }

    fn timer(&self) -> u32 {
        // Wraps by design: the FADT says that the timer has 32 bits.
        (self.start.elapsed().as_nanos() * PM_TIMER_HZ / 1_000_000_000) as u32
    }

    fn registers(&self) -> [u8; PM_BLOCK_LEN as usize] {
        let mut bytes = [0; PM_BLOCK_LEN as usize];
        bytes[0..2].copy_from_slice(&self.status.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.enable.to_le_bytes());
        bytes[4..6].copy_from_slice(&(self.control | SCI_EN).to_le_bytes());
        bytes[8..12].copy_from_slice(&self.timer().to_le_bytes());
        bytes[14..16].copy_from_slice(&[self.gpe_status, self.gpe_enable]);
        bytes
    }

    fn write_byte(&mut self, offset: u64, byte: u8) {
        let high = offset & 1 == 1;
        let wide = if high { u16::from(byte) << 8 } else { u16::from(byte) };
        let other_half = if high { 0x00ff } else { 0xff00 };
        match offset {
            // A one clears what is no level.
            GPE_OFFSET => return self.gpe_status = self.gpe_status & !byte | self.gpe_level,
            GPE_ENABLE_OFFSET => return self.gpe_enable = byte & GPE_MASK,
            _ => {}
        }
        match offset & !1 {
            // Writing a one clears.
            PM1_EVENT_OFFSET => self.status &= !wide,
            ENABLE_OFFSET => self.enable = (self.enable & other_half | wide) & ENABLE_MASK,
            PM1_CONTROL_OFFSET => {
                self.control = (self.control & other_half | wide) & CONTROL_MASK;
                let sleep_type = (self.control >> SLP_TYP_SHIFT & 7) as u8;
                if wide & SLP_EN != 0 && sleep_type == SLEEP_TYPE_S5 {
                    (self.sink)(PowerRequest::Off);
                }
            }
            RESET_OFFSET if !high && byte == Self::RESET_VALUE => (self.sink)(PowerRequest::Reset),
            _ => {}
        }
    }
}

impl BusDevice for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let registers = self.registers();
        match usize::try_from(offset).ok().and_then(|start| registers.get(start..start.checked_add(data.len())?)) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (offset, byte) in (offset..PM_BLOCK_LEN).zip(data) {
            self.write_byte(offset, *byte);
        }
        self.update_sci();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, mpsc};

    use super::*;

    struct Line(Arc<AtomicBool>);
    impl IrqLine for Line {
        fn set(&self, asserted: bool) {
            self.0.store(asserted, Ordering::SeqCst);
        }
    }

    fn block() -> (AcpiPm, Arc<AtomicBool>, mpsc::Receiver<PowerRequest>) {
        let (sender, seen) = mpsc::channel();
        let line = Arc::new(AtomicBool::new(false));
        let pm = AcpiPm::new(Box::new(move |r| sender.send(r).unwrap()), Box::new(Line(Arc::clone(&line))));
        (pm, line, seen)
    }

    fn read16(pm: &mut AcpiPm, offset: u64) -> u16 {
        let mut bytes = [0; 2];
        pm.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    #[test]
    fn a_press_before_the_guest_listens_is_delivered_when_it_does_and_cleared_by_it() {
        let (mut pm, line, _) = block();
        pm.press_power_button();
        assert!(!line.load(Ordering::SeqCst));
        pm.write(ENABLE_OFFSET, &POWER_BUTTON.to_le_bytes());
        assert!(line.load(Ordering::SeqCst));
        assert_eq!(read16(&mut pm, PM1_EVENT_OFFSET), POWER_BUTTON);
        pm.write(PM1_EVENT_OFFSET, &POWER_BUTTON.to_le_bytes());
        assert!(!line.load(Ordering::SeqCst));
        assert_eq!(read16(&mut pm, PM1_EVENT_OFFSET), 0);
    }

    #[test]
    fn hotplug_is_told_for_as_long_as_its_level_is_up() {
        let (mut pm, line, _) = block();
        let asserted = || line.load(Ordering::SeqCst);
        pm.set_hotplug(true);
        assert!(!asserted());
        pm.write(GPE_OFFSET, &[0xff, 0xff]);
        assert!(asserted(), "clearing the status changes nothing while the level is up");
        assert_eq!(read16(&mut pm, GPE_OFFSET), u16::from_le_bytes([1 << GPE_HOTPLUG, 1 << GPE_HOTPLUG]));
        pm.set_hotplug(false);
        assert!(asserted(), "the status stays until the guest clears it");
        pm.write(GPE_OFFSET, &[1 << GPE_HOTPLUG]);
        assert!(!asserted());
        pm.set_hotplug(true);
        assert!(asserted());
        pm.write(GPE_ENABLE_OFFSET, &[0]);
        assert!(!asserted());
    }

    #[test]
    fn only_s5_powers_off_and_the_machine_is_always_in_acpi_mode() {
        let (mut pm, _, seen) = block();
        for sleep_type in [0, 1, 3, 4, 7] {
            pm.write(PM1_CONTROL_OFFSET, &(SLP_EN | sleep_type << SLP_TYP_SHIFT).to_le_bytes());
        }
        let s5 = u16::from(SLEEP_TYPE_S5) << SLP_TYP_SHIFT;
        pm.write(PM1_CONTROL_OFFSET, &s5.to_le_bytes());
        assert_eq!(read16(&mut pm, PM1_CONTROL_OFFSET), s5 | SCI_EN);
        assert!(seen.try_recv().is_err());
        pm.write(PM1_CONTROL_OFFSET, &(s5 | SLP_EN).to_le_bytes());
        assert_eq!(seen.try_recv(), Ok(PowerRequest::Off));
        assert!(seen.try_recv().is_err(), "one request for one write");
    }

    #[test]
    fn the_reset_register_takes_its_value_only_and_wide_or_crossing_accesses_do_no_harm() {
        let (mut pm, _, seen) = block();
        pm.write(RESET_OFFSET, &[0]);
        pm.write(RESET_OFFSET - 1, &[1]);
        let mut wide = [0; 8];
        pm.read(12, &mut wide);
        assert_eq!(wide, [0xff; 8]);
        pm.write(15, &[1; 8]);
        assert_eq!(read16(&mut pm, GPE_OFFSET), 0, "there is no event 0");
        assert!(seen.try_recv().is_err());
        pm.write(RESET_OFFSET, &[AcpiPm::RESET_VALUE]);
        assert_eq!(seen.try_recv(), Ok(PowerRequest::Reset));
    }
}
