//! One request: parse, check, execute, answer. Virtio 1.2, 5.2.6.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::uring::{Job, Landed, Uring};
use super::{Backend, BlockConfig, BlockMetrics, Cache, Medium, SECTOR};
use crate::metrics::DeviceMetrics;
use crate::virtio::limiter::Limiter;
use crate::virtio::{Answer, Chain, View};

/// Bytes of the answer to GET_ID.
pub(super) const ID_LEN: usize = 20;
/// Sectors of one discarded or zeroed range: 1 GiB, so that a slow backend is not held up for long by one.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Ranges in one such request.
pub(super) const MAX_RANGES: u32 = 16;
/// Copies to and from backends that need them are made in pieces of this size.
const BOUNCE_LEN: usize = 256 << 10;
/// Bytes that a queue may move before the worker looks at its other events: requests of any size cannot keep a reset waiting.
const TURN: u64 = 64 << 20;

/// Requests that may wait for their backend at a time; what comes beyond that stays in the queues. Enough for a guest that
/// reads ahead, and little enough to try all of them again whenever something has arrived.
pub(super) const MAX_PARKED: usize = 64;

const FLAG_UNMAP: u32 = 1;

/// Why a request fails.
#[derive(Debug)]
enum Failure {
    /// The driver broke a rule: a bad range, a bad length, a write to a read-only disk.
    Guest,
    /// It asks for what there is not.
    Unsupported,
    /// The backend failed.
    Host(&'static str, io::Error),
    /// The device stops, and the request was still waiting for its backend.
    Stopped,
}

/// A request that was executed: how many bytes it wrote to the guest, without the status.
type Outcome = Result<usize, Failure>;

/// A request that was checked.
enum Request<'a> {
    Read { offset: u64, into: View<'a> },
    Write { offset: u64, from: View<'a> },
    Flush,
    Id(View<'a>),
    Discard(View<'a>),
    WriteZeroes(View<'a>),
}

impl Request<'_> {
    /// What it costs, besides being one.
    fn bytes(&self) -> u64 {
        match self {
            Self::Read { into: data, .. } | Self::Write { from: data, .. } => data.len() as u64,
            _ => 0,
        }
    }
}

/// Where a request's answer and what is counted go.
struct Books {
    metrics: Arc<DeviceMetrics>,
    counts: Arc<BlockMetrics>,
}

impl Books {
    fn read(&self, len: usize) -> usize {
        self.counts.reads.increment();
        self.counts.read_bytes.add(len as u64);
        len
    }

    fn wrote(&self, len: usize) -> usize {
        self.counts.writes.increment();
        self.counts.write_bytes.add(len as u64);
        0
    }

    fn flushed(&self) -> usize {
        self.counts.flushes.increment();
        0
    }

    /// Writes the status of a request with `room` writable bytes besides it.
    fn answer(&self, outcome: Outcome, room: usize, status: View<'_>) -> Answer {
        let code = match &outcome {
            Ok(_) => VIRTIO_BLK_S_OK,
            Err(failure) => self.count(failure),
        };
        status.put_byte(code as u8);
        match outcome {
            // The length counts from the first byte, so that it reaches the status only over data that was written.
            Ok(written) if written == room => Answer::Used(written as u32 + 1),
            Ok(written) => Answer::Used(written as u32),
            Err(_) if room == 0 => Answer::Used(1),
            Err(_) => Answer::Used(0),
        }
    }

    fn count(&self, failure: &Failure) -> u32 {
        self.counts.failures.increment();
        match failure {
            Failure::Guest => self.metrics.guest_faults.increment(),
            Failure::Unsupported => return VIRTIO_BLK_S_UNSUPP,
            Failure::Host(what, error) => self.metrics.host_fault(|| format!("cannot {what} a disk: {error}")),
            Failure::Stopped => {}
        }
        VIRTIO_BLK_S_IOERR
    }
}

/// The place for data and the one for the status, if there is one.
fn split_status(chain: &Chain) -> Option<(View<'_>, View<'_>)> {
    let writable = chain.writable.view();
    writable.len().checked_sub(1).and_then(|at| writable.split_at(at))
}

/// A request that waits for its backend.
struct Parked {
    queue: u16,
    chain: Chain,
}

/// The disk as requests see it.
pub(super) struct Disk<B> {
    backend: B,
    ring: Option<Uring>,
    sectors: u64,
    serial: [u8; ID_LEN],
    read_only: bool,
    cache: Cache,
    pub(super) limiter: Limiter,
    bounce: Vec<u8>,
    /// In the order in which they came. They have passed the limiter.
    parked: Vec<Parked>,
    /// Bytes in this turn.
    moved: u64,
    /// Every write is flushed before it is answered.
    write_through: bool,
    /// How often the disk was changed, and how many of these changes a flush has covered.
    changes: u64,
    flushed: u64,
    books: Books,
}

impl<B: Backend> Disk<B> {
    pub(super) fn new(
        medium: Medium<B>,
        config: &BlockConfig,
        limiter: Limiter,
        metrics: Arc<DeviceMetrics>,
        counts: Arc<BlockMetrics>,
    ) -> Self {
        let mut serial = [0; ID_LEN];
        serial.iter_mut().zip(config.serial.bytes()).for_each(|(to, from)| *to = from);
        let Medium { backend, ring } = medium;
        Self {
            sectors: backend.size() / SECTOR,
            backend,
            ring,
            serial,
            read_only: config.read_only,
            cache: config.cache,
            limiter,
            bounce: vec![0; BOUNCE_LEN],
            parked: Vec::new(),
            moved: 0,
            write_through: false,
            changes: 0,
            flushed: 0,
            books: Books { metrics, counts },
        }
    }

    /// A driver that cannot flush takes every write for durable (5.2.6.2).
    pub(super) fn set_flush_negotiated(&mut self, negotiated: bool) {
        self.write_through = self.cache == Cache::Writeback && !negotiated;
    }

    /// The way to the kernel, if requests take it.
    pub(super) fn ring(&mut self) -> Option<&mut Uring> {
        self.ring.as_mut()
    }

    /// What to watch for requests that wait for the backend.
    pub(super) fn progress(&self) -> Option<BorrowedFd<'_>> {
        self.backend.progress()
    }

    /// See [`Backend::proceed`].
    pub(super) fn proceed(&mut self) -> bool {
        self.backend.proceed()
    }

    /// The disk becomes another one. Nothing is with the ring; what was written to the old one becomes durable.
    pub(super) fn replace(&mut self, medium: Medium<B>) {
        self.settle();
        self.sectors = medium.backend.size() / SECTOR;
        (self.backend, self.ring) = (medium.backend, medium.ring);
    }

    /// The device stops: what was written becomes durable, unless that was never promised.
    pub(super) fn settle(&mut self) {
        if self.changes != self.flushed && self.cache == Cache::Writeback {
            self.flushed = self.changes;
            if let Err(error) = self.backend.flush() {
                self.books.metrics.host_fault(|| format!("cannot flush a disk: {error}"));
            }
        }
    }

    /// A queue gets a turn.
    pub(super) const fn begin_turn(&mut self) {
        self.moved = 0;
    }

    /// So much was moved that the worker has to look at its other events first.
    pub(super) const fn has_had_its_turn(&self) -> bool {
        self.moved >= TURN
    }

    /// Executes the request in `chain`, which is of queue `queue`, or hands it to the ring. Its status, the last writable
    /// byte, is written whatever happens.
    pub(super) fn serve(&mut self, queue: u16, chain: &mut Chain) -> Answer {
        let Some((data, status)) = split_status(chain) else {
            // There is no place for a status. A chain that has a fault was counted where that was found.
            if chain.fault.is_none() {
                self.books.metrics.guest_faults.increment();
            }
            return Answer::Used(0);
        };
        if chain.fault.is_some() {
            self.books.counts.failures.increment();
            status.put_byte(VIRTIO_BLK_S_IOERR as u8);
            return Answer::Used(0);
        }
        let request = match self.parse(chain.readable.view(), data) {
            Ok(request) => request,
            Err(failure) => return self.books.answer(Err(failure), data.len(), status),
        };
        if self.has_had_its_turn()
            || self.ring.as_ref().is_some_and(|ring| !ring.has_room())
            || self.parked.len() >= MAX_PARKED
        {
            return Answer::Wait;
        }
        if !self.limiter.admit(request.bytes()) {
            self.books.counts.throttled.increment();
            return Answer::Wait;
        }
        self.moved += request.bytes();
        match self.start(queue, &request) {
            Some(slot) => {
                if let Some(ring) = &mut self.ring {
                    ring.keep_chain(slot, chain);
                }
                Answer::Later
            }
            None => {
                let outcome = self.execute(request);
                if self.has_to_wait(&outcome) {
                    self.parked.push(Parked { queue, chain: chain.take() });
                    return Answer::Later;
                }
                self.books.answer(outcome, data.len(), status)
            }
        }
    }

    fn has_to_wait(&self, outcome: &Outcome) -> bool {
        let would_block = matches!(outcome, Err(Failure::Host(_, error)) if error.kind() == io::ErrorKind::WouldBlock);
        would_block && self.backend.progress().is_some()
    }

    /// Tries again what waits for the backend, and calls `used` with queue, head and length of each request that is
    /// answered now.
    pub(super) fn retry(&mut self, used: &mut dyn FnMut(u16, u16, u32)) {
        for parked in std::mem::take(&mut self.parked) {
            // Understood anew: the driver may have changed what is in its memory, and all of it has to be checked.
            let Some((data, status)) = split_status(&parked.chain) else {
                unreachable!("a chain without a place for its status is never put aside")
            };
            let request = self.parse(parked.chain.readable.view(), data);
            let outcome = request.and_then(|request| self.execute(request));
            if self.has_to_wait(&outcome) {
                self.parked.push(parked);
            } else if let Answer::Used(len) = self.books.answer(outcome, data.len(), status) {
                used(parked.queue, parked.chain.head, len);
            }
        }
    }

    /// Answers what waits for the backend with an error: the device stops. `used` as in [`Disk::retry`].
    pub(super) fn abandon(&mut self, used: &mut dyn FnMut(u16, u16, u32)) {
        for parked in std::mem::take(&mut self.parked) {
            if let Some((data, status)) = split_status(&parked.chain)
                && let Answer::Used(len) = self.books.answer(Err(Failure::Stopped), data.len(), status)
            {
                used(parked.queue, parked.chain.head, len);
            }
        }
    }

    /// Hands a request to the ring, if it is one for it.
    fn start(&mut self, queue: u16, request: &Request<'_>) -> Option<usize> {
        let ring = self.ring.as_mut()?;
        match *request {
            Request::Read { offset, into } if !into.is_empty() => {
                Some(ring.start(queue, Job::Read, Some(into), offset))
            }
            Request::Write { offset, from } if !from.is_empty() => {
                Some(ring.start(queue, Job::Write, Some(from), offset))
            }
            Request::Flush => Some(ring.start(queue, Job::Flush(self.changes), None, 0)),
            _ => None,
        }
    }

    /// Answers the next request that the ring is done with, and calls `used` with its queue, head and length. False
    /// when there is none.
    pub(super) fn land(&mut self, used: &mut dyn FnMut(u16, u16, u32)) -> bool {
        let Some(ring) = &mut self.ring else { return false };
        let (index, result) = match ring.landed() {
            None => return false,
            Some(Landed::Partly) => return true,
            Some(Landed::Done(index, result)) => (index, result),
        };
        let slot = ring.slot(index);
        if slot.job == Job::Write {
            self.changes += 1;
            if self.write_through && result.is_ok() {
                slot.job = Job::Settle(self.changes);
                ring.queue(index);
                return true;
            }
        }
        let outcome = match (slot.job, result) {
            (Job::Read, Ok(())) => Ok(self.books.read(slot.len)),
            (Job::Write, Ok(())) => Ok(self.books.wrote(slot.len)),
            (Job::Flush(covered), Ok(())) => {
                self.flushed = self.flushed.max(covered);
                Ok(self.books.flushed())
            }
            (Job::Settle(covered), Ok(())) => {
                self.flushed = self.flushed.max(covered);
                self.books.flushed();
                Ok(self.books.wrote(slot.len))
            }
            (Job::Read, Err(error)) => Err(Failure::Host("read", error)),
            (Job::Write, Err(error)) => Err(Failure::Host("write", error)),
            (Job::Flush(_) | Job::Settle(_), Err(error)) => Err(Failure::Host("flush", error)),
        };
        if let Some((data, status)) = split_status(&slot.chain)
            && let Answer::Used(len) = self.books.answer(outcome, data.len(), status)
        {
            used(slot.queue, slot.chain.head, len);
        }
        ring.release(index);
        true
    }

    /// Understands and checks a request; the backend has not been asked for anything afterwards.
    fn parse<'a>(&self, readable: View<'a>, writable: View<'a>) -> Result<Request<'a>, Failure> {
        // type, reserved, sector: 5.2.6.
        let ([kind, sector], data) = readable.split_value::<[u64; 2]>().ok_or(Failure::Guest)?;
        let sector = u64::from_le(sector);
        let request = match u64::from_le(kind) as u32 {
            VIRTIO_BLK_T_IN => {
                return Ok(Request::Read { offset: self.offset(sector, writable.len() as u64)?, into: writable });
            }
            VIRTIO_BLK_T_FLUSH => return Ok(Request::Flush),
            VIRTIO_BLK_T_GET_ID => return Ok(Request::Id(writable)),
            VIRTIO_BLK_T_OUT => Request::Write { offset: self.offset(sector, data.len() as u64)?, from: data },
            VIRTIO_BLK_T_DISCARD => Request::Discard(data),
            VIRTIO_BLK_T_WRITE_ZEROES => Request::WriteZeroes(data),
            _ => return Err(Failure::Unsupported),
        };
        // The others change the disk.
        if self.read_only { Err(Failure::Guest) } else { Ok(request) }
    }

    fn execute(&mut self, request: Request<'_>) -> Outcome {
        match request {
            Request::Read { offset, into } => self.read(offset, into),
            Request::Write { offset, from } => self.write(offset, from),
            Request::Flush => self.flush(),
            Request::Id(writable) => Ok(writable.copy_from(&self.serial)),
            Request::Discard(data) => {
                self.for_ranges(data, false, |backend, offset, len, _| backend.discard(offset, len))
            }
            Request::WriteZeroes(data) => self.for_ranges(data, true, |backend, offset, len, flags| {
                backend.write_zeroes(offset, len, flags & FLAG_UNMAP != 0)
            }),
        }
    }

    /// Byte offset of `len` bytes from `sector`, if they are whole sectors of this disk.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let end = sector.checked_add(len / SECTOR).filter(|end| *end <= self.sectors);
        match end {
            Some(_) if len.is_multiple_of(SECTOR) => Ok(sector * SECTOR),
            _ => Err(Failure::Guest),
        }
    }

    fn read(&mut self, offset: u64, into: View<'_>) -> Outcome {
        self.backend.read_to_guest(offset, into, &mut self.bounce).map_err(|e| Failure::Host("read", e))?;
        Ok(self.books.read(into.len()))
    }

    fn write(&mut self, offset: u64, from: View<'_>) -> Outcome {
        // Also where it has to wait: a part of it may have been written.
        self.changes += 1;
        self.backend.write_from_guest(offset, from, &mut self.bounce).map_err(|e| Failure::Host("write", e))?;
        self.books.wrote(from.len());
        self.after_change()
    }

    fn flush(&mut self) -> Outcome {
        self.backend.flush().map_err(|e| Failure::Host("flush", e))?;
        self.flushed = self.changes;
        Ok(self.books.flushed())
    }

    fn after_change(&mut self) -> Outcome {
        if self.write_through { self.flush() } else { Ok(0) }
    }

    /// Checks all ranges of a discard or a zeroing, then does them.
    fn for_ranges(
        &mut self,
        data: View<'_>,
        are_zeroed: bool,
        act: fn(&mut B, offset: u64, len: u64, flags: u32) -> io::Result<()>,
    ) -> Outcome {
        // 5.2.6: `sector` as u64, `num_sectors` and `flags` as u32.
        const RANGE_LEN: usize = 16;
        if data.is_empty() || !data.len().is_multiple_of(RANGE_LEN) || data.len() / RANGE_LEN > MAX_RANGES as usize {
            return Err(Failure::Guest);
        }
        // Discarding knows none.
        let known_flags = if are_zeroed { FLAG_UNMAP } else { 0 };
        // Read once: the guest may change its memory between the check and the act.
        let mut ranges = [(0, 0, 0); MAX_RANGES as usize];
        let ranges = &mut ranges[..data.len() / RANGE_LEN];
        let mut rest = data;
        for range in &mut *ranges {
            let (sector, after) = rest.split_value::<u64>().ok_or(Failure::Guest)?;
            let ([count, flags], after) = after.split_value::<[u32; 2]>().ok_or(Failure::Guest)?;
            let (count, flags) = (u32::from_le(count), u32::from_le(flags));
            if flags & !known_flags != 0 {
                return Err(Failure::Unsupported);
            }
            let len = u64::from(count) * SECTOR;
            *range = (self.offset(u64::from_le(sector), len)?, len, flags);
            if count > MAX_RANGE_SECTORS {
                return Err(Failure::Guest);
            }
            rest = after;
        }
        self.changes += 1;
        for (offset, len, flags) in ranges.iter().filter(|(_, len, _)| *len > 0) {
            act(&mut self.backend, *offset, *len, *flags).map_err(|e| Failure::Host("discard or zero a part of", e))?;
        }
        if are_zeroed {
            // Written, for all that the device knows: it is owed for afterwards, as is a large read.
            let bytes = ranges.iter().filter(|(.., flags)| flags & FLAG_UNMAP == 0).map(|(_, len, _)| len).sum();
            self.limiter.pay(bytes);
            self.moved += bytes;
        }
        self.after_change()
    }
}
