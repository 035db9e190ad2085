//! One request: parse, check, execute, answer. Virtio 1.2, 5.2.6.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::{Backend, BlockConfig, BlockMetrics, Cache, SECTOR};
use crate::metrics::DeviceMetrics;
use crate::virtio::{Answer, Chain, View};

/// Bytes of the answer to GET_ID.
pub(super) const ID_LEN: usize = 20;
/// Sectors of one discarded or zeroed range: 1 GiB, so that a slow backend is not held up for long by one.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Ranges in one such request.
pub(super) const MAX_RANGES: u32 = 16;
/// Copies to and from backends that need them are made in pieces of this size.
const BOUNCE_LEN: usize = 256 << 10;

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
}

/// A request that was executed: how many bytes it wrote to the guest, without the status.
type Outcome = Result<usize, Failure>;

/// The disk as requests see it.
pub(super) struct Disk<B> {
    backend: B,
    sectors: u64,
    serial: [u8; ID_LEN],
    config: BlockConfig,
    bounce: Vec<u8>,
    /// Every write is flushed before it is answered.
    write_through: bool,
    /// Written since the last flush.
    dirty: bool,
    metrics: Arc<DeviceMetrics>,
    counts: Arc<BlockMetrics>,
}

impl<B: Backend> Disk<B> {
    pub(super) fn new(
        backend: B,
        sectors: u64,
        serial: [u8; ID_LEN],
        config: BlockConfig,
        metrics: Arc<DeviceMetrics>,
        counts: Arc<BlockMetrics>,
    ) -> Self {
        let bounce = vec![0; BOUNCE_LEN];
        Self { backend, sectors, serial, config, bounce, write_through: false, dirty: false, metrics, counts }
    }

    /// A driver that cannot flush takes every write for durable (5.2.6.2).
    pub(super) fn set_flush_negotiated(&mut self, negotiated: bool) {
        self.write_through = self.config.cache == Cache::Writeback && !negotiated;
    }

    /// Puts `backend` in the place of what the disk was.
    pub(super) fn replace(&mut self, backend: B, sectors: u64) {
        (self.backend, self.sectors) = (backend, sectors);
    }

    /// The device stops, or the disk is replaced: what was written becomes durable, unless that was never promised.
    pub(super) fn settle(&mut self) {
        if self.dirty && self.config.cache == Cache::Writeback {
            self.dirty = false;
            if let Err(error) = self.backend.flush() {
                self.metrics.host_fault(|| format!("cannot flush a disk: {error}"));
            }
        }
    }

    /// Executes the request in `chain` and writes its status, the last writable byte, whatever happened.
    pub(super) fn serve(&mut self, chain: &mut Chain) -> Answer {
        let writable = chain.writable.view();
        let Some((data, status)) = writable.len().checked_sub(1).and_then(|at| writable.split_at(at)) else {
            // There is no place for a status. A chain that has a fault was counted where that was found.
            if chain.fault.is_none() {
                self.metrics.guest_faults.increment();
            }
            return Answer::Used(0);
        };
        let outcome = if chain.fault.is_some() {
            self.counts.failures.increment();
            status.copy_from(&[VIRTIO_BLK_S_IOERR as u8]);
            return Answer::Used(0);
        } else {
            self.execute(chain.readable.view(), data)
        };
        let code = match &outcome {
            Ok(_) => VIRTIO_BLK_S_OK,
            Err(failure) => self.count(failure),
        };
        status.copy_from(&[code as u8]);
        match outcome {
            // The length counts from the first byte, so that it reaches the status only over data that was written.
            Ok(written) if written == data.len() => Answer::Used(written as u32 + 1),
            Ok(written) => Answer::Used(written as u32),
            Err(_) if data.is_empty() => Answer::Used(1),
            Err(_) => Answer::Used(0),
        }
    }

    fn count(&self, failure: &Failure) -> u32 {
        self.counts.failures.increment();
        match failure {
            Failure::Guest => self.metrics.guest_faults.increment(),
            Failure::Unsupported => return VIRTIO_BLK_S_UNSUPP,
            Failure::Host(what, error) => self.metrics.host_fault(|| format!("cannot {what} a disk: {error}")),
        }
        VIRTIO_BLK_S_IOERR
    }

    fn execute(&mut self, readable: View<'_>, writable: View<'_>) -> Outcome {
        // type, reserved, sector: 5.2.6.
        let (kind, rest) = readable.split_value::<[u32; 2]>().ok_or(Failure::Guest)?;
        let (sector, data) = rest.split_value::<u64>().ok_or(Failure::Guest)?;
        match u32::from_le(kind[0]) {
            VIRTIO_BLK_T_IN => self.read(u64::from_le(sector), writable),
            VIRTIO_BLK_T_OUT => self.write(u64::from_le(sector), data),
            VIRTIO_BLK_T_FLUSH => self.flush(),
            VIRTIO_BLK_T_GET_ID => Ok(writable.copy_from(&self.serial)),
            // Discarding knows no flags.
            VIRTIO_BLK_T_DISCARD => self.for_ranges(data, 0, |backend, offset, len, _| backend.discard(offset, len)),
            VIRTIO_BLK_T_WRITE_ZEROES => self.for_ranges(data, FLAG_UNMAP, |backend, offset, len, flags| {
                backend.write_zeroes(offset, len, flags & FLAG_UNMAP != 0)
            }),
            _ => Err(Failure::Unsupported),
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

    fn read(&mut self, sector: u64, into: View<'_>) -> Outcome {
        let offset = self.offset(sector, into.len() as u64)?;
        self.backend.read_to_guest(offset, into, &mut self.bounce).map_err(|e| Failure::Host("read", e))?;
        self.counts.reads.increment();
        self.counts.read_bytes.add(into.len() as u64);
        Ok(into.len())
    }

    fn write(&mut self, sector: u64, from: View<'_>) -> Outcome {
        let offset = self.offset(sector, from.len() as u64)?;
        self.before_change()?;
        self.backend.write_from_guest(offset, from, &mut self.bounce).map_err(|e| Failure::Host("write", e))?;
        self.counts.writes.increment();
        self.counts.write_bytes.add(from.len() as u64);
        self.after_change()
    }

    fn flush(&mut self) -> Outcome {
        self.backend.flush().map_err(|e| Failure::Host("flush", e))?;
        self.dirty = false;
        self.counts.flushes.increment();
        Ok(0)
    }

    fn before_change(&mut self) -> Result<(), Failure> {
        if self.config.read_only {
            return Err(Failure::Guest);
        }
        self.dirty = true;
        Ok(())
    }

    fn after_change(&mut self) -> Outcome {
        if self.write_through { self.flush() } else { Ok(0) }
    }

    /// Checks all ranges of a discard or a zeroing, then does them.
    fn for_ranges(
        &mut self,
        data: View<'_>,
        known_flags: u32,
        act: fn(&mut B, offset: u64, len: u64, flags: u32) -> io::Result<()>,
    ) -> Outcome {
        // 5.2.6: `sector` as u64, `num_sectors` and `flags` as u32.
        const RANGE_LEN: usize = 16;
        self.before_change()?;
        if data.is_empty() || !data.len().is_multiple_of(RANGE_LEN) || data.len() / RANGE_LEN > MAX_RANGES as usize {
            return Err(Failure::Guest);
        }
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
        for (offset, len, flags) in ranges.iter().filter(|(_, len, _)| *len > 0) {
            act(&mut self.backend, *offset, *len, *flags).map_err(|e| Failure::Host("discard or zero a part of", e))?;
        }
        self.after_change()
    }
}
