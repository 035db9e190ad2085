//! Loads with which a path of data is measured, the same in a guest (`/bin/probe`) and in its node: requests to a disk, a
//! stream over TCP, one byte to and fro.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use rustix::fs::OFlags;

/// Bytes of each write to a stream.
const PIECE: usize = 64 << 10;
/// For the other side of a connection.
const PATIENCE: Duration = Duration::from_secs(60);

/// Requests to a disk, at places as random as can be repeated.
#[derive(Debug, Clone, Copy)]
pub struct DiskLoad {
    /// Writes, in the place of reads.
    pub write: bool,
    /// Bytes of each; the disk is read and written at multiples of it.
    pub block: u32,
    /// How many are under way at a time.
    pub depth: u32,
    /// How many there are.
    pub count: u32,
}

impl DiskLoad {
    /// As words for `probe disk`.
    pub fn words(&self) -> String {
        format!("{} {} {} {}", if self.write { "write" } else { "read" }, self.block, self.depth, self.count)
    }

    /// From those words.
    pub fn parse(words: &[&str]) -> Option<Self> {
        let [what, block, depth, count] = words else { return None };
        let write = match *what {
            "read" => false,
            "write" => true,
            _ => return None,
        };
        let number = |word: &str| u32::from_str(word).ok().filter(|number| *number > 0);
        Some(Self { write, block: number(block)?, depth: number(depth)?, count: number(count)? })
    }

    /// Does all of it to `device`, past the page cache if `direct`; how long it took.
    pub fn run(&self, device: &Path, direct: bool) -> io::Result<Duration> {
        let flags = if direct { OFlags::DIRECT.bits().cast_signed() } else { 0 };
        let file = File::options().read(true).write(self.write).custom_flags(flags).open(device)?;
        let blocks = size(&file)? / u64::from(self.block);
        let mut places = Places { state: 0x9e37_79b9_7f4a_7c15, blocks, block: self.block };
        let mut buffers = Buffers::new(self.depth as usize, self.block as usize);
        let mut ring = IoUring::new(self.depth)?;
        let fd = types::Fd(file.as_raw_fd());
        let (mut begun, mut done) = (0, 0);
        let mut idle: Vec<usize> = (0..self.depth as usize).collect();
        let start = Instant::now();
        while done < self.count {
            while begun < self.count
                && let Some(slot) = idle.pop()
            {
                let (buffer, offset) = (buffers.of(slot), places.next());
                let entry = if self.write {
                    opcode::Write::new(fd, buffer, self.block).offset(offset).build()
                } else {
                    opcode::Read::new(fd, buffer, self.block).offset(offset).build()
                };
                // SAFETY: `buffers` outlives the ring's requests, all of which are waited for below; no two slots share
                // bytes; the ring has as many entries as there are slots.
                unsafe { ring.submission().push(&entry.user_data(slot as u64)) }.map_err(io::Error::other)?;
                begun += 1;
            }
            ring.submit_and_wait(1)?;
            for entry in ring.completion() {
                if entry.result() != self.block.cast_signed() {
                    // What is under way still writes into the buffers.
                    std::mem::forget(buffers);
                    return Err(io::Error::other(format!("a request ended with {}", entry.result())));
                }
                idle.push(entry.user_data() as usize);
                done += 1;
            }
        }
        Ok(start.elapsed())
    }
}

/// Bytes of a file or a block device.
fn size(file: &File) -> io::Result<u64> {
    rustix::fs::seek(file, rustix::fs::SeekFrom::End(0)).map_err(Into::into)
}

/// Offsets by xorshift: the same ones each time.
struct Places {
    state: u64,
    blocks: u64,
    block: u32,
}

impl Places {
    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % self.blocks.max(1) * u64::from(self.block)
    }
}

/// One for each request under way, at multiples of a page, as direct requests want it.
struct Buffers {
    bytes: Vec<u8>,
    first: usize,
    len: usize,
}

impl Buffers {
    const PAGE: usize = 4096;

    fn new(count: usize, len: usize) -> Self {
        // Not zeros: a page that was never written to is read from nowhere.
        let bytes = vec![0x5a; count * len + Self::PAGE];
        let first = bytes.as_ptr().align_offset(Self::PAGE);
        Self { bytes, first, len }
    }

    fn of(&mut self, slot: usize) -> *mut u8 {
        self.bytes[self.first + slot * self.len..][..self.len].as_mut_ptr()
    }
}

/// Writes `len` bytes to `path` that are no zeros, for a load to read and write.
pub fn fill(path: &Path, len: u64) -> io::Result<()> {
    let file = File::create(path)?;
    let piece = vec![0xa5; 1 << 20];
    (0..len >> 20).try_for_each(|number| file.write_all_at(&piece, number << 20))
}

/// Sends `len` bytes and waits until the other side says that it has them all; how long that took.
pub fn send(mut stream: TcpStream, len: u64) -> io::Result<Duration> {
    prepare(&stream)?;
    let piece = vec![0x5a; PIECE];
    let start = Instant::now();
    (0..len / PIECE as u64).try_for_each(|_| stream.write_all(&piece))?;
    stream.read_exact(&mut [0])?;
    Ok(start.elapsed())
}

/// Takes `len` bytes and says so.
pub fn receive(mut stream: TcpStream, len: u64) -> io::Result<()> {
    prepare(&stream)?;
    let (mut piece, mut left) = (vec![0; PIECE], len / PIECE as u64 * PIECE as u64);
    while left > 0 {
        let most = piece.len().min(usize::try_from(left).unwrap_or(PIECE));
        match stream.read(&mut piece[..most])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => left -= n as u64,
        }
    }
    stream.write_all(&[1])
}

/// Sends one byte and waits for one, `count` times; how long each took, least first.
pub fn ping(mut stream: TcpStream, count: u32) -> io::Result<Vec<Duration>> {
    prepare(&stream)?;
    let once = |_| {
        let start = Instant::now();
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
        Ok(start.elapsed())
    };
    let mut times = (0..count).map(once).collect::<io::Result<Vec<_>>>()?;
    times.sort_unstable();
    Ok(times)
}

/// Answers each byte by one, until the other side closes.
pub fn pong(mut stream: TcpStream) -> io::Result<()> {
    prepare(&stream)?;
    while stream.read(&mut [0])? > 0 {
        stream.write_all(&[1])?;
    }
    Ok(())
}

/// One connection.
pub fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    Ok(listener.accept()?.0)
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}
