//! Power cuts: what an overlay does to its two files is recorded, and for every point of the record a medium is built as
//! a cut there may leave it. There is no `set_len` to record: the files have their length before `disk.json` exists.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::rc::Rc;

use proptest::prelude::*;

use super::backing::Backing;
use super::map::{CLUSTER, Map, State};
use super::overlay::{Base, Overlay};

/// What a device writes whole or not at all.
const SECTOR: u64 = 512;
type Sector = [u8; SECTOR as usize];

/// Clusters of one sector of the map.
const PER_MAP_SECTOR: u64 = 2016;

/// Three sectors of the map, the last with a few clusters; the last cluster is short and ends inside a sector.
const SIZE: u64 = (2 * PER_MAP_SECTOR + 3) * CLUSTER + 700;

/// What is written lies here, in bytes: at both ends, and where one sector of the map ends and the next begins.
const HOT: [Range<u64>; 3] = [
    0..6 * CLUSTER,
    (PER_MAP_SECTOR - 3) * CLUSTER..(PER_MAP_SECTOR + 3) * CLUSTER,
    (2 * PER_MAP_SECTOR - 3) * CLUSTER..SIZE,
];

const DATA: usize = 0;
const MAP: usize = 1;

/// Content of a file by number of its sector; zeros elsewhere.
type Sectors = BTreeMap<u64, Sector>;

#[derive(Debug, Clone)]
enum Event {
    /// Sectors of a file as a write or a punched hole leaves them.
    Changed {
        file: usize,
        sectors: Vec<(u64, Sector)>,
    },
    Synced {
        file: usize,
    },
    /// A request of the guest is about to be carried out; sectors of the disk as it will leave them.
    Asked(Vec<(u64, Sector)>),
    /// A flush has been acknowledged.
    Acknowledged,
}

type Log = Rc<RefCell<Vec<Event>>>;

/// A file that records.
#[derive(Debug, Clone)]
struct Recorder {
    file: usize,
    now: Rc<RefCell<Sectors>>,
    log: Log,
    fail: Rc<RefCell<Option<io::ErrorKind>>>,
}

impl Recorder {
    /// `data` and `map` with the given content, and one record for both.
    fn pair(content: [Sectors; 2]) -> [Self; 2] {
        let log = Log::default();
        let mut file = 0..;
        content.map(|sectors| Self {
            file: file.next().unwrap(),
            now: Rc::new(RefCell::new(sectors)),
            log: Rc::clone(&log),
            fail: Rc::default(),
        })
    }

    fn check(&self) -> io::Result<()> {
        self.fail.borrow().map_or(Ok(()), |kind| Err(kind.into()))
    }
}

impl Backing for Recorder {
    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        read(&self.now.borrow(), bytes, offset);
        Ok(())
    }

    fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.check()?;
        let sectors = overwrite(&mut self.now.borrow_mut(), |_| [0; SECTOR as usize], bytes, offset);
        self.log.borrow_mut().push(Event::Changed { file: self.file, sectors });
        Ok(())
    }

    fn punch(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.write(&vec![0; len as usize], offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.check()?;
        self.log.borrow_mut().push(Event::Synced { file: self.file });
        Ok(())
    }
}

fn read(from: &Sectors, bytes: &mut [u8], offset: u64) {
    let mut at = offset;
    let mut rest = bytes;
    while !rest.is_empty() {
        let start = (at % SECTOR) as usize;
        let (now, later) = rest.split_at_mut(rest.len().min(SECTOR as usize - start));
        match from.get(&(at / SECTOR)) {
            Some(sector) => now.copy_from_slice(&sector[start..start + now.len()]),
            None => now.fill(0),
        }
        at += now.len() as u64;
        rest = later;
    }
}

/// Writes `bytes` at `offset`; what `to` lacks is `absent`. The sectors that this touched, as they are now.
fn overwrite(to: &mut Sectors, absent: impl Fn(u64) -> Sector, bytes: &[u8], offset: u64) -> Vec<(u64, Sector)> {
    let mut touched = Vec::new();
    let mut at = offset;
    let mut rest = bytes;
    while !rest.is_empty() {
        let (number, start) = (at / SECTOR, (at % SECTOR) as usize);
        let (now, later) = rest.split_at(rest.len().min(SECTOR as usize - start));
        let sector = to.entry(number).or_insert_with(|| absent(number));
        sector[start..start + now.len()].copy_from_slice(now);
        touched.push((number, *sector));
        at += now.len() as u64;
        rest = later;
    }
    touched
}

/// An image every sector of which is different and nowhere zero.
struct Pattern;

impl Pattern {
    fn sector(number: u64) -> Sector {
        let mut sector = [0xb5; SECTOR as usize];
        sector[..8].copy_from_slice(&(number | 1 << 63).to_le_bytes());
        sector
    }
}

impl Base for Pattern {
    fn read(&mut self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let touched = offset / SECTOR..(offset + bytes.len() as u64).div_ceil(SECTOR);
        read(&touched.map(|number| (number, Self::sector(number))).collect(), bytes, offset);
        Ok(())
    }
}

fn open(files: [Recorder; 2]) -> Result<Overlay<Recorder, Pattern>, TestCaseError> {
    let [data, map_file] = files;
    let map = Map::load(&map_file, SIZE).unwrap();
    let map =
        map.map_err(|cluster| TestCaseError::fail(format!("the map's sector of cluster {cluster} is damaged")))?;
    Ok(Overlay::new(SIZE, data, map_file, map, Pattern))
}

/// The sectors of the disk that anything was ever done to, and some beside them, as the guest reads them.
fn hot_sectors(disk: &mut Overlay<Recorder, Pattern>) -> Sectors {
    let mut found = Sectors::new();
    for range in HOT {
        let mut bytes = vec![0xee; (range.end - range.start) as usize];
        disk.read_at(&mut bytes, range.start).unwrap();
        overwrite(&mut found, |_| [0; SECTOR as usize], &bytes, range.start);
    }
    found
}

/// The last sector of the disk ends with it.
fn same(number: u64, one: &Sector, other: &Sector) -> bool {
    let len = SECTOR.min(SIZE - number * SECTOR) as usize;
    one[..len] == other[..len]
}

/// Which of the changes that no sync followed reach the medium.
#[derive(Debug, Clone, Copy)]
enum Unsynced {
    /// All, in order: the process was killed, the host lives on.
    All,
    None,
    /// Of each sector, any of the contents that it had since the last sync, whatever becomes of the others.
    Torn,
}

/// A drive with a cache that only a sync empties for certain.
#[derive(Default)]
struct Medium {
    /// Per file: what was there at the last sync.
    synced: [Sectors; 2],
    /// Per file: what each sector was since, the newest last.
    cached: [BTreeMap<u64, Vec<Sector>>; 2],
}

impl Medium {
    fn take(&mut self, event: &Event) {
        match event {
            Event::Changed { file, sectors } => {
                for (number, sector) in sectors {
                    self.cached[*file].entry(*number).or_default().push(*sector);
                }
            }
            Event::Synced { file } => {
                for (number, contents) in std::mem::take(&mut self.cached[*file]) {
                    self.synced[*file].extend(contents.last().map(|newest| (number, *newest)));
                }
            }
            Event::Asked(_) | Event::Acknowledged => {}
        }
    }

    fn after_cut(&self, unsynced: Unsynced, mut random: impl FnMut() -> usize) -> [Sectors; 2] {
        let mut left = self.synced.clone();
        for (file, cached) in self.cached.iter().enumerate() {
            for (number, contents) in cached {
                let survivor = match unsynced {
                    Unsynced::All => contents.last(),
                    Unsynced::None => None,
                    // One past the newest stands for what was synced.
                    Unsynced::Torn => contents.get(random() % (contents.len() + 1)),
                };
                left[file].extend(survivor.map(|sector| (*number, *sector)));
            }
        }
        left
    }
}

#[derive(Debug, Clone)]
enum Op {
    Write(u64, Vec<u8>),
    /// Discards do the same.
    Zero(u64, u64),
    Flush,
}

fn op() -> impl Strategy<Value = Op> {
    let place = (0..HOT.len()).prop_flat_map(|hot| {
        let Range { start, end } = HOT[hot].clone();
        // Anywhere; where a cluster begins; where a sector begins.
        let at = prop_oneof![start..end, (start / CLUSTER..end / CLUSTER).prop_map(|cluster| cluster * CLUSTER)];
        let at = prop_oneof![2 => at, 1 => (start / SECTOR..end / SECTOR).prop_map(|sector| sector * SECTOR)];
        let len = prop_oneof![1..2000_u64, Just(CLUSTER), Just(3 * CLUSTER), Just(end - start)];
        (at, len).prop_map(move |(at, len)| (at, len.min(end - at)))
    });
    prop_oneof![
        4 => (place.clone(), 1..=255_u8).prop_map(|((at, len), fill)| Op::Write(at, vec![fill; len as usize])),
        2 => place.prop_map(|(at, len)| Op::Zero(at, len)),
        2 => Just(Op::Flush),
    ]
}

/// Carries `ops` out on a new disk and returns the record.
fn record(ops: Vec<Op>) -> Vec<Event> {
    let files = Recorder::pair(Default::default());
    let log = Rc::clone(&files[DATA].log);
    let mut disk = open(files).unwrap();
    let mut model = Sectors::new();
    let mut ask = |bytes: &[u8], at| {
        let sectors = overwrite(&mut model, Pattern::sector, bytes, at);
        log.borrow_mut().push(Event::Asked(sectors));
    };
    for op in ops {
        match op {
            Op::Write(at, bytes) => {
                ask(&bytes, at);
                disk.write_at(&bytes, at).unwrap();
            }
            Op::Zero(at, len) => {
                ask(&vec![0; len as usize], at);
                disk.write_zeroes(at, len).unwrap();
            }
            Op::Flush => {
                disk.flush().unwrap();
                log.borrow_mut().push(Event::Acknowledged);
            }
        }
    }
    log.take()
}

/// Opens what a cut left and holds it against what it may be; then writes, flushes, cuts again and opens again.
fn recover(left: [Sectors; 2], admissible: &BTreeMap<u64, Vec<Sector>>) -> Result<(), TestCaseError> {
    let mut disk = open(Recorder::pair(left.clone()))?;
    let mut found = hot_sectors(&mut disk);
    for (number, sector) in &found {
        let known = match admissible.get(number) {
            Some(contents) => contents.iter().any(|content| same(*number, content, sector)),
            None => same(*number, &Pattern::sector(*number), sector),
        };
        prop_assert!(known, "sector {number} is neither what was acknowledged nor what was written since");
    }

    let files = Recorder::pair(left.clone());
    let log = Rc::clone(&files[DATA].log);
    let mut disk = open(files)?;
    // A part of a cluster at the end of each region, so that a rest is copied from wherever it is.
    for range in HOT {
        disk.write_at(&[0x5a; 300], range.end - 1000).unwrap();
        overwrite(&mut found, Pattern::sector, &[0x5a; 300], range.end - 1000);
    }
    disk.flush().unwrap();
    let mut medium = Medium { synced: left, ..Medium::default() };
    log.borrow().iter().for_each(|event| medium.take(event));
    let mut disk = open(Recorder::pair(medium.after_cut(Unsynced::None, || 0)))?;
    for (number, sector) in hot_sectors(&mut disk) {
        prop_assert!(same(number, &found[&number], &sector), "sector {number} changed after the disk was opened again");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// At every point of every run: each sector of the disk holds what it held at the last acknowledged flush, or
    /// something that was written to it since; and what is left is a disk that works.
    #[test]
    fn an_acknowledged_flush_survives_a_cut_at_any_point(
        ops in prop::collection::vec(op(), 1..24), mut seed: u64,
    ) {
        let mut random = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize
        };
        let mut medium = Medium::default();
        // Of each sector that was written: what it held when the last flush was acknowledged, and everything since.
        let mut admissible: BTreeMap<u64, Vec<Sector>> = BTreeMap::new();
        for (cut, event) in record(ops).iter().enumerate() {
            medium.take(event);
            match event {
                Event::Asked(sectors) => for (number, sector) in sectors {
                    admissible.entry(*number).or_insert_with(|| vec![Pattern::sector(*number)]).push(*sector);
                },
                Event::Acknowledged => for contents in admissible.values_mut() {
                    contents.drain(..contents.len() - 1);
                },
                Event::Changed { .. } | Event::Synced { .. } => {}
            }
            for unsynced in [Unsynced::All, Unsynced::None, Unsynced::Torn] {
                let left = medium.after_cut(unsynced, &mut random);
                recover(left, &admissible).map_err(|e| TestCaseError::fail(format!("cut {cut}, {unsynced:?}: {e}")))?;
            }
        }
    }
}

#[test]
fn a_full_host_disk_loses_nothing_and_a_failed_sync_is_remembered() {
    let files = Recorder::pair(Default::default());
    let [data_fails, map_fails] = [DATA, MAP].map(|file| Rc::clone(&files[file].fail));
    let mut disk = open(files).unwrap();
    disk.write_at(&[1; 5000], 100).unwrap();
    let before = hot_sectors(&mut disk);

    *data_fails.borrow_mut() = Some(io::ErrorKind::StorageFull);
    assert_eq!(disk.write_at(&[2; 5000], 10_000).unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert!(hot_sectors(&mut disk) == before, "a write that failed for want of space changed nothing");
    *data_fails.borrow_mut() = None;

    *map_fails.borrow_mut() = Some(io::ErrorKind::StorageFull);
    assert_eq!(disk.flush().unwrap_err().kind(), io::ErrorKind::StorageFull);
    *map_fails.borrow_mut() = None;
    disk.flush().unwrap();

    disk.write_at(&[3], 0).unwrap();
    *data_fails.borrow_mut() = Some(io::ErrorKind::Other);
    assert!(disk.flush().is_err());
    *data_fails.borrow_mut() = None;
    assert!(disk.flush().unwrap_err().to_string().contains("earlier sync"), "success now would be a lie");
}

#[test]
fn a_write_that_changes_no_state_touches_no_map() {
    let files = Recorder::pair(Default::default());
    let log = Rc::clone(&files[DATA].log);
    let mut disk = open(files).unwrap();
    disk.write_at(&[1; 4096], 4096).unwrap();
    disk.flush().unwrap();
    disk.flush().unwrap();
    let before = log.borrow().len();
    disk.write_at(&[2; 10], 4100).unwrap();
    disk.flush().unwrap();
    assert!(matches!(log.borrow()[before..], [Event::Changed { file: DATA, .. }, Event::Synced { file: DATA }]));
    assert_eq!(disk.map().state(1), State::Data);
}
