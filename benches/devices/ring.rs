//! A queue without a thread: find a request, parse it, answer it, tell the driver.
//!
//! Against the same done straight with the crate `virtio-queue`, for a driver that keeps its promises: no list of host
//! addresses, no checks of the chain's shape, no counters.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bedplate_benches::{Pair, Unit, nanos};
use bedplate_devices::Memory;
use bedplate_devices::metrics::DeviceMetrics;
use bedplate_devices::testing::{Driver, DriverQueue, Piece};
use bedplate_devices::virtio::{Active, Answer, Chain, Drained, VirtioDevice, Virtqueue};
use criterion::Criterion;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const QUEUE_SIZE: u16 = 256;
const DATA_LEN: u32 = 4096;
const HEADER: u64 = Driver::BUFFERS;
const STATUS: u64 = Driver::BUFFERS + 0x800;
const DATA: u64 = Driver::BUFFERS + 0x1000;

/// Requests that one look at the queue finds, and how it is called.
const BATCHES: [(u16, &str); 2] = [(1, "one request at a time"), (64, "64 requests at a time")];

pub fn benchmark(c: &mut Criterion) {
    for (batch, name) in BATCHES {
        let mut ours = Ours::new(batch);
        let mut bare = Bare::new(batch);
        Pair {
            what: &format!("virtqueue parse and completion, {name}"),
            ours: "devices",
            bare: "virtio-queue",
            unit: Unit::Operations,
        }
        .run(c, |count| ours.serve(count), |count| bare.serve(count));
    }
}

/// A device that gives its queues away instead of working on them.
struct Handover {
    active: Arc<Mutex<Option<Active>>>,
    metrics: Arc<DeviceMetrics>,
}

impl VirtioDevice for Handover {
    fn device_type(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, active: Active) -> io::Result<()> {
        *self.active.lock().unwrap() = Some(active);
        Ok(())
    }

    fn stop(&mut self) -> Vec<Virtqueue> {
        Vec::new()
    }

    fn metrics(&self) -> &Arc<DeviceMetrics> {
        &self.metrics
    }
}

/// The driver's side, which is not measured.
struct Feeder {
    driver: Driver,
    queue: DriverQueue,
    batch: u16,
}

impl Feeder {
    fn new(batch: u16) -> (Self, Virtqueue) {
        let active = Arc::<Mutex<Option<Active>>>::default();
        let device = Handover { active: Arc::clone(&active), metrics: Arc::default() };
        let mut driver = Driver::attach(device);
        let queue = driver.up().remove(0);
        let theirs = active.lock().unwrap().take().unwrap().queues.remove(0).unwrap();
        // type IN, reserved, sector.
        driver.put(HEADER, &[0; 16]);
        (Self { driver, queue, batch }, theirs)
    }

    /// Does `count` requests in batches, of which only `serve` is timed; `interrupted` takes the interrupt.
    fn feed(&mut self, count: u64, mut serve: impl FnMut(), interrupted: impl Fn() -> bool) -> Duration {
        let mut time = Duration::ZERO;
        let mut left = count;
        while left > 0 {
            let now = left.min(u64::from(self.batch));
            for _ in 0..now {
                self.queue.add(&[Piece::Read(HEADER, 16), Piece::Write(DATA, DATA_LEN), Piece::Write(STATUS, 1)]);
            }
            self.queue.arm();
            time += nanos(&mut serve);
            for _ in 0..now {
                assert_eq!(self.queue.take().unwrap().1, DATA_LEN + 1, "the device has not served a request");
            }
            assert!(interrupted(), "the driver asked for an interrupt and got none");
            left -= now;
        }
        time
    }
}

struct Ours {
    feeder: Feeder,
    queue: Virtqueue,
}

impl Ours {
    fn new(batch: u16) -> Self {
        let (feeder, queue) = Feeder::new(batch);
        Self { feeder, queue }
    }

    fn serve(&mut self, count: u64) -> Duration {
        let vector = Arc::clone(&self.feeder.queue.vector);
        let work = || {
            let drained = self.queue.drain(serve_chain);
            assert_eq!(drained, Drained::Empty);
        };
        self.feeder.feed(count, work, || vector.take() > 0)
    }
}

/// What the block device does with a chain, but for moving data.
fn serve_chain(chain: &mut Chain) -> Answer {
    assert!(chain.fault.is_none());
    let writable = chain.writable.view();
    let (data, status) = writable.split_at(writable.len() - 1).unwrap();
    let (kind, rest) = chain.readable.view().split_value::<[u32; 2]>().unwrap();
    let (sector, _) = rest.split_value::<u64>().unwrap();
    assert_eq!((kind[0], sector), (0, 0));
    status.copy_from(&[0]);
    Answer::Used(data.len() as u32 + 1)
}

struct Bare {
    feeder: Feeder,
    queue: Queue,
    memory: Memory,
    interrupt: EventFd,
}

impl Bare {
    fn new(batch: u16) -> Self {
        let (feeder, _) = Feeder::new(batch);
        let DriverQueue { table, avail, used, .. } = feeder.queue;
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue.set_desc_table_address(Some(table as u32), Some((table >> 32) as u32));
        queue.set_avail_ring_address(Some(avail as u32), Some((avail >> 32) as u32));
        queue.set_used_ring_address(Some(used as u32), Some((used >> 32) as u32));
        queue.set_event_idx(true);
        queue.set_ready(true);
        let memory = Arc::clone(&feeder.driver.machine.memory);
        Self { feeder, queue, memory, interrupt: EventFd::new(EFD_NONBLOCK).unwrap() }
    }

    fn serve(&mut self, count: u64) -> Duration {
        let Self { feeder, queue, memory, interrupt } = self;
        feeder.feed(count, || drain_bare(queue, memory, interrupt), || interrupt.read().is_ok())
    }
}

fn drain_bare(queue: &mut Queue, memory: &GuestMemoryMmap, interrupt: &EventFd) {
    loop {
        queue.disable_notification(memory).unwrap();
        while let Some(chain) = queue.pop_descriptor_chain(memory) {
            let head = chain.head_index();
            let mut written = 0;
            let mut header = (0u32, 0u64);
            for descriptor in chain {
                if !descriptor.is_write_only() {
                    header.0 = memory.read_obj(descriptor.addr()).unwrap();
                    header.1 = memory.read_obj(GuestAddress(descriptor.addr().0 + 8)).unwrap();
                } else if descriptor.has_next() {
                    written += descriptor.len();
                } else {
                    memory.write_obj(0u8, descriptor.addr()).unwrap();
                    written += 1;
                }
            }
            assert_eq!(header, (0, 0));
            queue.add_used(memory, head, written).unwrap();
        }
        if queue.needs_notification(memory).unwrap() {
            interrupt.write(1).unwrap();
        }
        if !queue.enable_notification(memory).unwrap() {
            break;
        }
    }
}
