//! Requests through io_uring, several queues, and changes while the device works.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::super::limiter::BucketConfig;
use super::tests::{DATA, FLUSH, HEADER, IN, OUT, STATUS, WRITE_ZEROES, header, request};
use super::*;
use crate::testing::{Driver, DriverQueue, Piece};

/// A file with its own offset in each sector.
fn numbered(sectors: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    for sector in 0..sectors {
        file.write_all_at(&[sector as u8; SECTOR as usize], sector * SECTOR).unwrap();
    }
    file
}

/// A medium that goes through io_uring, or `None` where the host has none.
fn medium(file: &File) -> Option<Medium<RawFile>> {
    let backend = RawFile::new(file.try_clone().unwrap()).unwrap();
    match backend.ring() {
        Ok(ring) => Some(Medium { backend, ring: Some(ring) }),
        Err(error) => {
            println!("skipped: no io_uring here: {error}");
            None
        }
    }
}

fn capacity(driver: &Driver) -> u64 {
    u64::from_le_bytes(driver.machine.read(driver.device_config(0)))
}

/// A request with a buffer, a header and a status of its own.
fn add(driver: &Driver, queue: &mut DriverQueue, slot: u64, kind: u32, sector: u64, len: u32) {
    let base = DATA + slot * 0x1000;
    driver.put(base, &kind.to_le_bytes());
    driver.put(base + 8, &sector.to_le_bytes());
    driver.put(base + 16, &[0xee]);
    let data = if kind == IN { Piece::Write(base + 0x200, len) } else { Piece::Read(base + 0x200, len) };
    let table = base + 0x100;
    queue.add_indirect(table, &[Piece::Read(base, 16), data, Piece::Write(base + 16, 1)]);
}

#[test]
fn requests_of_all_queues_go_through_one_ring() {
    let file = numbered(256);
    let Some(medium) = medium(&file) else { return };
    let device = Block::over(medium, BlockConfig { queues: 3, ..Default::default() }).unwrap();
    let (metrics, counts) = (Arc::clone(device.metrics()), Arc::clone(device.block_metrics()));
    let mut driver = Driver::attach(device);
    let mut queues = driver.up();
    assert_eq!((queues.len(), driver.machine.read(driver.device_config(34))), (3, [3, 0]));
    // More than the ring has room for, and all at once.
    let each = 200;
    for (number, queue) in (0..).zip(&mut queues) {
        for at in 0..each {
            add(&driver, queue, number * each + at, IN, (number * 80 + at) % 256, 512);
        }
    }
    queues.iter().for_each(|queue| driver.kick(queue));
    for (number, queue) in (0..).zip(&mut queues) {
        (0..each).for_each(|_| assert_eq!(queue.wait().1, 513));
        for at in 0..each {
            let base = DATA + (number * each + at) * 0x1000;
            assert_eq!(driver.get(base + 16, 1), [0]);
            assert_eq!(driver.get(base + 0x200, 512), [((number * 80 + at) % 256) as u8; 512]);
        }
    }
    assert_eq!((counts.reads.value(), counts.read_bytes.value()), (600, 600 * 512));
    assert_eq!((metrics.guest_faults.value(), metrics.first_host_fault()), (0, None));
}

#[test]
fn writes_and_flushes_reach_the_file_in_pieces_of_any_shape() {
    let file = numbered(64);
    let Some(medium) = medium(&file) else { return };
    let device = Block::over(medium, BlockConfig::default()).unwrap();
    let counts = Arc::clone(device.block_metrics());
    let mut driver = Driver::attach(device);
    for (features, flushes) in [(0, 1), (1 << VIRTIO_BLK_F_FLUSH, 2)] {
        let mut queue = driver.prepare_all(features).remove(0);
        driver.start();
        header(&driver, OUT, 5);
        driver.put(DATA, &[0xaa; 1024]);
        let pieces = [(HEADER, 3), (HEADER + 3, 13), (DATA, 1), (DATA + 1, 500), (DATA + 501, 523)];
        let mut chain: Vec<_> = pieces.map(|(address, len)| Piece::Read(address, len)).to_vec();
        chain.push(Piece::Write(STATUS, 1));
        assert_eq!((driver.run(&mut queue, &chain), driver.get(STATUS, 1)), (1, vec![0]));
        if features == 0 {
            assert_eq!(request(&driver, &mut queue, FLUSH, 0, &[]), (0, 1));
        }
        // A driver that cannot flush has every write flushed.
        assert_eq!(counts.flushes.value(), flushes);
        // The last data and the status in one buffer, the header in the same as nothing else.
        header(&driver, IN, 5);
        assert_eq!(driver.run(&mut queue, &[Piece::Read(HEADER, 16), Piece::Write(DATA + 0x2000, 1025)]), 1025);
        assert_eq!(driver.get(DATA + 0x2000, 1025), [&[0xaa; 1024][..], &[0]].concat());
    }
    let mut bytes = [0; 1025];
    file.read_exact_at(&mut bytes, 5 * SECTOR).unwrap();
    assert_eq!((&bytes[..1024], bytes[1024]), (&[0xaa; 1024][..], 7));
}

#[test]
fn a_file_that_shrinks_fails_reads_and_nothing_else() {
    let file = numbered(64);
    for ring in [true, false] {
        file.set_len(64 * SECTOR).unwrap();
        let medium = if ring { medium(&file) } else { Some(RawFile::new(file.try_clone().unwrap()).unwrap().into()) };
        let Some(medium) = medium else { continue };
        let device = Block::over(medium, BlockConfig::default()).unwrap();
        let (metrics, counts) = (Arc::clone(device.metrics()), Arc::clone(device.block_metrics()));
        let mut driver = Driver::attach(device);
        let mut queue = driver.up().remove(0);
        file.set_len(8 * SECTOR + 100).unwrap();
        assert_eq!(request(&driver, &mut queue, IN, 8, &[Piece::Write(DATA, 512)]), (1, 0));
        assert_eq!(request(&driver, &mut queue, IN, 63, &[Piece::Write(DATA, 512)]), (1, 0));
        assert_eq!(request(&driver, &mut queue, IN, 7, &[Piece::Write(DATA, 512)]), (0, 513));
        assert_eq!((counts.failures.value(), metrics.host_faults.value()), (2, 2));
        assert!(metrics.first_host_fault().unwrap().starts_with("cannot read a disk"));
    }
}

#[test]
fn the_host_s_errors_are_the_guest_s() {
    // A seal is what a full or failing disk is: the file is open for writing, and writes fail.
    let flags = rustix::fs::MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("disk", flags).unwrap());
    file.set_len(64 * SECTOR).unwrap();
    let Some(medium) = medium(&file) else { return };
    rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::WRITE).unwrap();
    let device = Block::over(medium, BlockConfig::default()).unwrap();
    let metrics = Arc::clone(device.metrics());
    let mut driver = Driver::attach(device);
    let mut queue = driver.up().remove(0);
    assert_eq!(request(&driver, &mut queue, OUT, 0, &[Piece::Read(DATA, 512)]), (1, 1));
    driver.put(DATA, &[0u64.to_le_bytes(), 8u64.to_le_bytes()].concat());
    assert_eq!(request(&driver, &mut queue, WRITE_ZEROES, 0, &[Piece::Read(DATA, 16)]).0, 1);
    assert_eq!(request(&driver, &mut queue, IN, 0, &[Piece::Write(DATA, 512)]), (0, 513));
    assert_eq!((metrics.guest_faults.value(), metrics.host_faults.value()), (0, 2));
}

#[test]
fn a_disk_grows_and_is_exchanged_while_it_works() {
    let (small, large) = (numbered(8), numbered(64));
    for first in [true, false] {
        let without = |file: &File| Medium::from(RawFile::new(file.try_clone().unwrap()).unwrap());
        let (Some(a), Some(b)) = (medium(&small), medium(&large)) else { return };
        let (a, b) = if first { (without(&small), b) } else { (a, without(&large)) };
        let device = Block::over(a, BlockConfig::default()).unwrap();
        let control = device.control();
        let mut driver = Driver::attach(device);
        let config_vector = Arc::clone(&driver.machine.host.vectors.lock().unwrap()[0]);
        let mut queue = driver.up().remove(0);
        assert_eq!((capacity(&driver), request(&driver, &mut queue, IN, 8, &[Piece::Write(DATA, 512)]).0), (8, 1));
        config_vector.take();
        let generation = driver.machine.read::<1>(driver.common(21));
        control.replace(b);
        assert!(config_vector.wait(Instant::now() + Duration::from_secs(20)), "the driver is not told");
        assert_eq!(capacity(&driver), 64);
        assert_ne!(driver.machine.read::<1>(driver.common(21)), generation);
        assert_eq!(request(&driver, &mut queue, IN, 63, &[Piece::Write(DATA, 512)]), (0, 513));
        assert_eq!(driver.get(DATA, 512), [63; 512]);
        // While no driver is there: the next one finds it.
        driver.set_status(0);
        control.replace(without(&small));
        assert_eq!(capacity(&driver), 8);
        let mut queue = driver.up().remove(0);
        assert_eq!(request(&driver, &mut queue, IN, 8, &[Piece::Write(DATA, 512)]).0, 1);
    }
}

#[test]
fn limits_delay_requests_and_can_be_lifted() {
    let once = |size, millis| BucketConfig { size, one_time_burst: 0, refill_time: Duration::from_millis(millis) };
    let limits = LimiterConfig { operations: Some(once(4, 200)), ..Default::default() };
    let file = numbered(64);
    let backend = RawFile::new(file).unwrap();
    let device = Block::new(backend, BlockConfig { queues: 2, limits, ..Default::default() }).unwrap();
    let (counts, control) = (Arc::clone(device.block_metrics()), device.control());
    let mut driver = Driver::attach(device);
    let mut queues = driver.up();
    let start = Instant::now();
    for queue in &mut queues {
        (0..4).for_each(|at| add(&driver, queue, u64::from(queue.index) * 8 + at, IN, at, 512));
        driver.kick(queue);
    }
    queues.iter_mut().for_each(|queue| (0..4).for_each(|_| assert_eq!(queue.wait().1, 513)));
    assert!(start.elapsed() >= Duration::from_millis(190), "eight requests, of which four have to wait 50 ms each");
    assert!(counts.throttled.value() > 0);
    // A request waits an hour; then there is no limit any more.
    control.limit(LimiterUpdate { operations: Some(once(1, 3_600_000)), ..Default::default() });
    (0..2).for_each(|at| add(&driver, &mut queues[1], at, IN, at, 512));
    // The order may overtake the requests or not; either way one of three has to wait for the next order.
    add(&driver, &mut queues[1], 2, IN, 2, 512);
    driver.kick(&queues[1]);
    control.limit(LimiterUpdate { operations: Some(once(0, 0)), ..Default::default() });
    (0..3).for_each(|_| assert_eq!(queues[1].wait().1, 513));
    // A reset is not held up by a limit.
    control.limit(LimiterUpdate { operations: Some(once(1, 3_600_000)), ..Default::default() });
    (0..3).for_each(|at| add(&driver, &mut queues[0], at, IN, at, 512));
    driver.kick(&queues[0]);
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
}
