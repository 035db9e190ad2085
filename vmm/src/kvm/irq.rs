//! Interrupts into the guest and notifies out of it: GSI routing, irqfds, ioeventfds.
//!
//! GSIs 0 to 23 are the pins of the I/O APIC (and, below 16, of the two PICs), of which two are INTA# of the PCI devices in
//! turn; each MSI vector has one above those.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use bedplate_devices::host::{Doorbell, MsiVector, Pin, TransportHost};
use bedplate_devices::pci::{SLOTS, Slot};
use bedplate_devices::platform::IrqLine;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi, kvm_irqchip,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{KvmError, call};

/// Pins of the I/O APIC.
const PINS: u32 = 24;
/// Of them, those of PCI devices: pins of the second PIC, too, for a guest that knows nothing else.
pub const INTX_PINS: [u32; 2] = [10, 11];
/// KVM's own limit on routes.
const MAX_GSI: u32 = 4096 - 1;

/// The pin that is INTA# of the device in `slot`; devices share it.
fn intx_pin(slot: Slot) -> u32 {
    INTX_PINS[intx_index(slot)]
}

fn intx_index(slot: Slot) -> usize {
    usize::from(slot.number()) % INTX_PINS.len()
}

/// All slots of devices, each with its pin.
pub fn intx_pins() -> impl Iterator<Item = (Slot, u32)> {
    (1..SLOTS).filter_map(Slot::new).map(|slot| (slot, intx_pin(slot)))
}

/// Message address and data.
type Message = (u64, u32);

/// The interrupt routes of one VM. A handle: clones share them.
#[derive(Clone)]
pub struct Interrupts {
    routes: Arc<Routes>,
}

struct Routes {
    fd: Arc<VmFd>,
    /// Every MSI vector that exists, with where it goes, if anywhere. Held while the whole table is handed to KVM, so
    /// that tables arrive in the order in which they were made.
    table: Mutex<BTreeMap<u32, Option<Message>>>,
    /// For each of [`INTX_PINS`] the slots that assert it, a bit for each. Held while the pin changes, so that changes arrive in
    /// their order.
    intx: [Mutex<u32>; INTX_PINS.len()],
}

impl Routes {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Option<Message>>> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Makes `table` what KVM goes by.
    fn install(&self, table: &BTreeMap<u32, Option<Message>>) -> io::Result<()> {
        let messages = table.iter().filter_map(|(gsi, message)| message.map(|m| message_entry(*gsi, m)));
        let entries: Vec<_> = pin_entries().chain(messages).collect();
        let routing = KvmIrqRouting::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        self.fd.set_gsi_routing(&routing).map_err(errno)
    }
}

impl Interrupts {
    pub(super) fn new(fd: Arc<VmFd>) -> Result<Self, KvmError> {
        as_firmware_leaves_it(&fd).map_err(call("set the pins of the interrupt controllers"))?;
        let routes = Routes { fd, table: Mutex::default(), intx: Default::default() };
        routes.install(&routes.lock()).map_err(|source| KvmError::Call { what: "route interrupts", source })?;
        Ok(Self { routes: Arc::new(routes) })
    }

    /// An irqfd on pin `gsi`: a signal is an edge.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn edge(&self, gsi: u32) -> Result<EventFd, KvmError> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|source| KvmError::Call { what: "create an event descriptor", source })?;
        self.routes.fd.register_irqfd(&event, gsi).map_err(call("attach an irqfd"))?;
        Ok(event)
    }

    /// Pin `gsi` as a level. For what happens seldom: each change is a system call.
    pub fn level(&self, gsi: u32) -> Box<dyn IrqLine> {
        Box::new(Level { fd: Arc::clone(&self.routes.fd), gsi })
    }
}

struct Level {
    fd: Arc<VmFd>,
    gsi: u32,
}

impl IrqLine for Level {
    fn set(&self, asserted: bool) {
        // Cannot fail: the pin exists from the VM's creation on.
        let _ = self.fd.set_irq_line(self.gsi, asserted);
    }
}

/// What a slot does to the pin that it shares.
struct Shared {
    routes: Arc<Routes>,
    slot: Slot,
}

/// Takes note in a pin's `slots` of what `slot` does; the level of the pin, if that changes.
fn share(slots: &mut u32, slot: Slot, asserted: bool) -> Option<bool> {
    let (before, bit) = (*slots != 0, 1 << slot.number());
    *slots = if asserted { *slots | bit } else { *slots & !bit };
    let after = *slots != 0;
    (before != after).then_some(after)
}

impl IrqLine for Shared {
    fn set(&self, asserted: bool) {
        let mut slots = self.routes.intx[intx_index(self.slot)].lock().unwrap_or_else(|e| e.into_inner());
        if let Some(level) = share(&mut slots, self.slot, asserted) {
            // Cannot fail: the pin exists from the VM's creation on.
            let _ = self.routes.fd.set_irq_line(intx_pin(self.slot), level);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.set(false);
    }
}

/// The machine hands this to its virtio devices.
impl TransportHost for Interrupts {
    fn msi_vector(&self) -> io::Result<Box<dyn MsiVector>> {
        let trigger = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let mut table = self.routes.lock();
        let free = (PINS..=MAX_GSI).find(|gsi| !table.contains_key(gsi));
        let gsi = free.ok_or_else(|| io::Error::other(KvmError::NoGsi(MAX_GSI)))?;
        table.insert(gsi, None);
        drop(table);
        Ok(Box::new(Vector { routes: Arc::clone(&self.routes), gsi, trigger }))
    }

    fn pin(&self, gsi: u32) -> io::Result<Box<dyn Pin>> {
        let trigger = self.edge(gsi).map_err(io::Error::other)?;
        Ok(Box::new(Edge { fd: Arc::clone(&self.routes.fd), gsi, trigger }))
    }

    fn intx(&self, slot: Slot) -> (u8, Box<dyn IrqLine>) {
        (intx_pin(slot) as u8, Box::new(Shared { routes: Arc::clone(&self.routes), slot }))
    }

    fn add_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> io::Result<()> {
        let vm = &self.routes.fd;
        let result = match doorbell {
            Doorbell::Port(port) => vm.register_ioevent(event, &IoEventAddress::Pio(port.into()), NoDatamatch),
            Doorbell::Register { address, value } => vm.register_ioevent(event, &IoEventAddress::Mmio(address), value),
        };
        result.map_err(errno)
    }

    fn remove_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> io::Result<()> {
        let vm = &self.routes.fd;
        let result = match doorbell {
            Doorbell::Port(port) => vm.unregister_ioevent(event, &IoEventAddress::Pio(port.into()), NoDatamatch),
            Doorbell::Register { address, value } => {
                vm.unregister_ioevent(event, &IoEventAddress::Mmio(address), value)
            }
        };
        result.map_err(errno)
    }
}

/// One irqfd on a pin.
struct Edge {
    fd: Arc<VmFd>,
    gsi: u32,
    trigger: EventFd,
}

impl Pin for Edge {
    fn trigger(&self) -> &EventFd {
        &self.trigger
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        // Refused only by a VM that is being torn down.
        let _ = self.fd.unregister_irqfd(&self.trigger, self.gsi);
    }
}

/// One MSI vector: an irqfd while it is routed.
struct Vector {
    routes: Arc<Routes>,
    gsi: u32,
    trigger: EventFd,
}

impl MsiVector for Vector {
    fn trigger(&self) -> &EventFd {
        &self.trigger
    }

    fn route(&self, address: u64, data: u32) -> io::Result<()> {
        let mut table = self.routes.lock();
        let before = table.insert(self.gsi, Some((address, data))).flatten();
        if before == Some((address, data)) {
            return Ok(());
        }
        let mut result = self.routes.install(&table);
        if result.is_ok() && before.is_none() {
            result = self.routes.fd.register_irqfd(&self.trigger, self.gsi).map_err(errno);
        }
        if result.is_err() {
            table.insert(self.gsi, before);
        }
        result
    }

    fn unroute(&self) -> io::Result<()> {
        let mut table = self.routes.lock();
        if table.get(&self.gsi).copied().flatten().is_none() {
            return Ok(());
        }
        // Without its irqfd the vector is silent; the route itself may stay in KVM until the next change.
        self.routes.fd.unregister_irqfd(&self.trigger, self.gsi).map_err(errno)?;
        table.insert(self.gsi, None);
        Ok(())
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        // Refused only by a VM that is being torn down.
        let _ = self.unroute();
        self.routes.lock().remove(&self.gsi);
    }
}

/// The pins as firmware leaves them. In the PIC those of PCI are levels (ELCR), for a kernel that goes by that alone. In the I/O
/// APIC the first one is the PICs' (ExtINT), and all others have a mode, which is firmware's (SMI), and are masked: Linux
/// looks through all pins for the PICs', and clears each one but those of firmware first, in twelve exits in the place of four.
fn as_firmware_leaves_it(fd: &VmFd) -> Result<(), kvm_ioctls::Error> {
    const SMI: u64 = 0b010 << 8;
    const EXT_INT: u64 = 0b111 << 8;
    const MASKED: u64 = 1 << 16;
    let state = |chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        fd.get_irqchip(&mut chip).map(|()| chip)
    };
    let mut chip = state(KVM_IRQCHIP_PIC_SLAVE)?;
    // SAFETY: for this `chip_id` KVM fills, and reads, this part of the union.
    let pic = unsafe { &mut chip.chip.pic };
    pic.elcr |= INTX_PINS.iter().fold(0, |bits, pin| bits | 1 << (pin - 8));
    fd.set_irqchip(&chip)?;
    let mut chip = state(KVM_IRQCHIP_IOAPIC)?;
    // SAFETY: as above.
    let io_apic = unsafe { &mut chip.chip.ioapic };
    for (pin, entry) in io_apic.redirtbl.iter_mut().enumerate() {
        entry.bits = if pin == 0 { EXT_INT } else { SMI | MASKED };
    }
    fd.set_irqchip(&chip)
}

fn errno(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

fn pin_entries() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pin = |gsi, irqchip, pin| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..Default::default()
    };
    let master = (0..8).map(move |gsi| pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi));
    let slave = (8..16).map(move |gsi| pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8));
    let apic = (0..PINS).map(move |gsi| pin(gsi, KVM_IRQCHIP_IOAPIC, gsi));
    master.chain(slave).chain(apic)
}

fn message_entry(gsi: u32, (address, data): Message) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        // Truncation splits the address in two.
        address_lo: address as u32,
        address_hi: (address >> 32) as u32,
        data,
        ..Default::default()
    };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_is_high_as_long_as_a_slot_of_it_asserts_it() {
        let slot = |number| Slot::new(number).unwrap();
        assert_eq!([1, 2, 3, 31].map(|number| intx_pin(slot(number))), [11, 10, 11, 11]);
        let mut pins = [0; INTX_PINS.len()];
        let mut set = |number, asserted| share(&mut pins[intx_index(slot(number))], slot(number), asserted);
        assert_eq!([set(1, true), set(1, true), set(3, true), set(2, true)], [Some(true), None, None, Some(true)]);
        assert_eq!([set(1, false), set(1, false), set(2, false)], [None, None, Some(false)]);
        assert_eq!([set(31, true), set(3, false), set(31, false)], [None, None, Some(false)]);
    }
}
