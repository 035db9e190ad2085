//! Reads and writes of a disk whose untouched clusters are in a base.
//!
//! A cluster is at the same offset in `data` as on the disk, so nothing is ever allocated or moved, and no write can
//! damage another cluster. What keeps an acknowledged flush through a power cut at any point:
//!
//! 1. A write goes to `data` first; only then the map *in memory* says `Data`.
//! 2. [`Overlay::flush`] syncs `data`, then writes the changed sectors of the map, then syncs those. The map on disk
//!    thus never speaks of bytes that could still be lost, and each of its sectors is old or new, never torn.
//! 3. A write into part of a cluster that is not in `data` writes the whole cluster, its rest copied. Leftovers in
//!    `data` of writes that never were flushed are therefore never seen.
//! 4. A discard sets `Zero` in memory and punches a hole. If the hole survives and the map does not, the cluster reads as
//!    zeros too.
//! 5. After a failed sync nobody knows what is on disk (Linux forgets the failed pages), so every later flush fails.

use std::io;

use super::backing::Backing;
use super::map::{CLUSTER, Map, State};

/// Where clusters come from that were never written.
pub(super) trait Base {
    /// Fills `bytes` from `offset`; the range is within the disk.
    fn read(&mut self, bytes: &mut [u8], offset: u64) -> io::Result<()>;
}

#[derive(Debug)]
pub(super) struct Overlay<F, B> {
    size: u64,
    data: F,
    map_file: F,
    map: Map,
    base: B,
    /// `data` has changed since it was synced.
    unsynced: bool,
    /// A sync failed; see 5 above.
    broken: bool,
    /// One cluster while it is copied up.
    cluster: Box<[u8; CLUSTER as usize]>,
}

impl<F: Backing, B: Base> Overlay<F, B> {
    /// A disk of `size` bytes; `map` is the content of `map_file`.
    pub(super) fn new(size: u64, data: F, map_file: F, map: Map, base: B) -> Self {
        let cluster = Box::new([0; CLUSTER as usize]);
        Self { size, data, map_file, map, base, unsynced: false, broken: false, cluster }
    }

    pub(super) const fn size(&self) -> u64 {
        self.size
    }

    pub(super) const fn map(&self) -> &Map {
        &self.map
    }

    pub(super) const fn data(&self) -> &F {
        &self.data
    }

    pub(super) const fn base(&self) -> &B {
        &self.base
    }

    pub(super) const fn base_mut(&mut self) -> &mut B {
        &mut self.base
    }

    /// Calls `visit` with each range, in bytes, of the clusters that the given range touches and that are in the base.
    pub(super) fn each_base_range(&self, offset: u64, len: u64, mut visit: impl FnMut(u64, u64)) {
        let end = offset.saturating_add(len).min(self.size).div_ceil(CLUSTER);
        let mut at = offset / CLUSTER;
        while at < end {
            let (state, run_end) = self.map.run(at, end);
            if state == State::Base {
                visit(at * CLUSTER, (run_end * CLUSTER).min(self.size));
            }
            at = run_end;
        }
    }

    pub(super) fn read_at(&mut self, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
        self.check(offset, bytes.len() as u64)?;
        while !bytes.is_empty() {
            let end = offset + bytes.len() as u64;
            let (state, run_end) = self.map.run(offset / CLUSTER, end.div_ceil(CLUSTER));
            let take = end.min(run_end * CLUSTER) - offset;
            // At most bytes.len(), which fits.
            let (now, rest) = bytes.split_at_mut(take as usize);
            match state {
                State::Base => self.base.read(now, offset)?,
                State::Data => self.data.read(now, offset)?,
                State::Zero => now.fill(0),
            }
            bytes = rest;
            offset += take;
        }
        Ok(())
    }

    pub(super) fn write_at(&mut self, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        self.check(offset, bytes.len() as u64)?;
        while !bytes.is_empty() {
            let whole = self.whole_clusters(offset, bytes.len() as u64);
            let to_boundary = CLUSTER - offset % CLUSTER;
            let take = if whole > 0 { whole } else { to_boundary.min(bytes.len() as u64) };
            let (now, rest) = bytes.split_at(take as usize);
            self.unsynced = true;
            if whole > 0 || self.map.state(offset / CLUSTER) == State::Data {
                self.data.write(now, offset)?;
            } else {
                self.copy_up(offset, |cluster, at| cluster[at..at + now.len()].copy_from_slice(now))?;
            }
            self.map.set(offset / CLUSTER, (offset + take).div_ceil(CLUSTER), State::Data);
            bytes = rest;
            offset += take;
        }
        Ok(())
    }

    /// Makes a range read as zeros and gives back the space of the clusters that lie in it whole.
    pub(super) fn write_zeroes(&mut self, mut offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        let end = offset + len;
        while offset < end {
            let whole = self.whole_clusters(offset, end - offset);
            let take = if whole > 0 { whole } else { (CLUSTER - offset % CLUSTER).min(end - offset) };
            let cluster = offset / CLUSTER;
            self.unsynced = true;
            if whole > 0 {
                self.map.set(cluster, (offset + take).div_ceil(CLUSTER), State::Zero);
                self.data.punch(offset, take)?;
            } else {
                match self.map.state(cluster) {
                    State::Zero => {}
                    State::Data => self.data.write(&[0; CLUSTER as usize][..take as usize], offset)?,
                    State::Base => {
                        self.copy_up(offset, |bytes, at| bytes[at..at + take as usize].fill(0))?;
                        self.map.set(cluster, cluster + 1, State::Data);
                    }
                }
            }
            offset += take;
        }
        Ok(())
    }

    /// Returns when everything written so far survives a power cut.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other("an earlier sync of this disk failed; stop the VM and check the host's disk"));
        }
        if self.unsynced {
            self.data.sync().inspect_err(|_| self.broken = true)?;
            self.unsynced = false;
        }
        // A full disk is not the end: the map stays dirty and the next flush tries again.
        let full = |e: &io::Error| e.kind() == io::ErrorKind::StorageFull;
        self.map.store(&mut self.map_file).inspect_err(|e| self.broken = !full(e))
    }

    /// Bytes from `offset` on, `len` at most, that are whole clusters; the last cluster of the disk may be short.
    fn whole_clusters(&self, offset: u64, len: u64) -> u64 {
        if !offset.is_multiple_of(CLUSTER) {
            0
        } else if offset + len == self.size {
            len
        } else {
            len / CLUSTER * CLUSTER
        }
    }

    /// Writes the whole cluster of `offset`, which is not in `data`, to `data`, after `change` has had its way with it;
    /// `change` is told where in the cluster `offset` is. The caller updates the map.
    fn copy_up(&mut self, offset: u64, change: impl FnOnce(&mut [u8], usize)) -> io::Result<()> {
        let at = offset % CLUSTER;
        let start = offset - at;
        let cluster = &mut self.cluster[..CLUSTER.min(self.size - start) as usize];
        match self.map.state(start / CLUSTER) {
            State::Base => self.base.read(cluster, start)?,
            State::Data | State::Zero => cluster.fill(0),
        }
        change(cluster, at as usize);
        self.data.write(cluster, start)
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.size) {
            return Ok(());
        }
        let what = format!("{len} bytes at {offset} reach past the end of the disk ({} bytes)", self.size);
        Err(io::Error::new(io::ErrorKind::InvalidInput, what))
    }
}
