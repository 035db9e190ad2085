//! What the transport's registers share with the device's worker.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};

use vmm_sys_util::eventfd::EventFd;

use crate::metrics::DeviceMetrics;
use crate::pci::Vectors;
use crate::virtio::Interrupt;

/// No vector: nothing is raised.
pub(super) const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Status, ISR and the vectors. Orderings are sequentially consistent: these are far from the hot path's memory accesses.
pub(super) struct Lines {
    pub(super) status: AtomicU8,
    pub(super) generation: AtomicU8,
    pub(super) config_vector: AtomicU16,
    pub(super) queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    vectors: Arc<Vectors>,
    metrics: Arc<DeviceMetrics>,
}

impl Lines {
    pub(super) fn new(queues: usize, vectors: Arc<Vectors>, metrics: Arc<DeviceMetrics>) -> Self {
        Self {
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            vectors,
            metrics,
        }
    }

    /// As after power-on. Nobody may be at work.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        self.queue_vectors.iter().for_each(|vector| vector.store(NO_VECTOR, Ordering::SeqCst));
        self.isr.store(0, Ordering::SeqCst);
    }

    /// The driver reads the ISR status, which clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    fn raise(&self, isr: u8, vector: &AtomicU16) {
        self.isr.fetch_or(isr, Ordering::SeqCst);
        if let Err(error) = self.vectors.signal(vector.load(Ordering::SeqCst)) {
            self.count(&error);
        }
    }

    fn count(&self, error: &io::Error) {
        self.metrics.host_fault(|| format!("cannot raise an interrupt: {error}"));
    }
}

impl Interrupt for Lines {
    fn used(&self, queue: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(queue)) {
            self.raise(ISR_QUEUE, vector);
        }
    }

    fn direct(&self, queue: u16) -> io::Result<Option<EventFd>> {
        let vector = self.queue_vectors.get(usize::from(queue)).map_or(NO_VECTOR, |v| v.load(Ordering::SeqCst));
        self.vectors.direct(vector)
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(ISR_CONFIG, &self.config_vector);
    }

    fn needs_reset(&self) {
        let before = self.status.fetch_or(VIRTIO_CONFIG_S_NEEDS_RESET as u8, Ordering::SeqCst);
        if u32::from(before) & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.config_changed();
        }
    }
}
