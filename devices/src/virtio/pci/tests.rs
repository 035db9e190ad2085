use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::testing::{Driver, DriverQueue, INTX, Machine, Piece, RamDisk};
use crate::virtio::block::{Block, BlockConfig};

use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::virtio::{Active, Interrupt, Virtqueue};

const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
const AT: u64 = Driver::BUFFERS;

fn driver() -> (Driver, Arc<crate::metrics::DeviceMetrics>) {
    let block = Block::new(RamDisk::new(4096), BlockConfig::default()).unwrap();
    let metrics = Arc::clone(block.metrics());
    (Driver::attach(block), metrics)
}

/// A request that succeeds: a read of the first sector.
fn chain() -> [Piece; 2] {
    [Piece::Read(AT, 16), Piece::Write(AT + 0x1000, 513)]
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn word(driver: &Driver, register: u64) -> u16 {
    u16::from_le_bytes(driver.machine.read(driver.common(register)))
}

fn set_features(driver: &Driver, features: u64) {
    for half in 0..2u32 {
        driver.machine.write(driver.common(8), &half.to_le_bytes());
        driver.machine.write(driver.common(12), &((features >> (32 * half)) as u32).to_le_bytes());
    }
}

#[test]
fn features_are_agreed_on_once() {
    let (driver, metrics) = driver();
    let offered = driver.offered();
    driver.set_status(3);
    for refused in [0, offered & !VERSION_1, offered | 1 << 40, VERSION_1 | 1 << 1] {
        set_features(&driver, refused);
        driver.set_status(11);
        assert_eq!(driver.status(), 3, "{refused:#x}");
    }
    driver.set_status(15);
    assert_eq!(driver.status(), 3, "not ready without features");
    set_features(&driver, VERSION_1);
    driver.set_status(11);
    assert_eq!(driver.status(), 11);
    let faults = metrics.guest_faults.value();
    set_features(&driver, offered);
    assert_eq!(metrics.guest_faults.value(), faults + 2);
    assert_eq!(u32::from_le_bytes(driver.machine.read(driver.common(12))), 1, "no change afterwards");
    driver.set_status(3);
    assert_eq!(driver.status(), 11, "bits are never taken back");
    driver.set_status(0x8b);
    assert_eq!(driver.status(), 0x8b, "the driver has given up");
    driver.machine.write(driver.common(0), &7u32.to_le_bytes());
    assert_eq!(driver.machine.read::<4>(driver.common(4)), [0; 4], "there are 64 features");
}

#[test]
fn queue_registers_follow_the_rules() {
    let (mut driver, metrics) = driver();
    let set =
        |driver: &Driver, register, value: u16| driver.machine.write(driver.common(register), &value.to_le_bytes());
    set(&driver, 24, 64);
    assert_eq!(word(&driver, 24), 1024, "not before the features");
    driver.prepare(VERSION_1);
    driver.set_status(0);
    driver.set_status(3);
    set_features(&driver, VERSION_1);
    driver.set_status(11);
    for bad in [0, 3, 2048, 0xffff] {
        set(&driver, 24, bad);
        assert_eq!(word(&driver, 24), 1024);
    }
    set(&driver, 24, 64);
    assert_eq!(word(&driver, 24), 64);
    set(&driver, 26, 1);
    assert_eq!(word(&driver, 26), 1);
    set(&driver, 26, 2);
    assert_eq!(word(&driver, 26), 0xffff, "there are two vectors");
    driver.machine.write(driver.common(32), &0x1234_5678_9abc_def0u64.to_le_bytes());
    driver.machine.write(driver.common(44), &7u32.to_le_bytes());
    assert_eq!(u64::from_le_bytes(driver.machine.read(driver.common(32))), 0x1234_5678_9abc_def0);
    assert_eq!(u64::from_le_bytes(driver.machine.read(driver.common(40))), 7 << 32);
    set(&driver, 28, 0);
    assert_eq!(word(&driver, 28), 0);
    set(&driver, 28, 1);
    let faults = metrics.guest_faults.value();
    driver.machine.write(driver.common(32), &[0; 8]);
    set(&driver, 24, 32);
    assert_eq!((word(&driver, 24), metrics.guest_faults.value()), (64, faults + 2), "it is enabled now");
    // Widths and places that no register has.
    for (register, len) in [(20, 2), (0, 1), (2, 4), (18, 2), (56, 2), (60, 4), (26, 4), (34, 4)] {
        let faults = metrics.guest_faults.value();
        driver.machine.write(driver.common(register), &[0xff; 8][..len]);
        assert_eq!(metrics.guest_faults.value(), faults + 1, "{register} {len}");
    }
    set(&driver, 22, 1);
    assert_eq!((word(&driver, 24), word(&driver, 28)), (0, 0), "there is no such queue");
    driver.set_status(0);
    set(&driver, 22, 0);
    assert_eq!((word(&driver, 24), word(&driver, 26), word(&driver, 28)), (1024, 0xffff, 0));
}

#[test]
fn notifications_follow_the_bar() {
    let (mut driver, metrics) = driver();
    let port = driver.notify_port(0);
    assert_eq!(driver.machine.host.doorbells(), [Doorbell::Port(port)]);
    let mut queue = driver.up().remove(0);
    let (machine, slot) = (&driver.machine, driver.slot);
    // Memory only: no ports.
    machine.write_config(slot, 4, 6);
    assert_eq!(machine.host.doorbells(), []);
    machine.write_config(slot, 4, 7);
    let moved = port + 0x2000;
    machine.write_config(slot, 0x18, moved.into());
    assert_eq!(machine.host.doorbells(), [Doorbell::Port(moved)]);
    assert!(!machine.ports.read(port.into(), &mut [0]));
    let head = queue.add(&chain());
    machine.write_port(moved, &[0, 0]);
    assert_eq!(queue.wait(), (u32::from(head), 513));
    // Without an ioeventfd the write arrives here, and does the same;
    let head = queue.add(&chain());
    assert!(machine.ports.write(moved.into(), &[0, 0]));
    assert_eq!(queue.wait(), (u32::from(head), 513));
    // and so it does where a driver without ports notifies.
    let head = queue.add(&chain());
    machine.write(driver.notify_address(0), &[0, 0]);
    assert_eq!(queue.wait(), (u32::from(head), 513));
    machine.write(driver.notify_address(1), &[1, 0]);
    assert_eq!((metrics.guest_faults.value(), metrics.host_faults.value()), (1, 0));
    assert_eq!(machine.read_config(slot, 0x18), u32::from(moved) | 1);
    machine.write_config(slot, 0x18, u32::MAX);
    assert_eq!(machine.read_config(slot, 0x18), !3 | 1, "four ports");
    assert_eq!(machine.host.doorbells(), [], "that is in no window");
    machine.root.shutdown();
    assert_eq!(machine.host.vectors.lock().unwrap()[1].route(), None);
}

#[test]
fn interrupts_come_when_the_driver_wants_them() {
    let (mut driver, metrics) = driver();
    // Without event indices: by the flag in the available ring.
    let mut queue = driver.prepare_all(EVENT_IDX).remove(0);
    driver.put(queue.avail, &1u16.to_le_bytes());
    queue.add(&chain());
    driver.start();
    settle(&queue, 1);
    driver.set_status(0);
    assert_eq!((queue.vector.take(), metrics.interrupts.value()), (0, 0));

    // With them: when the index that was asked for is passed, once for all that came together.
    let mut queue = driver.prepare_all(0).remove(0);
    let event = queue.avail + 4 + 2 * u64::from(queue.size);
    driver.put(event, &2u16.to_le_bytes());
    queue.add(&chain());
    queue.add(&chain());
    driver.start();
    settle(&queue, 2);
    for _ in 0..2 {
        queue.add(&chain());
    }
    driver.kick(&queue);
    settle(&queue, 4);
    driver.set_status(0);
    assert_eq!((queue.vector.take(), metrics.interrupts.value()), (1, 1));
}

/// Waits for used chains without an interrupt.
fn settle(queue: &DriverQueue, count: u16) {
    let deadline = deadline();
    while queue.used_index() != count {
        assert!(Instant::now() < deadline, "{} of {count} chains were used", queue.used_index());
        std::thread::yield_now();
    }
}

#[test]
fn a_masked_vector_is_delivered_when_it_is_unmasked() {
    let (mut driver, metrics) = driver();
    let mut queue = driver.up().remove(0);
    let control = driver.bar + 0x4000 + 16 + 12;
    driver.machine.write(control, &1u32.to_le_bytes());
    queue.add(&chain());
    driver.kick(&queue);
    let deadline = deadline();
    while driver.machine.read::<8>(driver.bar + 0x5000) != [2, 0, 0, 0, 0, 0, 0, 0] {
        assert!(Instant::now() < deadline, "the pending bit is not set");
        std::thread::yield_now();
    }
    assert_eq!(queue.vector.take(), 0);
    assert_eq!(driver.take_isr(), 1, "the ISR says that a queue was used");
    assert_eq!(driver.machine.read::<1>(driver.bar + 0x1000), [0], "once");
    driver.machine.write(control, &0u32.to_le_bytes());
    assert_eq!(queue.vector.take(), 1);
    assert_eq!(driver.machine.read::<1>(driver.bar + 0x5000), [0]);
    assert_eq!(queue.take().map(|(_, len)| len), Some(513));
    assert_eq!(metrics.interrupts.value(), 1);
}

#[test]
fn a_driver_without_messages_has_a_level_that_its_look_at_the_isr_ends() {
    let block = Block::new(RamDisk::new(4096), BlockConfig::default()).unwrap();
    let (metrics, disk) = (Arc::clone(block.metrics()), block.control());
    let mut driver = Driver::attach(block);
    driver.by_message = false;
    let (rises, is_high) = driver.machine.host.intx_of(driver.slot);
    let is_high = || is_high.load(Ordering::SeqCst);
    // What was used is seen before the interrupt.
    let rise = || {
        let deadline = deadline();
        while !is_high() {
            assert!(Instant::now() < deadline, "INTA# stays low");
            std::thread::yield_now();
        }
    };
    // A queue whose waits leave the ISR alone.
    let up = |driver: &mut Driver| {
        let mut queue = driver.up().remove(0);
        queue.isr = None;
        queue
    };
    // Of PCI's status register, the interrupt status.
    let asks = |driver: &Driver| driver.machine.read_config(driver.slot, 4) >> 16 & 1 << 3 != 0;
    let disable =
        |driver: &Driver, disabled: bool| driver.machine.write_config(driver.slot, 4, 7 | u32::from(disabled) << 10);
    assert_eq!(driver.machine.read_config(driver.slot, 0x3c) & 0xffff, 0x100 | u32::from(INTX), "INTA#");
    for _ in 0..2 {
        let mut queue = up(&mut driver);
        assert!(!is_high() && !asks(&driver));
        assert_eq!(driver.run(&mut queue, &chain()), 513);
        rise();
        assert!(asks(&driver), "until the driver has seen why");
        assert_eq!((driver.take_isr(), driver.take_isr()), (1, 0));
        assert!(!is_high() && !asks(&driver));
        // Another size is another reason.
        rises.take();
        disk.replace(RamDisk::new(8192).into());
        assert!(rises.wait(deadline()));
        // It may be kept off the pin, and comes when it may again.
        disable(&driver, true);
        assert!(!is_high() && asks(&driver));
        disable(&driver, false);
        assert!(is_high());
        assert_eq!(driver.take_isr(), 2);
    }
    // With a reason and without a look at it: messages, a reset, the end.
    let mut queue = up(&mut driver);
    driver.run(&mut queue, &chain());
    let by_message = |driver: &Driver, on: bool| {
        driver.machine.write_config(driver.slot, driver.msix, u32::from(on) << 31);
    };
    rise();
    by_message(&driver, true);
    assert!(!is_high() && !asks(&driver));
    by_message(&driver, false);
    assert!(!is_high(), "what was told by messages is told");
    for end in
        [(|driver: &Driver| driver.set_status(0)) as fn(&Driver), |driver| driver.machine.root.remove(driver.slot)]
    {
        let mut queue = up(&mut driver);
        driver.run(&mut queue, &chain());
        rise();
        end(&driver);
        assert!(!is_high());
    }
    assert_eq!((metrics.guest_faults.value(), metrics.host_faults.value()), (0, 0));
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    let (driver, metrics) = driver();
    let (machine, slot) = (&driver.machine, driver.slot);
    let mut at = u64::from(machine.read_config(slot, 0x34));
    while machine.read_config(slot, at) >> 24 != u32::from(TYPE_PCI) {
        at = u64::from(machine.read_config(slot, at) >> 8 & 0xff);
    }
    let look = |bar: u32, offset: u32, len: u32| {
        machine.write_config(slot, at + 4, bar);
        machine.write_config(slot, at + 8, offset);
        machine.write_config(slot, at + 12, len);
    };
    look(0, DEVICE as u32, 4);
    assert_eq!(machine.read_config(slot, at + 16), 8, "the capacity");
    look(0, 20, 1);
    machine.write(Machine::config(slot, at + 16), &[1]);
    assert_eq!(driver.status(), 1);
    assert_eq!(machine.read::<1>(Machine::config(slot, at + 16)), [1]);
    let faults = metrics.guest_faults.value();
    look(2, 4, 4);
    machine.write_config(slot, at + 16, 0);
    look(2, 0, 2);
    machine.write_config(slot, at + 16, 0);
    assert_eq!(metrics.guest_faults.value(), faults, "a notification of the only queue");
    for (bar, offset, len) in
        [(1, 20, 1), (2, 20, 1), (6, 20, 1), (0, 20, 3), (0, 21, 2), (0, BAR_LEN as u32, 4), (0, !3, 4), (0, 20, 0)]
    {
        look(bar, offset, len);
        machine.write_config(slot, at + 16, 0);
        assert_eq!(driver.status(), 1, "bar {bar} offset {offset:#x} length {len}");
    }
}

/// A device whose work somebody else does, who signals the driver's vector.
struct Elsewhere {
    metrics: Arc<crate::metrics::DeviceMetrics>,
    interrupt: Option<Arc<dyn Interrupt>>,
    signal: Arc<Mutex<Option<EventFd>>>,
}

impl Elsewhere {
    fn find(&self, queue: u16) {
        *self.signal.lock().unwrap() = self.interrupt.as_ref().and_then(|interrupt| interrupt.direct(queue).unwrap());
    }
}

impl VirtioDevice for Elsewhere {
    fn device_type(&self) -> u32 {
        4
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn activate(&mut self, active: Active) -> io::Result<()> {
        self.interrupt = Some(active.interrupt);
        self.find(0);
        Ok(())
    }
    fn stop(&mut self) -> Vec<Virtqueue> {
        self.interrupt = None;
        Vec::new()
    }
    fn vector_changed(&mut self, queue: u16) {
        self.find(queue);
    }
    fn metrics(&self) -> &Arc<crate::metrics::DeviceMetrics> {
        &self.metrics
    }
}

/// Its driver, and what it signals.
fn elsewhere() -> (Driver, Arc<Mutex<Option<EventFd>>>) {
    let signal = Arc::<Mutex<Option<EventFd>>>::default();
    let device = Elsewhere { metrics: Arc::default(), interrupt: None, signal: Arc::clone(&signal) };
    (Driver::attach(device), signal)
}

#[test]
fn what_others_signal_waits_while_its_vector_is_masked() {
    let (mut driver, signal) = elsewhere();
    let raise = || signal.lock().unwrap().as_ref().map(|event| event.write(1).unwrap());
    let vectors: Vec<_> = driver.machine.host.vectors.lock().unwrap().iter().map(Arc::clone).collect();
    let mask = |driver: &Driver, masked: u32| {
        driver.machine.write(driver.bar + TABLE + 16 + 12, &masked.to_le_bytes());
    };
    let pending = |driver: &Driver| driver.machine.read::<1>(driver.bar + PENDING);
    driver.up();
    raise().unwrap();
    assert!(vectors[1].route().is_some() && vectors[1].take() == 1);

    // The host would deliver what is routed, so that it may not be while it is masked.
    mask(&driver, 1);
    assert_eq!((vectors[1].route(), pending(&driver)), (None, [0]));
    raise().unwrap();
    assert_eq!((pending(&driver), pending(&driver)), ([2], [2]));
    mask(&driver, 0);
    assert!(vectors[1].route().is_some() && vectors[1].take() == 1);
    assert_eq!(pending(&driver), [0]);
    // Likewise where nobody has looked: the host finds it when it gets the route.
    mask(&driver, 1);
    raise().unwrap();
    mask(&driver, 0);
    assert!(vectors[1].route().is_some() && vectors[1].take() == 1);

    // Another vector, none, and a masked one from the start.
    let choose = |driver: &Driver, vector: u16| {
        driver.machine.write(driver.common(22), &0u16.to_le_bytes());
        driver.machine.write(driver.common(26), &vector.to_le_bytes());
    };
    choose(&driver, 0);
    raise().unwrap();
    assert_eq!((vectors[0].take(), vectors[1].take()), (1, 0));
    choose(&driver, 0xffff);
    assert!(raise().is_none());
    mask(&driver, 1);
    choose(&driver, 1);
    assert!(raise().is_some() && vectors[1].route().is_none());
    assert_eq!(pending(&driver), [2]);
    driver.set_status(0);
    choose(&driver, 1);
    assert!(raise().is_some(), "of a driver that is gone nothing is looked up any more");
}

#[test]
fn what_others_signal_is_a_reason_for_inta() {
    let (mut driver, signal) = elsewhere();
    driver.by_message = false;
    let (rises, is_high) = driver.machine.host.intx_of(driver.slot);
    let raise = || signal.lock().unwrap().as_ref().unwrap().write(1).unwrap();
    for _ in 0..2 {
        driver.up();
        for _ in 0..3 {
            raise();
            assert!(rises.wait(deadline()) && is_high.load(Ordering::SeqCst));
            assert_eq!((driver.take_isr(), is_high.load(Ordering::SeqCst)), (1, false));
        }
    }
    // A driver that turns to messages while the device works has them from then on.
    driver.machine.write_config(driver.slot, driver.msix, 1 << 31);
    driver.machine.write(driver.common(22), &0u16.to_le_bytes());
    driver.machine.write(driver.common(26), &1u16.to_le_bytes());
    driver.machine.write(driver.bar + TABLE + 16 + 12, &0u32.to_le_bytes());
    raise();
    let vector = Arc::clone(&driver.machine.host.vectors.lock().unwrap()[1]);
    assert!(vector.take() == 1 && !is_high.load(Ordering::SeqCst));
}

#[test]
fn a_reset_ends_inta_also_while_others_signal() {
    let (mut driver, signal) = elsewhere();
    driver.by_message = false;
    let is_high = driver.machine.host.intx_of(driver.slot).1;
    for _ in 0..300 {
        driver.up();
        let event = signal.lock().unwrap().take().unwrap();
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let other = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                event.write(1).unwrap();
            }
        });
        while !is_high.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        driver.set_status(0);
        let end = (is_high.load(Ordering::SeqCst), driver.take_isr());
        stop.store(true, Ordering::SeqCst);
        other.join().unwrap();
        assert_eq!(end, (false, 0));
    }
}
