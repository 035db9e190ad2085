use std::time::Instant;

use super::*;
use crate::testing::{Driver, DriverQueue, FakeVector, Piece};

const AT: u64 = Driver::BUFFERS;
const ALL: BalloonConfig = BalloonConfig {
    target: 7,
    deflate_on_oom: true,
    stats_interval: Duration::from_secs(3600),
    hinting: true,
    reporting: true,
};
const TIMEOUT: Duration = Duration::from_secs(20);

fn word(driver: &Driver, offset: u64) -> u32 {
    u32::from_le_bytes(driver.machine.read(driver.device_config(offset)))
}

fn config_vector(driver: &Driver) -> Arc<FakeVector> {
    let vector = Arc::clone(&driver.machine.host.vectors.lock().unwrap()[0]);
    vector.take();
    vector
}

fn told(vector: &FakeVector) {
    assert!(vector.wait(Instant::now() + TIMEOUT), "the driver is not told");
}

fn eventually(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < TIMEOUT, "{what} does not come about");
        std::thread::yield_now();
    }
}

/// Offers page numbers.
fn inflate(driver: &Driver, queue: &mut DriverQueue, pages: &[u32]) {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    driver.put(AT, &bytes);
    assert_eq!(driver.run(queue, &[Piece::Read(AT, bytes.len() as u32)]), 0);
}

/// Whether a page of the buffers' part of memory has something in it.
fn is_full(driver: &Driver, page: u64) -> bool {
    driver.get(page * PAGE, PAGE as usize).iter().any(|byte| *byte != 0)
}

#[test]
fn what_is_inflated_is_given_back_and_nothing_else() {
    let device = Balloon::new(BalloonConfig { target: 7, ..Default::default() }).unwrap();
    let (counts, metrics, control) =
        (Arc::clone(device.balloon_metrics()), Arc::clone(device.metrics()), device.control());
    let mut driver = Driver::attach(device);
    assert_eq!((driver.offered() & 0x3f, word(&driver, 0), word(&driver, 4)), (0, 7, 0));
    let mut queues = driver.up();
    let first = AT / PAGE + 16;
    (first..first + 8).for_each(|page| driver.put(page * PAGE, &[0x5a; PAGE as usize]));
    let page = |n: u64| (first + n) as u32;
    // In any order, one twice, some nowhere.
    inflate(&driver, &mut queues[0], &[page(5), page(1), page(2), page(1), u32::MAX, 0x4000_0000]);
    assert_eq!(
        (0..8).map(|n| is_full(&driver, first + n)).collect::<Vec<_>>(),
        [true, false, false, true, true, false, true, true]
    );
    assert_eq!((counts.inflated.value(), counts.released_bytes.value()), (6, 3 * PAGE));
    assert_eq!((metrics.guest_faults.value(), metrics.host_faults.value()), (2, 0));
    driver.machine.write(driver.device_config(4), &3u32.to_le_bytes());
    assert_eq!((control.actual(), word(&driver, 4)), (3, 3));
    inflate(&driver, &mut queues[1], &[page(1)]);
    assert_eq!(counts.deflated.value(), 1);
    // Not a list of numbers, and longer than any list.
    assert_eq!(driver.run(&mut queues[0], &[Piece::Read(AT, 7)]), 0);
    assert_eq!(driver.run(&mut queues[0], &[Piece::Write(AT, 8)]), 0);
    driver.put(AT, &vec![0xff; 1 << 20]);
    assert_eq!(driver.run(&mut queues[0], &[Piece::Read(AT, 1 << 20)]), 0);
    assert_eq!((counts.inflated.value(), metrics.host_faults.value()), (6 + 1 + 4096, 0));
}

#[test]
fn the_driver_is_told_of_a_new_size() {
    let device = Balloon::new(ALL).unwrap();
    let control = device.control();
    let mut driver = Driver::attach(device);
    driver.up();
    let vector = config_vector(&driver);
    control.set_target(1000);
    told(&vector);
    assert_eq!((word(&driver, 0), control.target()), (1000, 1000));
    driver.machine.write(driver.device_config(4), &1000u32.to_le_bytes());
    driver.set_status(0);
    assert_eq!((control.target(), control.actual()), (1000, 0), "the next driver begins with an empty one");
}

#[test]
fn reported_pages_are_given_back_whichever_way_queues_are_numbered() {
    for (config, at) in [
        (BalloonConfig { reporting: true, ..Default::default() }, 2),
        (BalloonConfig { reporting: true, ..Default::default() }, 4),
        (BalloonConfig { hinting: false, ..ALL }, 3),
        (ALL, 4),
    ] {
        let device = Balloon::new(config).unwrap();
        let counts = Arc::clone(device.balloon_metrics());
        let mut driver = Driver::attach(device);
        let skipped: Vec<u16> = match at {
            2 => vec![3, 4],
            4 if !config.hinting => vec![2, 3],
            3 => vec![4],
            _ => vec![],
        };
        let mut queues = driver.prepare_without(0, &skipped);
        driver.start();
        let queue = queues.iter_mut().find(|queue| queue.index == at).unwrap();
        let first = AT / PAGE + 16;
        (first..first + 8).for_each(|page| driver.put(page * PAGE, &[0x5a; PAGE as usize]));
        let pieces = [Piece::Write(first * PAGE, 8192), Piece::Write((first + 4) * PAGE + 1, 8192)];
        assert_eq!(driver.run(queue, &pieces), 0);
        assert_eq!(
            (0..8).map(|n| is_full(&driver, first + n)).collect::<Vec<_>>(),
            [false, false, true, true, true, false, true, true]
        );
        assert_eq!((counts.reported_bytes.value(), counts.released_bytes.value()), (3 * PAGE, 3 * PAGE));
    }
}

#[test]
fn statistics_come_at_once_and_when_they_are_asked_for() {
    let device = Balloon::new(ALL).unwrap();
    let (counts, metrics, control) =
        (Arc::clone(device.balloon_metrics()), Arc::clone(device.metrics()), device.control());
    let mut driver = Driver::attach(device);
    let mut queue = driver.up().remove(2);
    assert_eq!(control.stats(), [None; STAT_COUNT]);
    let report = |driver: &Driver, queue: &mut DriverQueue, entries: &[(u16, u64)]| {
        let bytes: Vec<u8> =
            entries.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect();
        driver.put(AT, &bytes);
        queue.add(&[Piece::Read(AT, bytes.len() as u32)]);
        driver.kick(queue);
    };
    let updates = |wanted: u64| eventually("an update", || counts.stats_updates.value() == wanted);
    report(&driver, &mut queue, &[(4, 1 << 30), (5, 2 << 30), (99, 1)]);
    updates(1);
    assert_eq!((control.stats()[4], control.stats()[5], control.stats()[0]), (Some(1 << 30), Some(2 << 30), None));
    // The first expiry, at the start, may have come before or after the report.
    control.set_stats_interval(1800);
    assert_eq!((queue.wait(), control.stats_interval()), ((0, 0), 1800));
    report(&driver, &mut queue, &[(4, 5)]);
    updates(2);
    assert_eq!(control.stats()[4], Some(5));
    // A driver that sends several gets all but the last back, and one that sends nonsense is counted.
    for _ in 0..3 {
        queue.add(&[Piece::Read(AT, 9)]);
    }
    driver.kick(&queue);
    (0..3).for_each(|_| assert_eq!(queue.wait().1, 0));
    updates(5);
    assert_eq!(metrics.guest_faults.value(), 3);
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn a_run_of_hinting_takes_the_pages_of_its_own_number_only() {
    let device = Balloon::new(ALL).unwrap();
    let (counts, control) = (Arc::clone(device.balloon_metrics()), device.control());
    let mut driver = Driver::attach(device);
    let mut queue = driver.up().remove(3);
    let vector = config_vector(&driver);
    let page = (AT / PAGE + 16) * PAGE;
    let say = |queue: &mut DriverQueue, driver: &Driver, command: u32| {
        driver.put(AT, &command.to_le_bytes());
        assert_eq!(driver.run(queue, &[Piece::Read(AT, 4)]), 0);
    };
    let hint = |queue: &mut DriverQueue, driver: &Driver| {
        driver.put(page, &[1; PAGE as usize]);
        assert_eq!(driver.run(queue, &[Piece::Write(page, PAGE as u32)]), 0);
        is_full(driver, page / PAGE)
    };
    assert!(hint(&mut queue, &driver), "nobody has asked");
    control.start_hinting(true);
    told(&vector);
    let run = word(&driver, 8);
    assert_eq!((run, control.hinting_commands()), (2, (2, 0)));
    assert!(hint(&mut queue, &driver), "the driver has not said for which run");
    say(&mut queue, &driver, run + 1);
    assert!(hint(&mut queue, &driver), "a run that there is not");
    say(&mut queue, &driver, run);
    assert!(!hint(&mut queue, &driver));
    assert_eq!(counts.hinted_bytes.value(), PAGE);
    say(&mut queue, &driver, 0);
    told(&vector);
    assert_eq!((word(&driver, 8), control.hinting_commands()), (1, (1, 0)), "its end is acknowledged");
    control.start_hinting(false);
    told(&vector);
    assert_eq!(word(&driver, 8), 3);
    say(&mut queue, &driver, 3);
    say(&mut queue, &driver, 0);
    assert_eq!(control.hinting_commands(), (3, 0), "its end is not");
    control.stop_hinting();
    told(&vector);
    assert_eq!(control.hinting_commands(), (1, 0));
}
