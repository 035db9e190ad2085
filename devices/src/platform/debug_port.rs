//! The port to which firmware writes what it does, for whoever has to find out why a disk does not start. There only when
//! the log wants it: each byte is an exit.
//!
//! | a hostile driver may | answer |
//! | --- | --- |
//! | write without end | after [`LIMIT`] bytes nothing is taken any more |
//! | write no line's end, or bytes that are no text | lines are cut at 200 bytes; what is not printable ASCII becomes `.` |

use crate::bus::BusDevice;

/// Where it is: where SeaBIOS and OVMF look for it.
pub const DEBUG_PORT: u64 = 0x402;
/// Number of ports.
pub const DEBUG_PORT_LEN: u64 = 1;
/// Bytes that one VM may say: some times what firmware says of one start.
pub const LIMIT: usize = 64 << 10;

/// What a read gives where the port is there.
const PRESENT: u8 = 0xe9;
const LINE: usize = 200;

/// Told one line, without its end, on the vCPU thread that wrote it.
pub type DebugLine = Box<dyn FnMut(&str) + Send>;

/// The port.
pub struct DebugPort {
    say: DebugLine,
    line: String,
    left: usize,
}

impl DebugPort {
    /// A port that tells `say` its lines.
    pub fn new(say: DebugLine) -> Self {
        Self { say, line: String::new(), left: LIMIT }
    }

    fn end_line(&mut self) {
        (self.say)(&self.line);
        self.line.clear();
    }

    fn take(&mut self, byte: u8) {
        let Some(left) = self.left.checked_sub(1) else { return };
        self.left = left;
        match byte {
            b'\n' => self.end_line(),
            b'\r' => {}
            b' '..=b'~' => self.line.push(byte.into()),
            _ => self.line.push('.'),
        }
        if self.line.len() == LINE || self.left == 0 {
            self.end_line();
        }
    }
}

impl BusDevice for DebugPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(PRESENT);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        data.iter().for_each(|byte| self.take(*byte));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn lines_are_text_and_come_to_an_end() {
        let (sender, said) = mpsc::channel();
        let mut port = DebugPort::new(Box::new(move |line| sender.send(line.to_owned()).unwrap()));
        b"one\r\n\x1b[31mtwo\xff\n".iter().for_each(|byte| port.write(0, &[*byte]));
        assert_eq!(said.try_iter().collect::<Vec<_>>(), ["one", ".[31mtwo."]);
        for _ in 0..2 * LIMIT {
            port.write(0, b"x");
        }
        let lines: Vec<_> = said.try_iter().collect();
        assert!(lines.iter().all(|line| line.len() <= LINE));
        assert_eq!(lines.concat().len(), LIMIT - 15);
    }
}
