//! Devices that come and go while the guest runs.
//!
//! A device comes on the control thread: it is built as at the start ([`Attach`]), put into a free slot, and the guest is
//! told. It goes in two steps. Control asks the guest for it; the guest lets go of it whenever it likes, and the vCPU that
//! says so takes the device off the bus and stops it. Control is woken, and forgets it: with that its files are closed.
//!
//! The memory of a pmem device comes and goes with it: [`super::plug_pmem`].
//!
//! vCPUs can come and never go. The thread of one is there from the start and runs nothing until it comes ([`super::lifecycle`]).
//!
//! What the guest lets go of without being asked stays, and the guest is told that it is there: which devices a VM has is
//! its owner's to say. A guest that was asked twice may let go twice, the second time of a device that has come to the slot
//! since: it is told that this one is there, too.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bedplate_devices::Memory;
use bedplate_devices::host::TransportHost;
use bedplate_devices::pci::{PciRoot, Slot};
use bedplate_devices::platform::{EjectSink, HotplugSignals};
use vmm_sys_util::eventfd::EventFd;

use super::pci_devices::{Attach, When};
use super::taps::Taps;
use super::{BuildError, Devices, Machine};
use crate::config::{DiskConfig, NetConfig};
use crate::metadata::Metadata;

/// How long a vCPU may take to come. It comes at once; its thread may have to wait for a processor.
const VCPU_PATIENCE: Duration = Duration::from_secs(1);

/// What devices are built with, at the start and later, and which of them are to go.
pub(super) struct Plug {
    pub host: Arc<dyn TransportHost>,
    /// Those that may come included: a disk cannot get more queues later.
    pub vcpus: u8,
    pub metadata: Metadata,
    pub taps: Taps,
    pub signals: HotplugSignals,
    pub departures: Arc<Departures>,
}

impl Plug {
    /// To attach devices on `pci`, which `devices` will know.
    pub fn attach<'a>(
        &'a self,
        when: When,
        pci: &'a PciRoot,
        memory: &'a Memory,
        devices: &'a mut Devices,
    ) -> Attach<'a> {
        let host = Arc::clone(&self.host);
        let Self { vcpus, metadata, taps, .. } = self;
        Attach { when, pci, host, memory, vcpus: *vcpus, metadata, taps, files: &[], places: None, devices }
    }
}

/// Shared by control and the vCPUs. Lock order: before the signals', after the hot-plug port's.
pub(super) struct Departures {
    list: Mutex<List>,
    /// Signalled when a device has gone.
    gone: EventFd,
}

/// Devices by their names in [`super::Devices`]. Each is in one of these, or stays.
#[derive(Default)]
struct List {
    asked: BTreeMap<Slot, String>,
    /// The guest has let go of them, and a vCPU takes them off the bus.
    leaving: BTreeSet<String>,
    gone: Vec<String>,
}

impl List {
    /// The guest lets go of the device in `slot`: its name, if it was asked for.
    fn begin(&mut self, slot: Slot) -> Option<String> {
        let name = self.asked.remove(&slot)?;
        self.leaving.insert(name.clone());
        Some(name)
    }
}

impl Departures {
    /// None yet; `gone` is signalled when there is one.
    pub fn new(gone: EventFd) -> Self {
        Self { list: Mutex::default(), gone }
    }

    /// What a vCPU does when its guest lets go of a slot's device.
    pub fn sink(self: &Arc<Self>, pci: &PciRoot, signals: &HotplugSignals) -> EjectSink {
        let (departures, pci, signals) = (Arc::clone(self), pci.clone(), signals.clone());
        Box::new(move |slot| departures.eject(slot, &pci, &signals))
    }

    fn eject(&self, slot: Slot, pci: &PciRoot, signals: &HotplugSignals) {
        let Some(name) = self.lock().begin(slot) else {
            if pci.is_occupied(slot) {
                signals.came(slot);
            }
            return;
        };
        // Before the slot is free: what is told of it afterwards is told of another device.
        signals.gone(slot);
        // Can take as long as a reset of the device. Nothing is locked but the port, which is the guest's.
        pci.remove(slot);
        let mut list = self.lock();
        list.leaving.remove(&name);
        list.gone.push(name);
        // Fails only where 2^64 - 2 signals wait to be read.
        let _ = self.gone.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Machine {
    /// Puts a disk on the bus and tells the guest.
    ///
    /// # Errors
    /// It cannot be opened, or there is no room for it. The machine is as it was.
    pub fn plug_disk(&mut self, disk: &DiskConfig) -> Result<(), BuildError> {
        let slot = self.attach().disk(disk)?;
        self.plug.signals.came(slot);
        Ok(())
    }

    /// Puts a network interface on the bus and tells the guest.
    ///
    /// # Errors
    /// Its tap cannot be had, or there is no room for it. The machine is as it was.
    pub fn plug_net(&mut self, net: &NetConfig) -> Result<(), BuildError> {
        let slot = self.attach().net(net)?;
        self.plug.signals.came(slot);
        Ok(())
    }

    fn attach(&mut self) -> Attach<'_> {
        self.plug.attach(When::Running, &self.pci, &self.ram.memory, &mut self.devices)
    }

    /// Asks the guest for the device `name`, again if it was asked before. The guest may take its time, or never let go.
    pub fn unplug(&self, name: &str) {
        let Some(slot) = self.devices.slot(name) else { return };
        let mut list = self.plug.departures.lock();
        if list.leaving.contains(name) || list.gone.iter().any(|gone| gone == name) {
            return;
        }
        list.asked.insert(slot, name.into());
        self.plug.signals.wanted(slot);
    }

    /// The guest was asked for this device and has not let go of it yet.
    pub fn is_unplugging(&self, name: &str) -> bool {
        let list = self.plug.departures.lock();
        list.asked.values().chain(&list.leaving).chain(&list.gone).any(|departing| departing == name)
    }

    /// Has the first `count` vCPUs be there, and tells the guest; again, where they were there before. False where they do
    /// not come in time, or the machine has ended.
    pub fn plug_vcpus(&mut self, count: u8) -> bool {
        // Those that are there already may be busy, and are not asked.
        let have_come = self.life.plug(self.present.into()..count.into(), VCPU_PATIENCE);
        if have_come {
            self.plug.signals.vcpus_came(count);
            self.present = count;
        }
        have_come
    }

    /// Forgets the devices that the guest has let go of, and closes what they had open. Returns their names.
    pub fn settle(&mut self) -> Vec<String> {
        let gone = std::mem::take(&mut self.plug.departures.lock().gone);
        for name in &gone {
            self.devices.forget(name);
            self.release_pmem(name);
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use bedplate_devices::platform::IrqLine;
    use bedplate_devices::testing;
    use bedplate_devices::virtio::limiter::LimiterConfig;
    use bedplate_devices::virtio::pci::VirtioPciDevice;
    use bedplate_devices::virtio::rng::Rng;

    use super::*;

    /// Is up while the guest has something to be told.
    #[derive(Clone, Default)]
    struct Line(Arc<Mutex<bool>>);

    impl IrqLine for Line {
        fn set(&self, asserted: bool) {
            *self.0.lock().unwrap() = asserted;
        }
    }

    #[test]
    fn what_was_asked_for_goes_once_and_what_is_in_its_slot_then_stays() {
        let machine = testing::Machine::new();
        let gone = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let departures = Arc::new(Departures::new(gone.try_clone().unwrap()));
        let line = Line::default();
        let signals = HotplugSignals::new(Box::new(line.clone()), 1);
        let is_told = || *line.0.lock().unwrap();
        let lets_go = departures.sink(&machine.root, &signals);
        let device = || {
            let rng = Rng::new(LimiterConfig::NONE).unwrap();
            machine.add(VirtioPciDevice::new(rng, &machine.memory, &machine.transport_host()).unwrap())
        };

        let slot = device();
        lets_go(slot);
        assert!(machine.root.is_occupied(slot) && is_told(), "nobody has asked");
        signals.gone(slot);
        lets_go(Slot::new(0).unwrap());
        lets_go(Slot::new(9).unwrap());
        assert!(gone.read().is_err() && departures.lock().gone.is_empty());

        departures.lock().asked.insert(slot, "a".into());
        signals.wanted(slot);
        lets_go(slot);
        assert!(!machine.root.is_occupied(slot) && !is_told());
        assert_eq!((gone.read().unwrap(), std::mem::take(&mut departures.lock().gone)), (1, vec!["a".to_owned()]));
        lets_go(slot);
        assert!(!is_told(), "there is nothing to look at");
        assert_eq!(device(), slot);
        lets_go(slot);
        assert!(machine.root.is_occupied(slot) && is_told());
        assert!(gone.read().is_err() && departures.lock().leaving.is_empty());
    }
}
