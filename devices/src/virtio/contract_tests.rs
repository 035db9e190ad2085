//! What every device promises its transport, tried on each of them; and the promise to survive any driver.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::balloon::{Balloon, BalloonConfig};
use super::block::{Block, BlockConfig, Medium, RawFile};
use super::console::{Console, WindowSize};
use super::limiter::LimiterConfig;
use super::mem::{Mem, MemConfig};
use super::net::{Net, NetConfig};
use super::pmem::{Pmem, PmemConfig};
use super::rng::Rng;
use super::vsock::{Vsock, VsockConfig};
use super::*;
use crate::metadata::Responder;
use crate::testing::{Driver, DriverQueue, Echo, Hostile, Machine, Nowhere, Piece, RamDisk, SERVER, Wire, honest};

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const NEEDS_RESET: u8 = 0x40;

/// A device, and its surroundings.
struct Subject<D> {
    device: D,
    /// Queues that are served whenever they are notified.
    served: &'static [usize],
    /// Keeps the other ends of what it is connected to, and takes what has gathered there.
    relax: Box<dyn FnMut()>,
}

fn block() -> Subject<Block<RamDisk>> {
    let device = Block::new(RamDisk::new(1 << 20), BlockConfig::default()).unwrap();
    Subject { device, served: &[0], relax: Box::new(|| ()) }
}

/// Several queues, over io_uring where there is one.
fn block_ring() -> Subject<Block<RawFile>> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let backend = RawFile::new(file).unwrap();
    let ring = backend.ring().inspect_err(|error| println!("skipped: no io_uring here: {error}")).ok();
    let device = Block::over(Medium { backend, ring }, BlockConfig { queues: 4, ..Default::default() }).unwrap();
    Subject { device, served: &[0, 1, 2, 3], relax: Box::new(|| ()) }
}

fn mem() -> Subject<Mem> {
    let config = MemConfig { address: Machine::RAM as u64 / 2, len: 4 << 20, block: 1 << 20 };
    let device = Mem::new(config).unwrap();
    device.control().request(2 << 20);
    Subject { device, served: &[0], relax: Box::new(|| ()) }
}

fn net() -> Subject<Net<Wire>> {
    let (wire, peer, _) = Wire::new();
    peer.set_nonblocking(true).unwrap();
    let relax = Box::new(move || while peer.recv(&mut [0; 64]).is_ok() {});
    let mut device = Net::new(vec![wire], NetConfig { mac: [2, 0, 0, 0, 0, 1], ..NetConfig::default() }).unwrap();
    device.set_responder(Responder::new(SERVER, Box::new(Echo))).unwrap();
    Subject { device, served: &[0, 1], relax }
}

/// Several pairs, and a control queue.
fn net_pairs() -> Subject<Net<Wire>> {
    let (links, peers): (Vec<_>, Vec<_>) = (0..3).map(|_| Wire::new()).map(|(wire, peer, _)| (wire, peer)).unzip();
    peers.iter().for_each(|peer| peer.set_nonblocking(true).unwrap());
    let relax = Box::new(move || peers.iter().for_each(|peer| while peer.recv(&mut [0; 64]).is_ok() {}));
    let mut device = Net::new(links, NetConfig::default()).unwrap();
    device.set_responder(Responder::new(SERVER, Box::new(Echo))).unwrap();
    // The other pairs are off, and the control queue is there for a driver that knows of it.
    Subject { device, served: &[0, 1], relax }
}

fn pmem() -> Subject<Pmem> {
    let config = PmemConfig { address: 5 << 30, len: 2 << 20, flush_cost: 2 << 20, limits: LimiterConfig::NONE };
    Subject {
        device: Pmem::new(config, Some(tempfile::tempfile().unwrap())).unwrap(),
        served: &[0],
        relax: Box::new(|| ()),
    }
}

fn rng() -> Subject<Rng> {
    Subject { device: Rng::new(LimiterConfig::NONE).unwrap(), served: &[0], relax: Box::new(|| ()) }
}

fn balloon() -> Subject<Balloon> {
    let stats_interval = std::time::Duration::from_secs(1);
    let config = BalloonConfig { stats_interval, hinting: true, reporting: true, ..BalloonConfig::default() };
    Subject { device: Balloon::new(config).unwrap(), served: &[0, 1], relax: Box::new(|| ()) }
}

fn console() -> Subject<Console<Nowhere>> {
    let device = Console::new(Nowhere, WindowSize::default()).unwrap();
    // There is always something to read.
    let control = device.control();
    let relax = Box::new(move || {
        control.push_input(&[b'x'; 4096]);
    });
    Subject { device, served: &[0, 1], relax }
}

fn vsock() -> Subject<Vsock> {
    let directory = tempfile::tempdir().unwrap();
    let config = VsockConfig { guest_cid: 3, uds_path: directory.path().join("v") };
    Subject {
        device: Vsock::new(config).unwrap(),
        served: &[1],
        relax: Box::new(move || assert!(directory.path().exists())),
    }
}

fn goes_through_sessions<D: VirtioDevice + 'static>(subject: Subject<D>) {
    let metrics = Arc::clone(subject.device.metrics());
    let features = subject.device.ring_features();
    let mut driver = Driver::attach(subject.device);
    let offered = driver.offered();
    assert_eq!(offered & COMMON_FEATURES, features);
    for features in [VERSION_1, offered, offered & !(1 << VIRTIO_RING_F_EVENT_IDX), VERSION_1 | 1 << 29] {
        let mut queues = driver.prepare(features);
        assert_eq!(queues.len(), usize::from(u16::from_le_bytes(driver.machine.read(driver.common(18)))));
        driver.start();
        assert_eq!(driver.status(), 15);
        honest(&driver, &mut queues);
        queues.iter().for_each(|queue| driver.kick(queue));
        driver.set_status(0);
        assert_eq!(driver.status(), 0);
        // Nobody looks at the rings any more.
        let before: Vec<u16> = queues.iter().map(DriverQueue::used_index).collect();
        for queue in &mut queues {
            queue.add(&[Piece::Write(Driver::BUFFERS, 64)]);
            driver.kick(queue);
        }
        assert_eq!(before, queues.iter().map(DriverQueue::used_index).collect::<Vec<_>>());
    }
    assert_eq!((metrics.host_faults.value(), metrics.first_host_fault()), (0, None));
    // Dropping a device that works joins its worker.
    driver.up();
}

fn leaves_the_bus_while_it_works<D: VirtioDevice + 'static>(subject: Subject<D>) {
    let metrics = Arc::clone(subject.device.metrics());
    let mut driver = Driver::attach(subject.device);
    let mut queues = driver.up();
    honest(&driver, &mut queues);
    for queue in &mut queues {
        queue.add(&[Piece::Write(Driver::BUFFERS, 64)]);
        driver.kick(queue);
    }
    driver.machine.root.remove(driver.slot);
    assert_eq!(driver.machine.read_config(driver.slot, 0), !0);
    assert!(driver.machine.host.doorbells().is_empty(), "ioeventfds are left");
    assert!(driver.machine.host.vectors.lock().unwrap().iter().all(|vector| vector.route().is_none()));
    let before: Vec<u16> = queues.iter().map(DriverQueue::used_index).collect();
    for queue in &mut queues {
        queue.add(&[Piece::Write(Driver::BUFFERS, 64)]);
        driver.kick(queue);
    }
    driver.start();
    assert_eq!(before, queues.iter().map(DriverQueue::used_index).collect::<Vec<_>>());
    // The counters are ours; the device and its worker have let go of theirs.
    assert_eq!((metrics.host_faults.value(), Arc::strong_count(&metrics)), (0, 1));
}

fn answers_any_configuration_access<D: VirtioDevice + 'static>(subject: Subject<D>) {
    let driver = Driver::attach(subject.device);
    for offset in 0..0x100 {
        for width in [1, 2, 4, 8] {
            let mut data = [0xa5; 8];
            assert!(driver.machine.bus.read(driver.device_config(offset), &mut data[..width]));
            let bytes: Vec<u8> =
                (0..width as u64).map(|at| driver.machine.read::<1>(driver.device_config(offset + at))[0]).collect();
            assert_eq!(data[..width], bytes, "a wide access is its bytes");
            driver.machine.write(driver.device_config(offset), &data[..width]);
        }
    }
}

fn says_when_its_rings_are_broken<D: VirtioDevice + 'static>(subject: Subject<D>) {
    let metrics = Arc::clone(subject.device.metrics());
    let mut driver = Driver::attach(subject.device);
    let config_vector = Arc::clone(&driver.machine.host.vectors.lock().unwrap()[0]);
    let deadline = || std::time::Instant::now() + std::time::Duration::from_secs(20);
    for index in subject.served {
        let queues = driver.up();
        config_vector.take();
        // More chains than there are entries.
        queues[*index].set_avail_index(queues[*index].size + 1);
        driver.kick(&queues[*index]);
        assert!(config_vector.wait(deadline()));
        assert_eq!(driver.status(), 15 | NEEDS_RESET);
        assert!(metrics.guest_faults.value() > 0);

        let queues = driver.up();
        config_vector.take();
        // A head that is no descriptor.
        let mut queue = queues.into_iter().nth(*index).unwrap();
        queue.offer(queue.size);
        driver.kick(&queue);
        assert!(config_vector.wait(deadline()));
        assert_eq!(driver.status(), 15 | NEEDS_RESET);

        // Rings that are nowhere, or crooked.
        for (register, address) in [(32, 1u64 << 40), (40, Machine::RAM as u64 - 8), (48, u64::MAX - 3), (32, 8)] {
            driver.prepare_all(0);
            driver.set_status(0);
            driver.set_status(3);
            driver.machine.write(driver.common(8), &1u32.to_le_bytes());
            driver.machine.write(driver.common(12), &1u32.to_le_bytes());
            driver.set_status(11);
            driver.machine.write(driver.common(22), &(*index as u16).to_le_bytes());
            driver.machine.write(driver.common(register), &address.to_le_bytes());
            driver.machine.write(driver.common(28), &1u16.to_le_bytes());
            driver.start();
            assert_ne!(driver.status() & NEEDS_RESET, 0, "{register} {address:#x}");
        }
    }
    let mut queues = driver.up();
    assert_eq!(driver.status(), 15);
    honest(&driver, &mut queues);
}

/// Counts instead of interrupting.
#[derive(Default)]
struct Count(AtomicU32);

impl Interrupt for Count {
    fn used(&self, _queue: u16) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn config_changed(&self) {}
    fn needs_reset(&self) {}
}

fn stops_with_nothing_in_flight<D: VirtioDevice + 'static>(mut subject: Subject<D>) {
    assert!(subject.device.stop().is_empty(), "a device at rest has no queues");
    let machine = Machine::new();
    for _ in 0..3 {
        let interrupt: Arc<dyn Interrupt> = Arc::new(Count::default());
        let queues = (0..).zip(subject.device.queue_sizes()).map(|(index, size)| {
            let base = 0x1_0000 * u64::from(index);
            // Chains of one buffer that can be written to, in all entries.
            vm_memory::Bytes::write_slice(&*machine.memory, &[0; 0xc000], vm_memory::GuestAddress(base)).unwrap();
            for entry in 0..u64::from(*size) {
                let descriptor = [Driver::BUFFERS + entry * 64, 64 | 2 << 32];
                vm_memory::Bytes::write_obj(&*machine.memory, descriptor, vm_memory::GuestAddress(base + entry * 16))
                    .unwrap();
                vm_memory::Bytes::write_obj(
                    &*machine.memory,
                    entry as u16,
                    vm_memory::GuestAddress(base + 0x6004 + entry * 2),
                )
                .unwrap();
            }
            vm_memory::Bytes::write_obj(&*machine.memory, size / 2, vm_memory::GuestAddress(base + 0x6002)).unwrap();
            let mut config = QueueConfig::new(*size);
            config.enabled = true;
            (config.descriptors, config.driver, config.device) = (base, base + 0x6000, base + 0x8000);
            let queue = config.activate(&machine.memory, false).unwrap();
            let notify = Arc::new(EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap());
            let interrupt = Arc::clone(&interrupt);
            Some(Virtqueue::new(index, queue, notify, interrupt, Arc::clone(subject.device.metrics())))
        });
        let queues: Vec<_> = queues.collect();
        let count = queues.len();
        subject.device.activate(Active { queues, features: VERSION_1, interrupt }).unwrap();
        let queues = subject.device.stop();
        assert_eq!(queues.len(), count);
        for queue in &queues {
            let state = queue.state();
            assert_eq!(state.next_avail, state.next_used, "queue {}", queue.index());
            if subject.served.contains(&usize::from(queue.index())) && queue.index() + 1 == count as u16 {
                assert_eq!(state.next_used, state.size / 2, "what was there is served before a device stops");
            }
        }
        assert!(subject.device.stop().is_empty());
    }
}

fn survives<D: VirtioDevice + 'static>(subject: Subject<D>, cases: u32) {
    let state = std::cell::RefCell::new((Hostile::new(Driver::attach(subject.device)), subject.relax));
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let bytes = proptest::collection::vec(any::<u8>(), 0..600);
    let result = runner.run(&bytes, |bytes| {
        let (hostile, relax) = &mut *state.borrow_mut();
        let (driver, mut queues) = hostile.run(&bytes);
        relax();
        honest(driver, &mut queues);
        Ok(())
    });
    result.unwrap();
}

macro_rules! contract {
    ($($device:ident),*) => {$(
        mod $device {
            #[test]
            fn goes_through_sessions() {
                super::goes_through_sessions(super::$device());
            }
            #[test]
            fn leaves_the_bus_while_it_works() {
                super::leaves_the_bus_while_it_works(super::$device());
            }
            #[test]
            fn answers_any_configuration_access() {
                super::answers_any_configuration_access(super::$device());
            }
            #[test]
            fn says_when_its_rings_are_broken() {
                super::says_when_its_rings_are_broken(super::$device());
            }
            #[test]
            fn stops_with_nothing_in_flight() {
                super::stops_with_nothing_in_flight(super::$device());
            }
            #[test]
            fn survives_hostile_drivers() {
                super::survives(super::$device(), 3000);
            }
        }
    )*};
}

contract!(balloon, block, block_ring, console, mem, net, net_pairs, pmem, rng, vsock);
