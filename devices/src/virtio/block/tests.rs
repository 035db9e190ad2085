use std::io::{self, Read, Seek, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;
use crate::testing::{Driver, DriverQueue, Piece};
use crate::virtio::limiter::BucketConfig;

pub(super) const HEADER: u64 = Driver::BUFFERS;
pub(super) const STATUS: u64 = Driver::BUFFERS + 0x100;
pub(super) const DATA: u64 = Driver::BUFFERS + 0x1000;

/// A disk in memory that notes what happens to it.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<Noted>>);

#[derive(Default)]
struct Noted {
    bytes: Vec<u8>,
    calls: Vec<String>,
    broken: bool,
}

impl Notes {
    fn new(len: usize) -> Self {
        let notes = Self::default();
        notes.0.lock().unwrap().bytes = vec![0; len];
        notes
    }

    fn call(&self, what: String) -> io::Result<std::sync::MutexGuard<'_, Noted>> {
        let mut noted = self.0.lock().unwrap();
        if noted.broken {
            return Err(io::Error::other("broken on purpose"));
        }
        noted.calls.push(what);
        Ok(noted)
    }

    fn take_calls(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().calls)
    }
}

impl Backend for Notes {
    fn size(&self) -> u64 {
        self.0.lock().unwrap().bytes.len() as u64
    }
    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let noted = self.call(format!("read {offset} {}", data.len()))?;
        data.copy_from_slice(&noted.bytes[offset as usize..][..data.len()]);
        Ok(())
    }
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut noted = self.call(format!("write {offset} {}", data.len()))?;
        noted.bytes[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        self.call("flush".into()).map(|_| ())
    }
    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.call(format!("discard {offset} {len}")).map(|_| ())
    }
    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let mut noted = self.call(format!("zero {offset} {len} {unmap}"))?;
        noted.bytes[offset as usize..][..len as usize].fill(0);
        Ok(())
    }
}

pub(super) fn header(driver: &Driver, kind: u32, sector: u64) {
    driver.put(HEADER, &kind.to_le_bytes());
    driver.put(HEADER + 4, &[0; 4]);
    driver.put(HEADER + 8, &sector.to_le_bytes());
    driver.put(STATUS, &[0xee]);
}

/// Runs one request; returns status and length.
pub(super) fn request(driver: &Driver, queue: &mut DriverQueue, kind: u32, sector: u64, data: &[Piece]) -> (u8, u32) {
    header(driver, kind, sector);
    let mut chain = vec![Piece::Read(HEADER, 16)];
    chain.extend(data);
    chain.push(Piece::Write(STATUS, 1));
    let len = driver.run(queue, &chain);
    (driver.get(STATUS, 1)[0], len)
}

pub(super) const IN: u32 = 0;
pub(super) const OUT: u32 = 1;
pub(super) const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;

#[test]
fn geometry_ends_where_no_bios_goes_on() {
    assert_eq!(
        [1 << 21, 1 << 24, u64::MAX].map(super::geometry),
        [[32, 8, 16, 63], [255, 63, 16, 63], [255, 63, 16, 63]]
    );
}

#[test]
fn a_raw_file_is_read_written_and_flushed() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[7; 4096 + 100]).unwrap();
    let mut driver =
        Driver::attach(Block::new(RawFile::new(file.try_clone().unwrap()).unwrap(), BlockConfig::default()).unwrap());
    let mut queue = driver.up().remove(0);
    assert_eq!(u64::from_le_bytes(driver.machine.read(driver.device_config(0))), 8, "whole sectors only");
    assert_eq!(driver.machine.read::<4>(driver.device_config(16)), [1, 0, 16, 63], "less than a cylinder is one");

    driver.put(DATA, b"written by the guest");
    assert_eq!(request(&driver, &mut queue, OUT, 3, &[Piece::Read(DATA, 512)]), (0, 1));
    // In two odd pieces, the status in the same buffer as the last of the data.
    header(&driver, IN, 3);
    let chain = [
        Piece::Read(HEADER, 3),
        Piece::Read(HEADER + 3, 13),
        Piece::Write(DATA + 600, 5),
        Piece::Write(DATA + 0x2000, 508),
    ];
    assert_eq!(driver.run(&mut queue, &chain), 513);
    assert_eq!(driver.get(DATA + 600, 5), b"writt");
    assert_eq!(driver.get(DATA + 0x2000, 15), b"en by the guest");
    assert_eq!(driver.get(DATA + 0x2000 + 507, 1), [0]);

    assert_eq!(request(&driver, &mut queue, FLUSH, 0, &[]), (0, 1));
    assert_eq!(request(&driver, &mut queue, WRITE_ZEROES, 0, &[]).0, 1, "no range");
    driver.put(DATA, &0u64.to_le_bytes());
    driver.put(DATA + 8, &1u64.to_le_bytes());
    for kind in [WRITE_ZEROES, DISCARD] {
        assert_eq!(request(&driver, &mut queue, kind, 0, &[Piece::Read(DATA, 16)]), (0, 1));
    }
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), 4196);
    assert_eq!((&bytes[..512], &bytes[512..514]), (&[0; 512][..], &[7, 7][..]));
    assert_eq!(&bytes[1536..1556], b"written by the guest");
}

#[test]
fn large_requests_take_turns_and_all_are_done() {
    const PIECE: u32 = 700 << 10;
    const PIECES: usize = 100;
    let len = u64::from(PIECE) * PIECES as u64;
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    for with_ring in [false, true] {
        let file = RawFile::new(file.try_clone().unwrap()).unwrap();
        let ring = if with_ring { file.ring().ok() } else { None };
        let block = Block::over(Medium { backend: file, ring }, BlockConfig::default()).unwrap();
        let counts = Arc::clone(block.block_metrics());
        let mut driver = Driver::attach(block);
        let mut queue = driver.up().remove(0);
        header(&driver, IN, 0);
        // More than one turn, and more than a ring takes at once; all to the same place in memory.
        for _ in 0..5 {
            let mut chain = vec![Piece::Read(HEADER, 16)];
            chain.extend([Piece::Write(DATA, PIECE); PIECES]);
            chain.push(Piece::Write(STATUS, 1));
            queue.add(&chain);
        }
        driver.kick(&queue);
        for _ in 0..5 {
            assert_eq!(u64::from(queue.wait().1), len + 1);
        }
        assert_eq!((counts.reads.value(), counts.failures.value()), (5, 0));
    }
}

#[test]
fn zeroing_is_owed_for() {
    let disk = Notes::new(1 << 20);
    let bucket = BucketConfig { size: 1 << 20, one_time_burst: 0, refill_time: Duration::from_secs(3600) };
    let limits = LimiterConfig { bandwidth: Some(bucket), ..LimiterConfig::NONE };
    let block = Block::new(disk, BlockConfig { limits, ..Default::default() }).unwrap();
    let counts = Arc::clone(block.block_metrics());
    let mut driver = Driver::attach(block);
    let mut queue = driver.up().remove(0);
    driver.put(DATA, &0u64.to_le_bytes());
    // 1 MiB, first as what may be discarded, then not: only that is paid for.
    for flags in [1, 0] {
        driver.put(DATA + 8, &[2048, flags].map(u32::to_le_bytes).concat());
        assert_eq!(request(&driver, &mut queue, WRITE_ZEROES, 0, &[Piece::Read(DATA, 16)]), (0, 1));
        assert_eq!(counts.throttled.value(), 0);
    }
    header(&driver, IN, 0);
    queue.add(&[Piece::Read(HEADER, 16), Piece::Write(DATA, 512), Piece::Write(STATUS, 1)]);
    driver.kick(&queue);
    let deadline = Instant::now() + Duration::from_secs(20);
    while counts.throttled.value() == 0 {
        assert!(Instant::now() < deadline, "there is credit left");
        std::thread::yield_now();
    }
    assert!(queue.take().is_none());
}

#[test]
fn requests_are_checked_before_the_backend_sees_them() {
    let disk = Notes::new(64 << 10);
    let block =
        Block::new(disk.clone(), BlockConfig { serial: "disk-0123456789-0123456789".into(), ..Default::default() })
            .unwrap();
    let (metrics, counts) = (Arc::clone(block.metrics()), Arc::clone(block.block_metrics()));
    let mut driver = Driver::attach(block);
    let mut queue = driver.up().remove(0);
    let sectors = 128;
    for (kind, sector, data) in [
        (IN, sectors, vec![Piece::Write(DATA, 512)]),
        (IN, sectors - 1, vec![Piece::Write(DATA, 1024)]),
        (IN, 0, vec![Piece::Write(DATA, 511)]),
        (IN, u64::MAX, vec![Piece::Write(DATA, 512)]),
        (IN, u64::MAX / 512, vec![Piece::Write(DATA, 512)]),
        (OUT, sectors, vec![Piece::Read(DATA, 512)]),
        (OUT, 0, vec![Piece::Read(DATA, 100)]),
    ] {
        let faults = metrics.guest_faults.value();
        assert_eq!(request(&driver, &mut queue, kind, sector, &data).0, 1, "{kind} {sector}");
        assert_eq!(metrics.guest_faults.value(), faults + 1);
    }
    assert_eq!(request(&driver, &mut queue, 99, 0, &[]).0, 2, "unknown requests are unsupported");
    assert_eq!(disk.take_calls(), Vec::<String>::new());
    assert_eq!(request(&driver, &mut queue, IN, sectors - 1, &[Piece::Write(DATA, 512)]), (0, 513));
    assert_eq!(request(&driver, &mut queue, GET_ID, 0, &[Piece::Write(DATA, 20)]), (0, 21));
    assert_eq!(driver.get(DATA, 20), b"disk-0123456789-0123");
    assert_eq!(request(&driver, &mut queue, GET_ID, 0, &[Piece::Write(DATA, 64)]), (0, 20));
    assert_eq!(disk.take_calls(), ["read 65024 512"]);
    assert_eq!((counts.reads.value(), counts.failures.value()), (1, 8));

    disk.0.lock().unwrap().broken = true;
    assert_eq!(request(&driver, &mut queue, IN, 0, &[Piece::Write(DATA, 512)]), (1, 0));
    assert!(metrics.first_host_fault().unwrap().contains("broken on purpose"));
}

#[test]
fn ranges_are_all_checked_before_the_first_is_touched() {
    let disk = Notes::new(64 << 10);
    let mut driver = Driver::attach(Block::new(disk.clone(), BlockConfig::default()).unwrap());
    let mut queue = driver.up().remove(0);
    let mut ranges = |kind: u32, ranges: &[(u64, u32, u32)]| {
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|(sector, count, flags)| {
                [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
            })
            .collect();
        driver.put(DATA, &bytes);
        request(&driver, &mut queue, kind, 0, &[Piece::Read(DATA, bytes.len() as u32)]).0
    };
    assert_eq!(ranges(DISCARD, &[(1, 2, 0), (4, 4, 0)]), 0);
    assert_eq!(ranges(WRITE_ZEROES, &[(0, 8, 1), (8, 8, 0), (3, 0, 0)]), 0);
    assert_eq!(
        disk.take_calls(),
        ["discard 512 1024", "discard 2048 2048", "zero 0 4096 true", "zero 4096 4096 false"]
    );
    assert_eq!(ranges(DISCARD, &[(1, 2, 1)]), 2, "discard has no flags");
    assert_eq!(ranges(WRITE_ZEROES, &[(1, 2, 2)]), 2);
    assert_eq!(ranges(DISCARD, &[(0, 1, 0), (127, 2, 0)]), 1);
    assert_eq!(ranges(DISCARD, &[(u64::MAX, 1, 0)]), 1);
    assert_eq!(ranges(DISCARD, &[(0, 1, 0); 17]), 1);
    assert_eq!(disk.take_calls(), Vec::<String>::new());
}

#[test]
fn a_read_only_disk_refuses_changes() {
    let disk = Notes::new(4096);
    let config = BlockConfig { read_only: true, ..Default::default() };
    let mut driver = Driver::attach(Block::new(disk.clone(), config).unwrap());
    let mut queue = driver.up().remove(0);
    assert_ne!(driver.offered() & 1 << VIRTIO_BLK_F_RO, 0);
    driver.put(DATA, &1u128.to_le_bytes());
    for (kind, len) in [(OUT, 512), (DISCARD, 16), (WRITE_ZEROES, 16)] {
        assert_eq!(request(&driver, &mut queue, kind, 0, &[Piece::Read(DATA, len)]).0, 1);
    }
    assert_eq!(disk.take_calls(), Vec::<String>::new());
}

#[test]
fn durability_is_what_was_promised() {
    let flush = 1 << VIRTIO_BLK_F_FLUSH;
    for (cache, negotiated, expected) in [
        (Cache::Writeback, flush, vec!["write 0 512"]),
        (Cache::Writeback, 0, vec!["write 0 512", "flush"]),
        (Cache::Unsafe, 0, vec!["write 0 512"]),
    ] {
        let disk = Notes::new(4096);
        let mut driver = Driver::attach(Block::new(disk.clone(), BlockConfig { cache, ..Default::default() }).unwrap());
        assert_eq!(driver.offered() & flush != 0, cache == Cache::Writeback);
        let mut queue = driver.prepare_all(flush & !negotiated).remove(0);
        driver.start();
        assert_eq!(request(&driver, &mut queue, OUT, 0, &[Piece::Read(DATA, 512)]).0, 0);
        assert_eq!(disk.take_calls(), expected);
        // A device that stops leaves nothing behind in a cache that was promised to be flushable.
        driver.set_status(0);
        let after: &[&str] = if negotiated != 0 { &["flush"] } else { &[] };
        assert_eq!(disk.take_calls(), after);
    }
}

#[test]
fn a_full_ring_of_indirect_requests_comes_back() {
    let disk = Notes::new(1 << 20);
    let mut driver = Driver::attach(Block::new(disk, BlockConfig::default()).unwrap());
    let mut queue = driver.up().remove(0);
    header(&driver, OUT, 0);
    for request in 0..u64::from(queue.size) {
        let table = DATA + 0x10_0000 + request * 64;
        queue
            .add_indirect(table, &[Piece::Read(HEADER, 16), Piece::Read(DATA, 512), Piece::Write(STATUS + request, 1)]);
    }
    driver.kick(&queue);
    for request in 0..u32::from(queue.size) {
        assert_eq!(queue.wait(), (request, 1));
    }
    assert_eq!(driver.get(STATUS, usize::from(queue.size)), vec![0; usize::from(queue.size)]);
}

#[test]
fn the_status_is_written_whatever_the_chain_is_like() {
    let disk = Notes::new(4096);
    let block = Block::new(disk.clone(), BlockConfig::default()).unwrap();
    let metrics = Arc::clone(block.metrics());
    let mut driver = Driver::attach(block);
    let mut queue = driver.up().remove(0);
    header(&driver, IN, 0);
    let outside = 1 << 40;
    for (chain, status) in [
        (vec![Piece::Read(HEADER, 16), Piece::Write(outside, 512), Piece::Write(STATUS, 1)], 1),
        (vec![Piece::Read(outside, 16), Piece::Write(STATUS, 1)], 1),
        (vec![Piece::Read(HEADER, 15), Piece::Write(STATUS, 1)], 1),
        (vec![Piece::Write(STATUS, 1)], 1),
        (vec![Piece::Read(HEADER, 16)], 0xee),
        (vec![Piece::Write(DATA, 512), Piece::Read(HEADER, 16), Piece::Write(STATUS, 1)], 0xee),
    ] {
        driver.put(STATUS, &[0xee]);
        let faults = metrics.guest_faults.value();
        assert!(driver.run(&mut queue, &chain) <= 1);
        assert_eq!(driver.get(STATUS, 1)[0], status, "{chain:?}");
        assert_eq!(metrics.guest_faults.value(), faults + 1, "{chain:?}");
    }
    assert_eq!(disk.take_calls(), Vec::<String>::new());
    assert_eq!(request(&driver, &mut queue, IN, 0, &[Piece::Write(DATA, 512)]), (0, 513));
}

#[test]
fn what_holds_no_sectors_is_no_disk() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    let others = [("/dev/null".as_ref(), "a character device"), (&*fifo, "a FIFO"), (directory.path(), "a directory")];
    for (path, what) in others {
        for read_only in [true, false] {
            let error = RawFile::open(path, read_only).unwrap_err().to_string();
            let words = format!("disk {} is {what}; give a regular file or a block device", path.display());
            assert_eq!(error, words);
        }
    }
    let null = std::fs::File::open("/dev/null").unwrap();
    assert!(RawFile::new(null).unwrap_err().to_string().contains("a character device"));
}

#[test]
fn a_disk_is_replaced_while_it_works_and_its_driver_told() {
    let (old, new) = (Notes::new(8 * 512), Notes::new(16 * 512));
    let block = Block::new(old.clone(), BlockConfig::default()).unwrap();
    let control = block.control();
    let mut driver = Driver::attach(block);
    let config_vector = Arc::clone(&driver.machine.host.vectors.lock().unwrap()[0]);
    let mut queues = driver.up();
    let write = [Piece::Read(HEADER, 16), Piece::Read(DATA, 512), Piece::Write(STATUS, 1)];
    driver.put(HEADER, &[1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    driver.run(&mut queues[0], &write);
    assert_eq!((old.take_calls(), driver.get(STATUS, 1)), (vec!["write 1536 512".to_owned()], vec![0]));
    let generation = driver.machine.read::<1>(driver.common(21));
    config_vector.take();
    control.replace(new.clone().into());
    assert!(config_vector.wait(Instant::now() + Duration::from_secs(20)), "the driver is not told");
    assert_eq!(old.take_calls(), ["flush"], "what was written to the old one is durable");
    assert_ne!(driver.machine.read::<1>(driver.common(21)), generation);
    assert_eq!(driver.machine.read::<8>(driver.device_config(0)), [16, 0, 0, 0, 0, 0, 0, 0]);
    driver.put(HEADER, &[1, 0, 0, 0, 0, 0, 0, 0, 15, 0, 0, 0, 0, 0, 0, 0]);
    driver.run(&mut queues[0], &write);
    assert_eq!((new.take_calls(), driver.get(STATUS, 1)), (vec!["write 7680 512".to_owned()], vec![0]));
    // At rest, too.
    driver.set_status(0);
    control.replace(Notes::new(512).into());
    assert_eq!(driver.machine.read::<8>(driver.device_config(0)), [1, 0, 0, 0, 0, 0, 0, 0]);
    control.replace(Notes::new(300 * 16 * 63 * 512).into());
    assert_eq!(driver.machine.read::<4>(driver.device_config(16)), [44, 1, 16, 63]);
}
