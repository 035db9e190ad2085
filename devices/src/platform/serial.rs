//! The first serial port, a 16550: `vm_superio` has the registers, this shell puts it on the bus.
//!
//! | a hostile driver may | answer |
//! | --- | --- |
//! | write output without end | the host's sink bounds what it keeps; the port never blocks a vCPU |
//! | never read its input | the FIFO holds 64 bytes, the host keeps the rest on its side |
//! | access it with 2 to 8 bytes at a time | reads give all ones, writes are dropped |

use std::io::{self, Write};

use vm_superio::serial::{Error, SerialEvents};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// Number of ports.
pub const SERIAL_LEN: u64 = 8;

struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct Drained(EventFd);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // Fails only where 2^64 - 2 signals wait to be read: then the host knows already.
        let _ = self.0.write(1);
    }
}

/// The port. Output goes to a sink that must not block; input is pushed in by the host.
pub struct SerialPort {
    uart: Serial<Irq, Drained, Box<dyn Write + Send>>,
}

impl SerialPort {
    /// A port that signals `irq` (an edge) for its interrupt and `drained` when the guest has read all of its input.
    pub fn new(irq: EventFd, drained: EventFd, out: Box<dyn Write + Send>) -> Self {
        Self { uart: Serial::with_events(Irq(irq), Drained(drained), out) }
    }

    /// Gives the guest as much of `input` as fits in its FIFO; returns how much that was.
    pub fn push_input(&mut self, input: &[u8]) -> usize {
        match self.uart.enqueue_raw_bytes(input) {
            Ok(taken) => taken,
            Err(Error::FullFifo) => 0,
            // The bytes are in the FIFO; the guest finds them at its next look.
            Err(Error::Trigger(_) | Error::IOError(_)) => input.len().min(1),
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (data, u8::try_from(offset)) {
            ([byte], Ok(offset)) => *byte = self.uart.read(offset),
            (data, _) => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // A byte that the sink refuses is lost, as on a line that nobody listens to.
            let _ = self.uart.write(offset, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl Write for Sink {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(buf);
            Ok(buf.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn event() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK).unwrap()
    }

    #[test]
    fn input_beyond_the_fifo_waits_until_the_guest_has_read_it_all() {
        let (irq, drained, sink) = (event(), event(), Sink::default());
        let mut port = SerialPort::new(irq.try_clone().unwrap(), drained.try_clone().unwrap(), Box::new(sink));
        port.write(1, &[1]); // interrupt on received data
        let taken = port.push_input(&[b'x'; 100]);
        assert!(taken > 0 && taken < 100, "{taken}");
        assert_eq!(irq.read().unwrap(), 1);
        assert_eq!(port.push_input(b"y"), 0);
        for _ in 0..taken {
            assert!(drained.read().is_err());
            let mut byte = [0];
            port.read(0, &mut byte);
            assert_eq!(byte, [b'x']);
        }
        assert_eq!(drained.read().unwrap(), 1);
    }

    #[test]
    fn only_single_bytes_reach_the_line() {
        let sink = Sink::default();
        let mut port = SerialPort::new(event(), event(), Box::new(sink.clone()));
        port.write(0, b"a");
        port.write(0, b"bc");
        let mut word = [0; 2];
        port.read(5, &mut word);
        assert_eq!(word, [0xff; 2]);
        assert_eq!(*sink.0.lock().unwrap(), b"a");
    }
}
