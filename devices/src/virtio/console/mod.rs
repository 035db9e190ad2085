//! The console device, Virtio 1.2, 5.3: one port, which is the guest's `hvc0`.
//!
//! What the guest writes goes to a sink of the host's that must not block: what is too much for it is the sink's to drop, and
//! no guest is held up by who reads it, or does not. What is for the guest waits here, up to a bound, until its driver has
//! buffers; beyond the bound the host has to wait. Several ports are not offered: there is no control queue.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Active, Answer, Chain, Handler, Inbox, Session, VirtioDevice, Virtqueue, Worker, read_image};
use crate::metrics::{Counter, DeviceMetrics};

const QUEUE_SIZE: u16 = 64;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// The worker's descriptor: input, or another size.
const ORDERS: u32 = 0;

/// Feature bits, 5.3.3: the size of the window, and output before there are queues.
const F_SIZE: u64 = 1 << 0;
const F_EMERG_WRITE: u64 = 1 << 2;
/// Where the driver writes a character in an emergency, 5.3.4.
const EMERG_WR: u64 = 8;

/// Input that waits for the guest, at most.
const MAX_INPUT: usize = 4096;
/// Bytes of one request that are taken, at most: more than any driver sends at once. The rest is dropped, so that nobody keeps
/// the worker for long.
const MAX_OUTPUT: usize = 1 << 20;
const PIECE: usize = 4096;

/// What a console counts beyond [`DeviceMetrics`].
#[derive(Debug, Default)]
pub struct ConsoleMetrics {
    /// Bytes that the guest has read.
    pub input_bytes: Counter,
    /// Bytes that it has written.
    pub output_bytes: Counter,
    /// Of a request, bytes that were too many.
    pub dropped_bytes: Counter,
}

/// Columns and rows of a window.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct WindowSize {
    pub columns: u16,
    pub rows: u16,
}

/// What waits for the worker.
#[derive(Default)]
struct Orders {
    resized: bool,
}

struct Shared {
    /// Locked for a copy, and nothing is called under it.
    input: Mutex<VecDeque<u8>>,
    /// Columns in the lower half, rows in the upper one.
    size: AtomicU32,
    inbox: Inbox<Orders>,
    drained: EventFd,
}

/// A console, from outside of the guest. Outlives the device harmlessly.
#[derive(Clone)]
pub struct ConsoleControl {
    shared: Arc<Shared>,
}

impl ConsoleControl {
    /// Gives the guest as much of `input` as there is room for; how much that was. The guest need not have a driver yet.
    pub fn push_input(&self, input: &[u8]) -> usize {
        let mut waiting = self.shared.input.lock().unwrap_or_else(|e| e.into_inner());
        let taken = input.len().min(MAX_INPUT - waiting.len());
        waiting.extend(&input[..taken]);
        drop(waiting);
        if taken > 0 {
            self.shared.inbox.post(|_| ());
        }
        taken
    }

    /// Signalled when the guest has taken all input.
    pub fn drained(&self) -> &EventFd {
        &self.shared.drained
    }

    /// The window that shows the console has another size.
    pub fn resize(&self, size: WindowSize) {
        self.shared.size.store(size.packed(), Ordering::SeqCst);
        self.shared.inbox.post(|orders| orders.resized = true);
    }
}

impl WindowSize {
    fn packed(self) -> u32 {
        u32::from(self.rows) << 16 | u32::from(self.columns)
    }
}

/// A virtio console.
pub struct Console<W: Write + Send + 'static> {
    control: ConsoleControl,
    /// Written by vCPUs in an emergency only.
    emergency: W,
    metrics: Arc<ConsoleMetrics>,
    worker: Worker<ConsoleHandler<W>>,
}

impl<W: Write + Send + Clone + 'static> Console<W> {
    /// A console whose output goes to `out`, which must not block.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(out: W, size: WindowSize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            input: Mutex::default(),
            size: AtomicU32::new(size.packed()),
            inbox: Inbox::open()?,
            drained: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let metrics = Arc::<ConsoleMetrics>::default();
        let handler = ConsoleHandler {
            out: out.clone(),
            shared: Arc::clone(&shared),
            metrics: Arc::clone(&metrics),
            has_written: false,
        };
        let worker = Worker::new("console-dev", handler, Arc::default());
        Ok(Self { control: ConsoleControl { shared }, emergency: out, metrics, worker })
    }

    /// For what comes from outside of the guest.
    pub fn control(&self) -> ConsoleControl {
        self.control.clone()
    }

    /// The counters that only a console has.
    pub fn console_metrics(&self) -> &Arc<ConsoleMetrics> {
        &self.metrics
    }
}

impl<W: Write + Send + 'static> VirtioDevice for Console<W> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        F_SIZE | F_EMERG_WRITE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // Columns, rows, number of ports (not offered), and the emergency's register, which reads as nothing.
        let mut space = [0; 12];
        space[..4].copy_from_slice(&self.control.shared.size.load(Ordering::SeqCst).to_le_bytes());
        read_image(&space, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let at = EMERG_WR.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
        if let Some(byte) = at.and_then(|at| data.get(at)) {
            // A byte that the sink refuses is lost, as on a line that nobody listens to.
            let _ = self.emergency.write_all(&[*byte]);
            self.metrics.output_bytes.increment();
        }
    }

    fn activate(&mut self, active: Active) -> io::Result<()> {
        self.worker.start(active)
    }

    fn stop(&mut self) -> Vec<Virtqueue> {
        self.worker.stop()
    }

    fn metrics(&self) -> &Arc<DeviceMetrics> {
        self.worker.metrics()
    }
}

struct ConsoleHandler<W> {
    out: W,
    shared: Arc<Shared>,
    metrics: Arc<ConsoleMetrics>,
    /// In this session.
    has_written: bool,
}

impl<W: Write> ConsoleHandler<W> {
    /// Something the guest has written.
    fn transmit(&mut self, chain: &Chain, metrics: &DeviceMetrics) -> Answer {
        if chain.fault.is_some() {
            return Answer::Used(0);
        }
        let mut rest = chain.readable.view();
        if rest.is_empty() {
            metrics.guest_faults.increment();
        }
        self.has_written = true;
        let mut left = MAX_OUTPUT;
        let mut piece = [0; PIECE];
        while left > 0 && !rest.is_empty() {
            let len = rest.len().min(left).min(PIECE);
            let Some((now, later)) = rest.split_at(len) else { break };
            let len = now.copy_to(&mut piece[..len]);
            // As above.
            let _ = self.out.write_all(&piece[..len]);
            self.metrics.output_bytes.add(len as u64);
            (rest, left) = (later, left - len);
        }
        self.metrics.dropped_bytes.add(rest.len() as u64);
        Answer::Used(0)
    }

    /// Something for the guest, into buffers that it has offered.
    fn receive(&mut self, chain: &Chain, metrics: &DeviceMetrics) -> Answer {
        if chain.fault.is_some() {
            return Answer::Used(0);
        }
        if chain.writable.is_empty() {
            metrics.guest_faults.increment();
            return Answer::Used(0);
        }
        let mut input = self.shared.input.lock().unwrap_or_else(|e| e.into_inner());
        if input.is_empty() {
            return Answer::Wait;
        }
        let len = chain.writable.view().copy_from(input.make_contiguous());
        input.drain(..len);
        let drained = input.is_empty();
        drop(input);
        self.metrics.input_bytes.add(len as u64);
        if drained {
            // Fails only where 2^64 - 2 signals wait to be read: then the host knows already.
            let _ = self.shared.drained.write(1);
        }
        // At most what may wait.
        Answer::Used(len as u32)
    }
}

impl<W: Write + Send + 'static> Handler for ConsoleHandler<W> {
    fn started(&mut self, session: &mut Session<'_, '_>) {
        self.has_written = false;
        if let Err(error) = session.watch(&self.shared.inbox, ORDERS, EventSet::IN) {
            session.metrics.host_fault(|| format!("cannot watch for input: {error}"));
        }
    }

    fn notified(&mut self, queue: usize, session: &mut Session<'_, '_>) {
        let metrics = session.metrics;
        let had_written = self.has_written;
        let Some(virtqueue) = session.queue(queue) else { return };
        match queue {
            RECEIVE => virtqueue.drain(|chain| self.receive(chain, metrics)),
            TRANSMIT => virtqueue.drain(|chain| self.transmit(chain, metrics)),
            _ => return,
        };
        // Linux (seen with 6.1) looks at the size only when it is told of a change, and forgets it before it has a console.
        // By its first word it has one.
        let is_known = self.shared.size.load(Ordering::SeqCst) != 0;
        if self.has_written && !had_written && is_known && session.features & F_SIZE != 0 {
            session.interrupt.config_changed();
        }
    }

    fn ready(&mut self, _token: u32, _events: EventSet, session: &mut Session<'_, '_>) {
        let orders = self.shared.inbox.take();
        if orders.resized && session.features & F_SIZE != 0 {
            session.interrupt.config_changed();
        }
        self.notified(RECEIVE, session);
    }
}
