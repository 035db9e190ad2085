//! System control port A (PS/2): the gate of address line 20, which is always open here, and a fast reset. For firmware and
//! boot loaders that make sure of the one before they leave the first MiB, and use the other.
//!
//! | a hostile driver may | answer |
//! | --- | --- |
//! | close the gate | it stays open |
//! | reset without end | the first one ends the VM |

use super::{PowerRequest, PowerSink};
use crate::bus::BusDevice;

/// Where it is.
pub const CONTROL_PORT: u64 = 0x92;
/// Number of ports.
pub const CONTROL_PORT_LEN: u64 = 1;

const RESET: u8 = 1;
const GATE_OPEN: u8 = 1 << 1;

/// The port.
pub struct ControlPort {
    sink: PowerSink,
}

impl ControlPort {
    /// A port that reports a reset to `sink`.
    pub fn new(sink: PowerSink) -> Self {
        Self { sink }
    }
}

impl BusDevice for ControlPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(GATE_OPEN);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|byte| byte & RESET != 0) {
            (self.sink)(PowerRequest::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn the_gate_stays_open_and_one_bit_resets() {
        let (sender, seen) = mpsc::channel();
        let mut port = ControlPort::new(Box::new(move |request| sender.send(request).unwrap()));
        port.write(0, &[0]);
        let mut byte = [0];
        port.read(0, &mut byte);
        // As firmware does it: what it reads, with the gate's bit.
        port.write(0, &[byte[0] | GATE_OPEN]);
        assert_eq!((byte[0] & GATE_OPEN, seen.try_recv().is_err()), (GATE_OPEN, true));
        port.write(0, &[byte[0] | RESET]);
        assert_eq!(seen.try_recv(), Ok(PowerRequest::Reset));
    }
}
