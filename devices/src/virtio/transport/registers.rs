//! The registers of a device and the rules by which they change, without effects. Their layout is PCI's common
//! configuration structure, Virtio 1.2, 4.1.4.3; virtio-mmio has the same registers at other places.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};

use super::lines::{Lines, NO_VECTOR};
use crate::virtio::{QueueConfig, read_image};

/// Bytes of the structure, as of Virtio 1.2 with its queue notification data and reset registers.
pub(in crate::virtio) const COMMON_LEN: usize = 60;

const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;

/// Offsets of the registers that both transports have.
pub(in crate::virtio) mod at {
    pub const OFFERED_SELECT: u64 = 0;
    pub const OFFERED: u64 = 4;
    pub const ACCEPTED_SELECT: u64 = 8;
    pub const ACCEPTED: u64 = 12;
    pub const CONFIG_VECTOR: u64 = 16;
    pub const QUEUE_COUNT: u64 = 18;
    pub const STATUS: u64 = 20;
    pub const GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_VECTOR: u64 = 26;
    pub const QUEUE_ENABLED: u64 = 28;
    pub const QUEUE_NOTIFY_OFFSET: u64 = 30;
    /// Addresses of the queue's three parts, in two halves each.
    pub const DESCRIPTORS: u64 = 32;
    pub const DRIVER: u64 = 40;
    pub const DEVICE: u64 = 48;
}

/// End of the registers of a queue that are written.
const QUEUE_END: u64 = at::DEVICE + 8;

/// What a register write asks the transport to do.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(in crate::virtio) enum Effect {
    None,
    /// Stop the device and forget everything.
    Reset,
    /// The driver is ready: start the device.
    Activate,
    /// Another vector for this queue, while the device works.
    Vector(u16),
    /// The driver broke a rule; the write had no effect.
    Fault,
}

/// The registers.
pub(in crate::virtio) struct Registers {
    /// Features that the device offers.
    offered: u64,
    /// Features that the driver has accepted.
    accepted: u64,
    offered_select: u32,
    accepted_select: u32,
    queue_select: u16,
    vector_count: u16,
    pub(super) queues: Vec<QueueConfig>,
    pub(super) lines: Arc<Lines>,
}

impl Registers {
    pub(super) fn new(offered: u64, queue_sizes: &[u16], vector_count: u16, lines: Arc<Lines>) -> Self {
        let queues = queue_sizes.iter().map(|size| QueueConfig::new(*size)).collect();
        Self {
            offered,
            accepted: 0,
            offered_select: 0,
            accepted_select: 0,
            queue_select: 0,
            vector_count,
            queues,
            lines,
        }
    }

    /// Features in effect once the driver has set FEATURES_OK.
    pub(super) fn features(&self) -> u64 {
        self.accepted
    }

    /// As after power-on.
    pub(super) fn reset(&mut self) {
        (self.accepted, self.offered_select, self.accepted_select, self.queue_select) = (0, 0, 0, 0);
        self.queues.iter_mut().for_each(|queue| *queue = QueueConfig::new(queue.max_size));
        self.lines.reset();
    }

    fn status(&self) -> u8 {
        self.lines.status.load(Ordering::SeqCst)
    }

    /// The driver reads; any width works.
    pub(in crate::virtio) fn read(&self, offset: u64, data: &mut [u8]) {
        read_image(&self.image(), offset, data);
    }

    /// The most entries that the selected queue can have; 0 if there is no such queue.
    pub(in crate::virtio) fn queue_max_size(&self) -> u16 {
        self.queues.get(usize::from(self.queue_select)).map_or(0, |queue| queue.max_size)
    }

    /// The driver has no more use for the selected queue, which PCI's registers cannot say. While the device works it
    /// takes a reset; the answer is whether it was possible.
    pub(in crate::virtio) fn disable_queue(&mut self) -> bool {
        let works = self.status() & DRIVER_OK != 0;
        match self.queues.get_mut(usize::from(self.queue_select)) {
            Some(queue) if !works || !queue.enabled => {
                queue.enabled = false;
                true
            }
            _ => false,
        }
    }

    /// All registers, as the selectors stand.
    fn image(&self) -> [u8; COMMON_LEN] {
        let mut image = [0; COMMON_LEN];
        let mut put = |at: u64, bytes: &[u8]| image[at as usize..][..bytes.len()].copy_from_slice(bytes);
        put(at::OFFERED_SELECT, &self.offered_select.to_le_bytes());
        put(at::OFFERED, &half(self.offered, self.offered_select).to_le_bytes());
        put(at::ACCEPTED_SELECT, &self.accepted_select.to_le_bytes());
        put(at::ACCEPTED, &half(self.accepted, self.accepted_select).to_le_bytes());
        put(at::CONFIG_VECTOR, &self.lines.config_vector.load(Ordering::SeqCst).to_le_bytes());
        put(at::QUEUE_COUNT, &(self.queues.len() as u16).to_le_bytes());
        put(at::STATUS, &[self.status(), self.lines.generation.load(Ordering::SeqCst)]);
        put(at::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // A queue that does not exist has size 0, and its other registers mean nothing.
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            let vector = &self.lines.queue_vectors[usize::from(self.queue_select)];
            put(at::QUEUE_SIZE, &queue.size.to_le_bytes());
            put(at::QUEUE_VECTOR, &vector.load(Ordering::SeqCst).to_le_bytes());
            put(at::QUEUE_ENABLED, &u16::from(queue.enabled).to_le_bytes());
            put(at::QUEUE_NOTIFY_OFFSET, &self.queue_select.to_le_bytes());
            put(at::DESCRIPTORS, &queue.descriptors.to_le_bytes());
            put(at::DRIVER, &queue.driver.to_le_bytes());
            put(at::DEVICE, &queue.device.to_le_bytes());
        }
        image
    }

    /// The driver writes. Fields are written whole, those of 64 bits also by halves.
    pub(in crate::virtio) fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match (offset, data) {
            (at::STATUS, &[status]) => self.write_status(status),
            (at::CONFIG_VECTOR | at::QUEUE_SELECT..at::DESCRIPTORS, &[a, b]) => {
                self.write_word(offset, u16::from_le_bytes([a, b]))
            }
            (at::OFFERED_SELECT | at::ACCEPTED_SELECT | at::ACCEPTED | at::DESCRIPTORS..QUEUE_END, &[a, b, c, d])
                if offset.is_multiple_of(4) =>
            {
                self.write_dword(offset, u32::from_le_bytes([a, b, c, d]))
            }
            (at::DESCRIPTORS | at::DRIVER | at::DEVICE, &[a, b, c, d, e, f, g, h]) => {
                match self.write_dword(offset, u32::from_le_bytes([a, b, c, d])) {
                    Effect::None => self.write_dword(offset + 4, u32::from_le_bytes([e, f, g, h])),
                    fault => fault,
                }
            }
            _ => Effect::Fault,
        }
    }

    fn write_dword(&mut self, offset: u64, value: u32) -> Effect {
        match offset {
            at::OFFERED_SELECT => self.offered_select = value,
            at::ACCEPTED_SELECT => self.accepted_select = value,
            at::ACCEPTED if self.status() & FEATURES_OK == 0 => {
                set_half(&mut self.accepted, self.accepted_select, value)
            }
            at::ACCEPTED => return Effect::Fault,
            _ => {
                let Some(queue) = self.configurable_queue() else { return Effect::Fault };
                let register = match offset & !7 {
                    at::DESCRIPTORS => &mut queue.descriptors,
                    at::DRIVER => &mut queue.driver,
                    _ => &mut queue.device,
                };
                set_half(register, u32::from(offset & 4 != 0), value);
            }
        }
        Effect::None
    }

    fn write_word(&mut self, offset: u64, value: u16) -> Effect {
        // What does not exist reads back as no vector, by which the driver learns of it.
        let vector = if value < self.vector_count { value } else { NO_VECTOR };
        match offset {
            at::CONFIG_VECTOR => self.lines.config_vector.store(vector, Ordering::SeqCst),
            at::QUEUE_SELECT => self.queue_select = value,
            at::QUEUE_VECTOR => match self.lines.queue_vectors.get(usize::from(self.queue_select)) {
                Some(register) => {
                    register.store(vector, Ordering::SeqCst);
                    if self.status() & DRIVER_OK != 0 {
                        return Effect::Vector(self.queue_select);
                    }
                }
                None => return Effect::Fault,
            },
            at::QUEUE_SIZE | at::QUEUE_ENABLED => {
                let Some(queue) = self.configurable_queue() else { return Effect::Fault };
                match (offset, value) {
                    (at::QUEUE_SIZE, size) if size.is_power_of_two() && size <= queue.max_size => queue.size = size,
                    (at::QUEUE_ENABLED, 1) => queue.enabled = true,
                    _ => return Effect::Fault,
                }
            }
            _ => return Effect::Fault,
        }
        Effect::None
    }

    /// The selected queue, while its registers may be changed.
    fn configurable_queue(&mut self) -> Option<&mut QueueConfig> {
        let free = self.status() & (FEATURES_OK | DRIVER_OK) == FEATURES_OK;
        self.queues.get_mut(usize::from(self.queue_select)).filter(|queue| free && !queue.enabled)
    }

    /// Virtio 1.2, 2.1 and 3.1.
    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let before = self.status();
        // Bits are only ever added; the one for a needed reset is the device's, whatever the driver writes for it.
        let mut added = value & !before & !NEEDS_RESET;
        if before & !value & !NEEDS_RESET != 0 {
            return Effect::Fault;
        }
        if added & FEATURES_OK != 0 && !self.features_acceptable() {
            added &= !FEATURES_OK;
        }
        if added & DRIVER_OK != 0 && (before | added) & FEATURES_OK == 0 {
            return Effect::Fault;
        }
        self.lines.status.fetch_or(added, Ordering::SeqCst);
        if added & DRIVER_OK != 0 { Effect::Activate } else { Effect::None }
    }

    fn features_acceptable(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & 1 << VIRTIO_F_VERSION_1 != 0
    }
}

/// The 32 bits of `value` that `select` chooses; there is nothing past the second half.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    match select {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}
