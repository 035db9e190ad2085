//! What every virtio transport is around: a device, its registers and interrupts, and the events that start its worker.
//! [`super::pci`] and [`super::mmio`] are two ways to the same.

mod lines;
mod registers;
mod relay;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::lines::Lines;
use self::registers::Registers;
use super::{Active, Interrupt, QueueConfig, QueuePosition, VirtioDevice, Virtqueue};
use crate::Memory;
use crate::host::{Doorbell, TransportHost};
use crate::pci::{Slot, Vectors};

pub(super) use self::registers::{COMMON_LEN, Effect, at};

/// A device, and what its driver has made of it so far.
pub(super) struct Transport {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) registers: Registers,
    pub(super) lines: Arc<Lines>,
    /// Off its bus for good: nobody drives it any more.
    pub(super) is_retired: bool,
    host: Arc<dyn TransportHost>,
    memory: Memory,
    /// One for each queue.
    notify: Vec<Arc<EventFd>>,
    /// Where virtio-mmio's doorbell is, while a driver is at work by it.
    doorbell: Option<u64>,
}

impl Transport {
    /// Around `device`, stopped. Its interrupts are `vectors`, one for each queue and one for the device, or whichever pin a
    /// driver chooses.
    ///
    /// # Errors
    /// The host has no event descriptors left.
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        memory: &Memory,
        host: &Arc<dyn TransportHost>,
        vectors: Arc<Vectors>,
    ) -> io::Result<Self> {
        let sizes = device.queue_sizes();
        let notify = sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new)).collect::<io::Result<Vec<_>>>()?;
        let lines = Lines::new(sizes.len(), vectors, Arc::clone(host), Arc::clone(device.metrics()));
        let offered = device.features() | device.ring_features();
        let registers = Registers::new(offered, sizes, sizes.len() as u16 + 1, Arc::clone(&lines));
        Ok(Self {
            device,
            registers,
            lines,
            is_retired: false,
            host: Arc::clone(host),
            memory: Arc::clone(memory),
            notify,
            doorbell: None,
        })
    }

    /// The driver has chosen messages or INTA#, and whether the latter may be asserted.
    pub(super) fn set_way(&mut self, by_message: bool, may_assert: bool) {
        if self.lines.set_way(by_message, may_assert) {
            (0..self.notify.len() as u16).for_each(|queue| self.device.vector_changed(queue));
        }
    }

    /// It is in `slot`, whose INTA# is its own. Returns the number of that pin.
    pub(super) fn connect(&self, slot: Slot) -> u8 {
        let (pin, intx) = self.host.intx(slot);
        self.lines.connect(intx);
        pin
    }

    /// The driver writes the register at `offset` of [`Registers`], and what it asks for is done.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let effect = self.registers.write(offset, data);
        self.perform(effect);
    }

    /// Does what a write asked for.
    pub(super) fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Fault => self.guest_fault(),
            Effect::Reset => self.reset(),
            Effect::Vector(queue) => self.device.vector_changed(queue),
            Effect::Activate => self.activate(),
        }
    }

    /// A notification that no ioeventfd has taken.
    pub(super) fn notify(&self, queue: u64) {
        match usize::try_from(queue).ok().and_then(|queue| self.notify.get(queue)) {
            Some(event) if self.device.may_be_notified_here() => {
                self.host_fault("signal a virtqueue's event descriptor", event.write(1))
            }
            _ => self.guest_fault(),
        }
    }

    /// From now on `doorbell` of a queue's number signals that queue's event.
    pub(super) fn add_doorbells(&self, doorbell: impl Fn(u16) -> Doorbell) {
        for (queue, event) in (0..).zip(&self.notify) {
            self.host_fault("set an ioeventfd", self.host.add_doorbell(doorbell(queue), event));
        }
    }

    /// Undoes [`Self::add_doorbells`] with the same argument.
    pub(super) fn remove_doorbells(&self, doorbell: impl Fn(u16) -> Doorbell) {
        for (queue, event) in (0..).zip(&self.notify) {
            self.host_fault("remove an ioeventfd", self.host.remove_doorbell(doorbell(queue), event));
        }
    }

    /// The driver, which is just ready, is one that notifies by writing a queue's number to the register at `doorbell`, and
    /// is interrupted by pin `gsi`. Until the next reset. False if the host cannot: then the driver sees a device that needs
    /// one.
    pub(super) fn use_doorbell(&mut self, doorbell: u64, gsi: u32) -> bool {
        let result = self.lines.use_pin(gsi);
        if result.is_err() {
            self.host_fault("attach a virtio device to an interrupt's pin", result);
            self.lines.needs_reset();
            return false;
        }
        self.doorbell = Some(doorbell);
        self.add_doorbells(|queue| Doorbell::Register { address: doorbell, value: queue.into() });
        true
    }

    /// Stops the device, which forgets its driver. Idempotent.
    pub(super) fn reset(&mut self) {
        self.device.stop();
        self.registers.reset();
        if let Some(address) = self.doorbell.take() {
            self.remove_doorbells(|queue| Doorbell::Register { address, value: queue.into() });
        }
    }

    fn activate(&mut self) {
        let features = self.registers.features();
        let mut queues = Vec::new();
        for (index, config) in self.registers.queues.iter().enumerate() {
            if !config.enabled {
                queues.push(None);
                continue;
            }
            let Ok(queue) = config.activate(&self.memory, features & 1 << VIRTIO_RING_F_EVENT_IDX != 0) else {
                self.guest_fault();
                return self.lines.needs_reset();
            };
            let interrupt = Arc::clone(&self.lines) as Arc<dyn Interrupt>;
            let metrics = Arc::clone(self.device.metrics());
            let notify = Arc::clone(&self.notify[index]);
            queues.push(Some(Virtqueue::new(index as u16, queue, notify, interrupt, metrics)));
        }
        let interrupt = Arc::clone(&self.lines) as Arc<dyn Interrupt>;
        let result = self.device.activate(Active { queues, features, interrupt });
        if result.is_err() {
            self.lines.needs_reset();
        }
        self.host_fault("start a virtio device", result);
    }

    /// How far the queues are that the driver has enabled.
    pub(super) fn queue_positions(&self) -> Vec<QueuePosition> {
        let position = |(index, queue): (usize, &QueueConfig)| queue.position(index as u16, &self.memory);
        self.registers.queues.iter().enumerate().filter_map(position).collect()
    }

    /// The driver broke a rule.
    pub(super) fn guest_fault(&self) {
        self.device.metrics().guest_faults.increment();
    }

    /// The host could not do `what`, if `result` says so.
    pub(super) fn host_fault(&self, what: &str, result: io::Result<()>) {
        if let Err(error) = result {
            self.device.metrics().host_fault(|| format!("cannot {what}: {error}"));
        }
    }
}
