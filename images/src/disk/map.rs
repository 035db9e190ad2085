//! Where each cluster of a disk is to be read from.
//!
//! The file is a row of 512-byte sectors: 504 bytes with two bits for each of 2016 clusters, lowest bits first, then the
//! first 8 bytes of BLAKE3 over the sector's number and those 504 bytes. A sector that is all zeros (a hole: never
//! written) stands for 2016 clusters of the base. A sector is the unit that a device writes whole or not at all, so a
//! power cut leaves each sector old or new; a damaged one is found when the disk is opened.

use std::collections::BTreeSet;
use std::io;

use super::backing::Backing;

/// Bytes of the disk that one entry of the map speaks for: the block size of nearly every guest file system, so that
/// nearly no write has to copy a rest from the base.
pub(super) const CLUSTER: u64 = 4096;

const SECTOR: usize = 512;
const BODY: usize = SECTOR - 8;
const PER_BYTE: u64 = 4;
const PER_SECTOR: u64 = BODY as u64 * PER_BYTE;

/// Sectors read at once when a map is loaded.
const BATCH: usize = 256;

/// Where a cluster's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// In the image.
    Base = 0,
    /// In the file `data`.
    Data = 1,
    /// Nowhere: it reads as zeros.
    Zero = 2,
}

/// The map of a whole disk; sectors that speak only of the base take no memory.
#[derive(Debug)]
pub(super) struct Map {
    clusters: u64,
    sectors: Vec<Option<Box<[u8; BODY]>>>,
    /// Sectors that differ from the file.
    dirty: BTreeSet<usize>,
}

impl Map {
    /// The map of a disk of `size` bytes nothing of which was written.
    pub(super) fn new(size: u64) -> Self {
        let clusters = size.div_ceil(CLUSTER);
        // A disk has at most 2^34 clusters, so this fits.
        Self { clusters, sectors: vec![None; clusters.div_ceil(PER_SECTOR) as usize], dirty: BTreeSet::new() }
    }

    /// Length of the file for a disk of `size` bytes.
    pub(super) fn file_len(size: u64) -> u64 {
        size.div_ceil(CLUSTER).div_ceil(PER_SECTOR) * SECTOR as u64
    }

    /// Reads the map of a disk of `size` bytes. The inner error is the first cluster of a damaged sector.
    pub(super) fn load(file: &impl Backing, size: u64) -> io::Result<Result<Self, u64>> {
        let mut this = Self::new(size);
        let mut bytes = vec![0; BATCH * SECTOR];
        let mut first = 0;
        while first < this.sectors.len() {
            let count = BATCH.min(this.sectors.len() - first);
            let batch = &mut bytes[..count * SECTOR];
            file.read(batch, (first * SECTOR) as u64)?;
            for (number, sector) in (first..).zip(batch.as_chunks::<SECTOR>().0) {
                if *sector == [0; SECTOR] {
                    continue;
                }
                let start = number as u64 * PER_SECTOR;
                let Some(body) = decode(number, sector) else { return Ok(Err(start)) };
                this.sectors[number] = Some(body);
                // Past the disk's end there is nothing: who says otherwise has the data counted that is not there.
                if (this.clusters..start + PER_SECTOR).any(|cluster| this.state(cluster) != State::Base) {
                    return Ok(Err(start));
                }
            }
            first += count;
        }
        Ok(Ok(this))
    }

    /// State of one cluster.
    pub(super) fn state(&self, cluster: u64) -> State {
        let Some(Some(body)) = self.sectors.get((cluster / PER_SECTOR) as usize) else { return State::Base };
        let at = cluster % PER_SECTOR;
        match body[(at / PER_BYTE) as usize] >> (at % PER_BYTE * 2) & 3 {
            0 => State::Base,
            1 => State::Data,
            _ => State::Zero,
        }
    }

    /// State of the cluster `first`, and the end of the run of clusters with that state, `end` at most.
    pub(super) fn run(&self, first: u64, end: u64) -> (State, u64) {
        let state = self.state(first);
        let mut at = first + 1;
        while at < end {
            let untouched = matches!(self.sectors.get((at / PER_SECTOR) as usize), Some(None));
            if untouched && state == State::Base {
                at = (at / PER_SECTOR + 1) * PER_SECTOR;
            } else if self.state(at) == state {
                at += 1;
            } else {
                break;
            }
        }
        (state, at.min(end))
    }

    /// Gives the clusters from `first` up to `end` a state.
    pub(super) fn set(&mut self, first: u64, end: u64, state: State) {
        for cluster in first..end.min(self.clusters) {
            if self.state(cluster) == state {
                continue;
            }
            let sector = (cluster / PER_SECTOR) as usize;
            let at = cluster % PER_SECTOR;
            let shift = at % PER_BYTE * 2;
            let body = self.sectors[sector].get_or_insert_with(|| Box::new([0; BODY]));
            let byte = &mut body[(at / PER_BYTE) as usize];
            *byte = *byte & !(3 << shift) | (state as u8) << shift;
            self.dirty.insert(sector);
        }
    }

    /// Writes what changed and waits until it survives a power cut. What the map speaks of must survive one already.
    pub(super) fn store(&mut self, file: &mut impl Backing) -> io::Result<()> {
        if self.dirty.is_empty() {
            return Ok(());
        }
        for &number in &self.dirty {
            if let Some(body) = &self.sectors[number] {
                file.write(&encode(number, body), (number * SECTOR) as u64)?;
            }
        }
        file.sync()?;
        self.dirty.clear();
        Ok(())
    }

    /// Calls `visit` with each sector of the file, in order, as this map would have it.
    pub(super) fn each_sector(&self, mut visit: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        self.sectors.iter().enumerate().try_for_each(|(number, body)| match body {
            Some(body) => visit(&encode(number, body)),
            None => visit(&[0; SECTOR]),
        })
    }

    /// Number of clusters whose bytes are in `data`.
    pub(super) fn data_clusters(&self) -> u64 {
        // A body has the low bit of a pair set exactly for State::Data.
        let ones = |body: &[u8; BODY]| body.iter().map(|byte| u64::from((byte & 0x55).count_ones())).sum::<u64>();
        self.sectors.iter().flatten().map(|body| ones(body)).sum()
    }
}

fn checksum(number: usize, body: &[u8; BODY]) -> [u8; SECTOR - BODY] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(number as u64).to_le_bytes()).update(body);
    let mut sum = [0; SECTOR - BODY];
    hasher.finalize_xof().fill(&mut sum);
    sum
}

fn encode(number: usize, body: &[u8; BODY]) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    sector[..BODY].copy_from_slice(body);
    sector[BODY..].copy_from_slice(&checksum(number, body));
    sector
}

fn decode(number: usize, sector: &[u8; SECTOR]) -> Option<Box<[u8; BODY]>> {
    let body = sector.first_chunk::<BODY>()?;
    // Both bits of a pair have no meaning, and nobody writes them.
    let has_meaning = || body.iter().all(|byte| byte & byte >> 1 & 0x55 == 0);
    (sector[BODY..] == checksum(number, body) && has_meaning()).then(|| Box::new(*body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_and_run_agree_across_sectors() {
        let mut map = Map::new(3 * PER_SECTOR * CLUSTER);
        map.set(10, PER_SECTOR + 20, State::Data);
        map.set(15, 16, State::Zero);
        let end = 3 * PER_SECTOR;
        let mut runs = Vec::new();
        let mut at = 0;
        while at < end {
            let (state, next) = map.run(at, end);
            runs.push((state, next));
            at = next;
        }
        let (data, zero, base) = (State::Data, State::Zero, State::Base);
        assert_eq!(runs, [(base, 10), (data, 15), (zero, 16), (data, PER_SECTOR + 20), (base, end)]);
        assert_eq!(map.data_clusters(), PER_SECTOR + 9);
    }

    #[test]
    fn a_map_speaks_of_no_cluster_past_the_end() {
        let mut map = Map::new(PER_SECTOR * CLUSTER);
        map.set(32, 33, State::Data);
        let mut file = tempfile::tempfile().unwrap();
        map.store(&mut file).unwrap();
        assert!(Map::load(&file, 33 * CLUSTER).unwrap().is_ok());
        assert_eq!(Map::load(&file, 32 * CLUSTER).unwrap().unwrap_err(), 0);
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let mut body = [0; BODY];
        body[7] = 1;
        let good = encode(3, &body);
        assert_eq!(decode(0, &encode(0, &[0x30; BODY])), None, "a pair without a meaning");
        assert_eq!(decode(3, &good).as_deref(), Some(&body));
        assert_eq!(decode(4, &good), None, "a sector at another place");
        for bit in 0..SECTOR * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(3, &bad), None, "bit {bit}");
        }
    }
}
