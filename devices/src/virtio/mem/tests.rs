use std::time::{Duration, Instant};

use super::*;
use crate::testing::{Driver, DriverQueue, Machine, Piece};

const AT: u64 = Driver::BUFFERS;
/// The second half of the test machine's RAM plays the region.
const REGION: MemConfig = MemConfig { address: Machine::RAM as u64 / 2, len: 4 << 20, block: 1 << 20 };
const MIB: u64 = 1 << 20;
/// `type` and `state` of answers.
const ACK: (u16, u16) = (0, 0);
const NACK: (u16, u16) = (1, 0);
const ERROR: (u16, u16) = (3, 0);

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// Asks for `count` blocks from `block` on; type and state of the answer.
fn ask(driver: &Driver, queue: &mut DriverQueue, kind: u16, block: u64, count: u16) -> (u16, u16) {
    driver.put(AT, &[0; 24]);
    driver.put(AT, &kind.to_le_bytes());
    driver.put(AT + 8, &(REGION.address.wrapping_add(block.wrapping_mul(MIB))).to_le_bytes());
    driver.put(AT + 16, &count.to_le_bytes());
    driver.put(AT + 32, &[0xee; 10]);
    assert_eq!(driver.run(queue, &[Piece::Read(AT, 24), Piece::Write(AT + 32, 10)]), 10);
    let answer = driver.get(AT + 32, 10);
    (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]]))
}

fn register(driver: &Driver, offset: u64) -> u64 {
    u64::from_le_bytes(driver.machine.read(driver.device_config(offset)))
}

#[test]
fn blocks_come_and_go_as_the_host_allows() {
    let device = Mem::new(REGION).unwrap();
    let (control, counts) = (device.control(), Arc::clone(device.mem_metrics()));
    let mut driver = Driver::attach(device);
    assert_eq!(
        [0, 16, 24, 32, 40, 48].map(|at| register(&driver, at)),
        [MIB, REGION.address, REGION.len, REGION.len, 0, 0]
    );
    let mut queue = driver.up().remove(0);
    let config_vector = Arc::clone(&driver.machine.host.vectors.lock().unwrap()[0]);
    config_vector.take();
    assert_eq!(ask(&driver, &mut queue, PLUG, 0, 1), NACK, "nothing was promised");
    control.request(3 * MIB + 5);
    assert!(config_vector.wait(Instant::now() + Duration::from_secs(20)), "the driver is not told");
    assert_eq!((register(&driver, 48), control.requested()), (3 * MIB, 3 * MIB));
    assert_eq!(ask(&driver, &mut queue, PLUG, 0, 4), NACK);
    assert_eq!(ask(&driver, &mut queue, PLUG, 1, 2), ACK);
    assert_eq!(ask(&driver, &mut queue, PLUG, 2, 1), ERROR, "it has that one");
    assert_eq!((register(&driver, 40), control.plugged()), (2 * MIB, 2 * MIB));
    for (block, count, state) in [(0, 1, 1), (1, 2, 0), (0, 2, 2), (3, 1, 1)] {
        assert_eq!(ask(&driver, &mut queue, STATE, block, count), (0, state), "{block} {count}");
    }
    // A reset leaves them where they are, and the contents, too.
    driver.put(REGION.address + MIB, &[7; 4096]);
    let mut queue = driver.up().remove(0);
    assert_eq!(driver.get(REGION.address + MIB, 4096), [7; 4096]);
    assert_eq!(ask(&driver, &mut queue, UNPLUG, 0, 2), ERROR, "one of them is not plugged");
    assert_eq!(ask(&driver, &mut queue, UNPLUG, 1, 1), ACK);
    assert_eq!(driver.get(REGION.address + MIB, 4096), [0; 4096], "what was unplugged is gone");
    assert_eq!(ask(&driver, &mut queue, UNPLUG_ALL, 0, 0), ACK);
    assert_eq!((control.plugged(), counts.plugged.value(), counts.unplugged.value()), (0, 2, 2));
    control.request(u64::MAX);
    assert_eq!(control.requested(), REGION.len);
}

#[test]
fn bad_requests_are_refused() {
    let device = Mem::new(REGION).unwrap();
    let (control, metrics) = (device.control(), Arc::clone(device.metrics()));
    let mut driver = Driver::attach(device);
    control.request(REGION.len);
    let mut queue = driver.up().remove(0);
    for kind in [PLUG, UNPLUG, STATE] {
        for (block, count) in [(0, 0), (0, 5), (4, 1), (3, 2), (u64::MAX, 1), (u64::MAX / MIB - 8, 9), (0, u16::MAX)] {
            assert_eq!(ask(&driver, &mut queue, kind, block, count), ERROR, "{kind} {block} {count}");
        }
    }
    assert_eq!(ask(&driver, &mut queue, 9, 0, 1), ERROR);
    let faults = metrics.guest_faults.value();
    for chain in [
        vec![Piece::Read(AT, 23), Piece::Write(AT + 32, 10)],
        vec![Piece::Read(AT, 24), Piece::Write(AT + 32, 9)],
        vec![Piece::Read(AT, 24)],
    ] {
        assert_eq!(driver.run(&mut queue, &chain), 0);
    }
    assert_eq!((metrics.guest_faults.value(), control.plugged()), (faults + 3, 0));
}
