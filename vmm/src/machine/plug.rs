//! Devices that come and go while the guest runs.
//!
//! A device comes on the control thread: it is built as at the start ([`Attach`]), put into a free slot, and the guest is told.
//! It goes in two steps. Control asks the guest for it; the guest lets go of it whenever it likes, and its vCPU, which says
//! so, takes the device off the bus and stops it. Control is woken, and forgets it: with that its files are closed.
//!
//! What the guest lets go of without being asked stays, and the guest is told that it is there: which devices a VM has is its
//! owner's to say. That also gives back what the guest let go of twice, when the slot had another device by then.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use bedplate_devices::host::PciHost;
use bedplate_devices::pci::{PciRoot, Slot};
use bedplate_devices::platform::{EjectSink, HotplugSignals};
use vmm_sys_util::eventfd::EventFd;

use super::pci_devices::{Attach, When};
use super::taps::Taps;
use super::{BuildError, Machine};
use crate::config::{DriveConfig, NetConfig};
use crate::metadata::Metadata;

/// What is left over from the start for devices that come later, and who is on his way out.
pub(super) struct Plug {
    pub host: Arc<dyn PciHost>,
    pub vcpus: u8,
    pub metadata: Metadata,
    pub taps: Taps,
    pub signals: HotplugSignals,
    pub departures: Arc<Departures>,
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
    pub fn plug_drive(&mut self, drive: &DriveConfig) -> Result<(), BuildError> {
        let slot = self.attach().drive(drive)?;
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
        Attach {
            when: When::Running,
            pci: &self.pci,
            host: Arc::clone(&self.plug.host),
            memory: &self.ram.memory,
            vcpus: self.plug.vcpus,
            metadata: &self.plug.metadata,
            taps: &self.plug.taps,
            devices: &mut self.devices,
        }
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

    /// Forgets the devices that the guest has let go of, and closes what they had open. Returns their names.
    pub fn settle(&mut self) -> Vec<String> {
        let gone = std::mem::take(&mut self.plug.departures.lock().gone);
        gone.iter().for_each(|name| self.devices.forget(name));
        gone
    }
}
