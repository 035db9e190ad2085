//! The one function of the keyboard controller that matters here: pulsing the processors' reset line
//! (`reboot=k` on Linux's command line), by its command port. There is no keyboard, and the FADT says so.

use std::convert::Infallible;

use vm_superio::{I8042Device, Trigger};

use super::{PowerRequest, PowerSink};
use crate::bus::BusDevice;

/// Commands and status.
pub const COMMAND_PORT: u64 = 0x64;
/// Number of ports.
pub const COMMAND_LEN: u64 = 1;
/// That of the chip.
const COMMAND: u8 = 4;

struct ResetLine(PowerSink);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        (self.0)(PowerRequest::Reset);
        Ok(())
    }
}

/// The controller.
pub struct I8042 {
    chip: I8042Device<ResetLine>,
}

impl I8042 {
    /// A controller that reports a reset to `sink`.
    pub fn new(sink: PowerSink) -> Self {
        Self { chip: I8042Device::new(ResetLine(sink)) }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        match data {
            [byte] => *byte = self.chip.read(COMMAND),
            data => data.fill(0xff),
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let [byte] = data {
            let Ok(()) = self.chip.write(COMMAND, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn only_the_pulse_command_resets() {
        let (sender, seen) = mpsc::channel();
        let mut chip = I8042::new(Box::new(move |request| sender.send(request).unwrap()));
        chip.write(0, &[0xaa]);
        chip.write(0, &[0xfe, 0xfe]);
        assert!(seen.try_recv().is_err());
        chip.write(0, &[0xfe]);
        assert_eq!(seen.try_recv(), Ok(PowerRequest::Reset));
    }
}
