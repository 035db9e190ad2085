use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::super::limiter::BucketConfig;
use super::*;
use crate::testing::{Driver, DriverQueue, Machine, Piece};

const AT: u64 = Driver::BUFFERS;
const CONFIG: PmemConfig =
    PmemConfig { address: 5 << 30, len: 4 << 20, flush_cost: 3 << 20, limits: LimiterConfig::NONE };
const FAILED: u32 = u32::MAX;

/// A request of this type; the answer.
fn ask(driver: &Driver, queue: &mut DriverQueue, kind: u32) -> u32 {
    driver.put(AT, &kind.to_le_bytes());
    driver.put(AT + 16, &[0xee; 4]);
    assert_eq!(driver.run(queue, &[Piece::Read(AT, 4), Piece::Write(AT + 16, 4)]), 4);
    let answer = driver.get(AT + 16, 4);
    u32::from_le_bytes([answer[0], answer[1], answer[2], answer[3]])
}

fn counts(metrics: &PmemMetrics) -> [u64; 3] {
    [&metrics.flushes, &metrics.failures, &metrics.throttled].map(Counter::value)
}

#[test]
fn the_device_says_where_the_memory_is_and_flushes_it() {
    let device = Pmem::new(CONFIG, Some(tempfile::tempfile().unwrap())).unwrap();
    let (metrics, device_metrics) = (Arc::clone(device.pmem_metrics()), Arc::clone(device.metrics()));
    let mut driver = Driver::attach(device);
    let register = |driver: &Driver, at| u64::from_le_bytes(driver.machine.read(driver.device_config(at)));
    assert_eq!((register(&driver, 0), register(&driver, 8), register(&driver, 16)), (CONFIG.address, CONFIG.len, 0));
    let mut queue = driver.up().remove(0);
    assert_eq!(ask(&driver, &mut queue, 0), 0);
    let mut queue = driver.up().remove(0);
    assert_eq!(ask(&driver, &mut queue, 0), 0, "after a reset");
    assert_eq!(counts(&metrics), [2, 0, 0]);
    assert_eq!(device_metrics.guest_faults.value() + device_metrics.host_faults.value(), 0);
}

#[test]
fn a_flush_that_fails_is_answered_so() {
    // There is nothing that could be made durable.
    let null = File::options().write(true).open("/dev/null").unwrap();
    let device = Pmem::new(CONFIG, Some(null)).unwrap();
    let (metrics, device_metrics) = (Arc::clone(device.pmem_metrics()), Arc::clone(device.metrics()));
    let mut driver = Driver::attach(device);
    let mut queue = driver.up().remove(0);
    assert_eq!(ask(&driver, &mut queue, 0), FAILED);
    assert_eq!(counts(&metrics), [0, 1, 0]);
    assert!(device_metrics.first_host_fault().is_some_and(|what| what.contains("durable")));
}

#[test]
fn what_the_guest_cannot_write_needs_no_flush_and_its_writes_are_counted() {
    let device = Pmem::new(CONFIG, None).unwrap();
    let (metrics, writes) = (Arc::clone(device.pmem_metrics()), device.write_counter());
    let mut driver = Driver::attach(device);
    let mut queue = driver.up().remove(0);
    assert_eq!(ask(&driver, &mut queue, 0), 0);
    let mut writes = writes.lock().unwrap();
    writes.write(CONFIG.len - 8, &[1; 8]);
    let mut data = [0; 4];
    writes.read(0, &mut data);
    assert_eq!((metrics.refused_writes.value(), data), (1, [0xff; 4]));
}

#[test]
fn bad_requests_are_refused_and_the_file_stays_as_it_is() {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(b"content", 0).unwrap();
    let device = Pmem::new(CONFIG, Some(file.try_clone().unwrap())).unwrap();
    let (metrics, device_metrics) = (Arc::clone(device.pmem_metrics()), Arc::clone(device.metrics()));
    let mut driver = Driver::attach(device);
    let mut queue = driver.up().remove(0);
    for kind in [1, 7, u32::MAX] {
        assert_eq!(ask(&driver, &mut queue, kind), FAILED, "{kind}");
    }
    driver.put(AT, &[0; 4]);
    let chains = [
        vec![Piece::Read(AT, 3), Piece::Write(AT + 16, 4)],
        vec![Piece::Read(AT, 4), Piece::Write(AT + 16, 3)],
        vec![Piece::Read(AT, 4)],
        vec![Piece::Write(AT, 4)],
        // Outside of RAM, and in the memory itself, which no device reaches.
        vec![Piece::Read(Machine::RAM as u64, 4), Piece::Write(AT, 4)],
        vec![Piece::Read(AT, 4), Piece::Write(CONFIG.address, 4)],
        vec![Piece::Read(CONFIG.address, 4), Piece::Write(AT, 4)],
    ];
    for chain in &chains {
        assert_eq!(driver.run(&mut queue, chain), 0);
    }
    assert_eq!((device_metrics.guest_faults.value(), counts(&metrics)), (10, [0; 3]));
    // In pieces, and with more room than is needed, a request is as good as any.
    let pieces = [Piece::Read(AT, 1), Piece::Read(AT + 1, 9), Piece::Write(AT + 16, 2), Piece::Write(AT + 32, 8)];
    assert_eq!(driver.run(&mut queue, &pieces), 4);
    assert_eq!((counts(&metrics), file.metadata().unwrap().len()), ([1, 0, 0], 7));
}

#[test]
fn flushes_wait_for_their_limit_which_can_be_changed() {
    let bucket = |size| BucketConfig { size, one_time_burst: 0, refill_time: Duration::from_millis(200) };
    let limits = LimiterConfig { bandwidth: Some(bucket(3 << 20)), operations: None };
    let device = Pmem::new(PmemConfig { limits, ..CONFIG }, None).unwrap();
    let (metrics, control) = (Arc::clone(device.pmem_metrics()), device.control());
    let mut driver = Driver::attach(device);
    let mut queue = driver.up().remove(0);
    let start = Instant::now();
    (0..3).for_each(|_| assert_eq!(ask(&driver, &mut queue, 0), 0));
    assert!(start.elapsed() > Duration::from_millis(150), "two of three flushes have to be earned");
    assert_eq!(metrics.flushes.value(), 3);
    assert!(metrics.throttled.value() > 0);
    // An hour for each flush, until there is no limit again.
    let hour = BucketConfig { size: 1, one_time_burst: 0, refill_time: Duration::from_secs(3600) };
    control.limit(LimiterUpdate { bandwidth: None, operations: Some(hour) });
    control.limit(LimiterUpdate { bandwidth: Some(bucket(0)), operations: None });
    assert_eq!(ask(&driver, &mut queue, 0), 0);
    control.limit(LimiterUpdate { bandwidth: None, operations: Some(bucket(0)) });
    assert_eq!(ask(&driver, &mut queue, 0), 0);
}
