//! Disks, network interfaces and files in the guest's address space that come and go while the VM runs. The faults begin
//! with Firecracker's words.

use bedplate_api::vmm::{Drive, LogLevel, NetworkInterface, Pmem};

use super::configure::warning_of_length;
use super::fault::Fault;
use super::session::Session;
use crate::config::{self, Held};
use crate::machine::Devices;

/// A device that is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unplug {
    /// By its `drive_id`.
    Drive(String),
    /// By its `iface_id`.
    NetworkInterface(String),
    /// By its `id`.
    Pmem(String),
}

impl Unplug {
    /// What the machine calls it.
    fn name(&self) -> String {
        match self {
            Self::Drive(id) => Devices::name_of_disk(id),
            Self::NetworkInterface(id) => Devices::name_of_net(id),
            Self::Pmem(id) => Devices::name_of_pmem(id),
        }
    }

    fn id(&self) -> &str {
        let (Self::Drive(id) | Self::NetworkInterface(id) | Self::Pmem(id)) = self;
        id
    }

    /// Its kind, in words for people.
    const fn kind(&self) -> &'static str {
        match self {
            Self::Drive(_) => "drive",
            Self::NetworkInterface(_) => "network interface",
            Self::Pmem(_) => "pmem device",
        }
    }
}

impl Session {
    pub(super) fn plug_drive(&mut self, drive: Drive) -> Result<(), Fault> {
        let config = config::disk(&drive).map_err(Fault::bad_request)?;
        if self.spec.drives.iter().any(|other| other.drive_id == drive.drive_id) {
            return Err(self.in_use(&Unplug::Drive(drive.drive_id), "drive_id"));
        }
        if drive.is_root_device {
            return Err(Fault::bad_request(
                "A root block device already exists, or the guest does without: a VM that runs takes no other. Leave \
                 is_root_device out",
            ));
        }
        let mut drives = self.spec.drives.clone();
        drives.push(drive);
        let held = self.separate(&drives, &self.spec.pmem, (false, config.id()))?;
        let length = config.file().and_then(warning_of_length);
        let machine = &mut self.running()?.machine;
        let plugged = machine.plug_disk(&config);
        let warnings = machine.devices_mut().take_warnings();
        plugged.map_err(|error| self.fault_of_file(&error))?;
        (self.spec.drives, self.held) = (drives, held);
        self.warn(length.into_iter().chain(warnings));
        self.log.write(LogLevel::Info, &format!("drive {:?} was plugged in", config.id()));
        Ok(())
    }

    pub(super) fn plug_pmem(&mut self, pmem: Pmem) -> Result<(), Fault> {
        let config = config::pmem(&pmem).map_err(Fault::bad_request)?;
        if self.spec.pmem.iter().any(|other| other.id == pmem.id) {
            return Err(self.in_use(&Unplug::Pmem(pmem.id), "pmem id"));
        }
        if pmem.root_device {
            return Err(Fault::bad_request(
                "Pmem config error: Attempt to add pmem as a root device to a VM that runs. Leave root_device out",
            ));
        }
        let mut pmems = self.spec.pmem.clone();
        pmems.push(pmem);
        let held = self.separate(&self.spec.drives, &pmems, (true, &config.id))?;
        let machine = &mut self.running()?.machine;
        let plugged = machine.plug_pmem(&config);
        let warnings = machine.devices_mut().take_warnings();
        self.warn(warnings);
        plugged.map_err(|error| self.fault_of_file(&error))?;
        (self.spec.pmem, self.held) = (pmems, held);
        self.log.write(LogLevel::Info, &format!("pmem device {:?} was plugged in", config.id));
        Ok(())
    }

    pub(super) fn plug_net(&mut self, interface: NetworkInterface) -> Result<(), Fault> {
        config::net(&interface).map_err(Fault::bad_request)?;
        if self.spec.network_interfaces.iter().any(|other| other.iface_id == interface.iface_id) {
            return Err(self.in_use(&Unplug::NetworkInterface(interface.iface_id), "iface_id"));
        }
        let mut spec = self.spec.clone();
        spec.network_interfaces.push(interface);
        let mut configs = config::nets(&spec).map_err(Fault::bad_request)?;
        let Some(config) = configs.pop() else { unreachable!("one was pushed") };
        self.running()?.machine.plug_net(&config).map_err(Fault::bad_request)?;
        self.spec = spec;
        self.log.write(LogLevel::Info, &format!("network interface {:?} was plugged in", config.id));
        Ok(())
    }

    /// Asks the guest to let go of a device; done when it has.
    pub(super) fn unplug(&mut self, device: &Unplug) -> Result<(), Fault> {
        // Whether it is the root device, if it is there.
        let root = match device {
            Unplug::Drive(id) => {
                self.spec.drives.iter().find(|drive| drive.drive_id == *id).map(|drive| drive.is_root_device)
            }
            Unplug::NetworkInterface(id) => {
                self.spec.network_interfaces.iter().any(|interface| interface.iface_id == *id).then_some(false)
            }
            Unplug::Pmem(id) => self.spec.pmem.iter().find(|pmem| pmem.id == *id).map(|pmem| pmem.root_device),
        };
        match root {
            None => {
                let (kind, id) = (device.kind(), device.id());
                Err(Fault::bad_request(format!("Device not found: there is no {kind} {id:?}.")))
            }
            Some(true) => Err(Fault::bad_request("Cannot unplug root device: the guest runs from it.")),
            Some(false) => {
                self.running()?.machine.unplug(&device.name());
                Ok(())
            }
        }
    }

    /// Takes note of what the guest has let go of.
    pub(super) fn settle(&mut self) {
        let Some(vm) = &mut self.vm else { return };
        let (gone, warnings) = (vm.machine.settle(), vm.machine.devices_mut().take_warnings());
        for name in gone {
            self.spec.drives.retain(|drive| Devices::name_of_disk(&drive.drive_id) != name);
            self.spec.network_interfaces.retain(|interface| Devices::name_of_net(&interface.iface_id) != name);
            self.spec.pmem.retain(|pmem| Devices::name_of_pmem(&pmem.id) != name);
            self.log.write(LogLevel::Info, &format!("the guest has let go of {name}"));
        }
        self.warn(warnings);
    }

    fn in_use(&self, device: &Unplug, what: &str) -> Fault {
        let unplugging = self.vm.as_ref().is_some_and(|vm| vm.machine.is_unplugging(&device.name()));
        let id = device.id();
        Fault::bad_request(if unplugging {
            format!(
                "Device ID in use: the guest was asked to let go of {what} {id:?} and has not yet. Try again when it has"
            )
        } else {
            format!("Device ID in use: there is {what} {id:?} already. Give another one, or DELETE it first")
        })
    }

    /// No file is changed by two devices, of which one (a pmem device or not, its id) is to get another file: what all of them
    /// have then.
    pub(super) fn separate(&self, drives: &[Drive], pmems: &[Pmem], other: (bool, &str)) -> Result<Held, Fault> {
        let mut held = self.held.clone();
        held.forget(other.0, other.1);
        let drives: Vec<_> = drives.iter().map(config::disk).collect::<Result<_, _>>().map_err(Fault::bad_request)?;
        let pmems: Vec<_> = pmems.iter().map(config::pmem).collect::<Result<_, _>>().map_err(Fault::bad_request)?;
        config::separate(&drives, &pmems, &held).map_err(Fault::bad_request)
    }
}
