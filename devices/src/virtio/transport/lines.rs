//! What a transport's registers share with the device's worker.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};

use vmm_sys_util::eventfd::EventFd;

use super::relay::Relay;
use crate::host::{Pin, TransportHost};
use crate::metrics::DeviceMetrics;
use crate::pci::Vectors;
use crate::platform::IrqLine;
use crate::virtio::Interrupt;

/// No vector: nothing is raised.
pub(super) const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Status, ISR, and three ways to interrupt a driver: PCI's messages and INTA#, which follows the ISR, and virtio-mmio's
/// pin. Orderings are sequentially consistent: these are far from the hot path's memory accesses.
pub(in crate::virtio) struct Lines {
    pub(super) status: AtomicU8,
    pub(super) generation: AtomicU8,
    pub(super) config_vector: AtomicU16,
    pub(super) queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    vectors: Arc<Vectors>,
    /// Whether the driver has chosen those;
    by_message: AtomicBool,
    /// if not, whether INTA# may be asserted,
    may_assert: AtomicBool,
    /// where that is, once the device has a slot,
    intx: OnceLock<Box<dyn IrqLine>>,
    /// and whether it is asserted. Held while that changes, so that the last change agrees with what is above.
    asserted: Mutex<bool>,
    /// Set while the driver is one that has a pin in the place of vectors.
    by_pin: AtomicBool,
    /// Which one, and the way there, once there was such a driver.
    pin: OnceLock<(u32, Box<dyn Pin>)>,
    /// The way of somebody else to either pin, who does not set the bit for used buffers. His own: he may fill its counter,
    /// or keep it.
    direct: Mutex<Option<Box<dyn Pin>>>,
    host: Arc<dyn TransportHost>,
    metrics: Arc<DeviceMetrics>,
    /// Itself.
    shared: Weak<Self>,
}

impl Lines {
    pub(super) fn new(
        queues: usize,
        vectors: Arc<Vectors>,
        host: Arc<dyn TransportHost>,
        metrics: Arc<DeviceMetrics>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|shared| Self {
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            vectors,
            by_message: AtomicBool::new(false),
            may_assert: AtomicBool::new(true),
            intx: OnceLock::new(),
            asserted: Mutex::new(false),
            by_pin: AtomicBool::new(false),
            pin: OnceLock::new(),
            direct: Mutex::default(),
            host,
            metrics,
            shared: Weak::clone(shared),
        })
    }

    /// As after power-on. Nobody may be at work but a [`Relay`], which is told last of what has just stopped.
    pub(super) fn reset(&self) {
        *self.lock_direct() = None;
        self.status.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        self.queue_vectors.iter().for_each(|vector| vector.store(NO_VECTOR, Ordering::SeqCst));
        self.isr.store(0, Ordering::SeqCst);
        self.by_pin.store(false, Ordering::SeqCst);
        self.assert();
    }

    /// INTA# of the device, whose slot is known now.
    pub(super) fn connect(&self, intx: Box<dyn IrqLine>) {
        // Only the root does, once.
        let _ = self.intx.set(intx);
    }

    /// The driver has chosen messages or INTA#, and whether the latter may be asserted. True if it has chosen the other one:
    /// what [`Interrupt::direct`] has given out is not good any more.
    pub(super) fn set_way(&self, by_message: bool, may_assert: bool) -> bool {
        let before = self.by_message.load(Ordering::SeqCst);
        if before && !by_message {
            // It was told of by messages, and nobody would take it back. What comes from here on is told twice.
            self.isr.store(0, Ordering::SeqCst);
        }
        self.by_message.store(by_message, Ordering::SeqCst);
        self.may_assert.store(may_assert, Ordering::SeqCst);
        self.assert();
        before != by_message
    }

    /// Whether there is a reason to assert INTA#: PCI's interrupt status.
    pub(in crate::virtio) fn asks_by_intx(&self) -> bool {
        let is_chosen = !self.by_message.load(Ordering::SeqCst) && !self.by_pin();
        is_chosen && self.isr.load(Ordering::SeqCst) != 0
    }

    /// Makes INTA# agree with the ISR.
    fn assert(&self) {
        let Some(intx) = self.intx.get() else { return };
        let mut asserted = self.asserted.lock().unwrap_or_else(|e| e.into_inner());
        let wanted = self.asks_by_intx() && self.may_assert.load(Ordering::SeqCst);
        if *asserted != wanted {
            *asserted = wanted;
            intx.set(wanted);
        }
    }

    /// The driver reads PCI's ISR status, which clears it and ends an INTA#.
    pub(in crate::virtio) fn take_isr(&self) -> u8 {
        let isr = self.isr.swap(0, Ordering::SeqCst);
        self.assert();
        isr
    }

    /// The driver reads virtio-mmio's interrupt status, which changes nothing. Where somebody else uses buffers it is always
    /// possible that he has.
    pub(in crate::virtio) fn isr(&self) -> u8 {
        let direct = if self.by_pin() && self.lock_direct().is_some() { ISR_QUEUE } else { 0 };
        self.isr.load(Ordering::SeqCst) | direct
    }

    /// The driver has seen these bits of the interrupt status.
    pub(in crate::virtio) fn acknowledge(&self, bits: u8) {
        self.isr.fetch_and(!bits, Ordering::SeqCst);
        if !self.by_pin() {
            self.assert();
        }
    }

    /// Until the next reset interrupts are edges on pin `gsi`, always the same one. Nobody may be at work.
    ///
    /// # Errors
    /// The host has no descriptors left, or refused.
    pub(super) fn use_pin(&self, gsi: u32) -> io::Result<()> {
        if self.pin.get().is_none() {
            // Only the transport sets it, which is one.
            let _ = self.pin.set((gsi, self.host.pin(gsi)?));
        }
        // What was given out before is INTA#'s.
        *self.lock_direct() = None;
        self.by_pin.store(true, Ordering::SeqCst);
        self.assert();
        Ok(())
    }

    /// Whether the driver is one that has a pin.
    pub(in crate::virtio) fn by_pin(&self) -> bool {
        self.by_pin.load(Ordering::SeqCst)
    }

    fn lock_direct(&self) -> MutexGuard<'_, Option<Box<dyn Pin>>> {
        self.direct.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn raise(&self, isr: u8, vector: &AtomicU16) {
        self.isr.fetch_or(isr, Ordering::SeqCst);
        let result = match self.pin.get().filter(|_| self.by_pin()) {
            Some((_, pin)) => pin.trigger().write(1),
            None => {
                if !self.by_message.load(Ordering::SeqCst) {
                    self.assert();
                }
                // Drops it where there are no messages. The driver may have turned to them just now.
                self.vectors.signal(vector.load(Ordering::SeqCst))
            }
        };
        if let Err(error) = result {
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
        let pin = self.pin.get().filter(|_| self.by_pin());
        if pin.is_some() || !self.by_message.load(Ordering::SeqCst) {
            let mut direct = self.lock_direct();
            if direct.is_none() {
                *direct = match (pin, self.shared.upgrade()) {
                    (Some((gsi, _)), _) => Some(self.host.pin(*gsi)?),
                    (None, Some(lines)) => Some(Box::new(Relay::start(lines, &self.metrics)?)),
                    // Its last owner is letting go of it.
                    (None, None) => None,
                };
            }
            return direct.as_ref().map(|way| way.trigger().try_clone()).transpose();
        }
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
