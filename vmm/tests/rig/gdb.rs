//! A debugger of a few requests, for tests: the other end of GDB's remote protocol.

// Each test program uses a part of it.
#![allow(dead_code)]

use std::io::{Error, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A guest under emulation takes its time.
const PATIENCE: Duration = Duration::from_secs(120);

pub struct Gdb {
    stream: UnixStream,
}

/// Places of registers among all, in bytes.
pub const RAX: usize = 0;
pub const RIP: usize = 16 * 8;
pub const EFLAGS: usize = RIP + 8;
pub const CS: usize = EFLAGS + 4;
/// Behind those of x87 and SSE: the bases of two segments, then control registers.
pub const GS_BASE: usize = 0x218 + 8;
pub const CR0: usize = GS_BASE + 8;
pub const CR3: usize = CR0 + 16;

impl Gdb {
    /// Attaches.
    pub fn attach(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { stream })
    }

    /// Sends a request, and awaits no answer.
    pub fn send(&mut self, request: &str) -> Result<()> {
        let sum = request.bytes().fold(0u8, u8::wrapping_add);
        write!(self.stream, "${request}#{sum:02x}")
    }

    /// What a control-C is.
    pub fn interrupt(&mut self) -> Result<()> {
        self.stream.write_all(&[3])
    }

    fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        self.stream.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    /// The next answer, acknowledged.
    pub fn answer(&mut self) -> Result<String> {
        while self.byte()? != b'$' {}
        let mut answer = String::new();
        loop {
            match self.byte()? {
                b'#' => break,
                // A run of the byte before.
                b'*' => {
                    let times = usize::from(self.byte()?.wrapping_sub(29));
                    let last = answer.pop().ok_or_else(|| Error::other("a run of nothing"))?;
                    answer.extend(std::iter::repeat_n(last, times + 1));
                }
                byte => answer.push(byte.into()),
            }
        }
        let _sum = (self.byte()?, self.byte()?);
        // After its last word the other side may be gone.
        let _ = self.stream.write_all(b"+");
        Ok(answer)
    }

    /// Asks and awaits the answer.
    pub fn ask(&mut self, request: &str) -> Result<String> {
        self.send(request)?;
        self.answer()
    }

    /// Asks for something to be done.
    pub fn order(&mut self, request: &str) -> Result<()> {
        match self.ask(request)?.as_str() {
            "OK" => Ok(()),
            other => Err(Error::other(format!("{request}: {other:?}"))),
        }
    }

    /// All registers.
    pub fn registers(&mut self) -> Result<Vec<u8>> {
        let answer = self.ask("g")?;
        unhex(&answer)
    }

    /// The register of 8 bytes at this place.
    pub fn register(&mut self, place: usize) -> Result<u64> {
        let registers = self.registers()?;
        let bytes = registers.get(place..place + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u64::from_le_bytes).ok_or_else(|| Error::other(format!("{} bytes of registers", registers.len())))
    }

    /// Changes it.
    pub fn set_register(&mut self, place: usize, value: u64) -> Result<()> {
        let mut registers = self.registers()?;
        registers[place..place + 8].copy_from_slice(&value.to_le_bytes());
        self.order(&format!("G{}", hex(&registers)))
    }

    /// Memory at a guest-virtual address.
    pub fn read(&mut self, address: u64, len: usize) -> Result<Vec<u8>> {
        let answer = self.ask(&format!("m{address:x},{len:x}"))?;
        if answer.len() == 3 && answer.starts_with('E') {
            return Err(Error::other(format!("{address:#x}: {answer}")));
        }
        unhex(&answer)
    }

    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<()> {
        self.order(&format!("M{address:x},{:x}:{}", bytes.len(), hex(bytes)))
    }

    /// Lets the guest run until it stops; why.
    pub fn go(&mut self) -> Result<String> {
        self.ask("vCont;c")
    }

    /// One instruction of the vCPU with this number, from 1 on, while the others stand still.
    pub fn step(&mut self, thread: usize) -> Result<String> {
        self.ask(&format!("vCont;s:{thread}"))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Result<Vec<u8>> {
    let digits = |at: usize| text.get(at..at + 2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
    let bytes: Option<Vec<u8>> = (0..text.len()).step_by(2).map(digits).collect();
    bytes.ok_or_else(|| Error::other(format!("no hexadecimal digits: {text:?}")))
}
