//! Disks and network interfaces that come and go while the VM runs. The faults begin with Firecracker's words.

use bedplate_api::vmm::{Drive, LogLevel, NetworkInterface};

use super::change::ONLY_VISIBLE;
use super::configure::warning_of_length;
use super::fault::Fault;
use super::session::Session;
use crate::config;
use crate::machine::{BuildError, DeviceError, Devices};

/// A device that is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unplug {
    /// By its `drive_id`.
    Drive(String),
    /// By its `iface_id`.
    NetworkInterface(String),
}

impl Unplug {
    /// What the machine calls it.
    fn name(&self) -> String {
        match self {
            Self::Drive(id) => Devices::name_of_disk(id),
            Self::NetworkInterface(id) => Devices::name_of_net(id),
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
        let configs: Vec<_> = drives.iter().map(config::disk).collect::<Result<_, _>>().map_err(Fault::bad_request)?;
        let pmems: Vec<_> =
            self.spec.pmem.iter().map(config::pmem).collect::<Result<_, _>>().map_err(Fault::bad_request)?;
        config::separate(&configs, &pmems).map_err(Fault::bad_request)?;
        let length = config.file().and_then(warning_of_length);
        let is_walled = self.sandbox.is_some();
        let machine = &mut self.running()?.machine;
        machine.plug_disk(&config).map_err(|error| fault_of_file(&error, is_walled))?;
        let warnings = machine.devices_mut().take_warnings();
        self.spec.drives = drives;
        length.into_iter().chain(warnings).for_each(|warning| self.log.write(LogLevel::Warning, &warning));
        self.log.write(LogLevel::Info, &format!("drive {:?} was plugged in", config.id()));
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
        let (is_there, is_root) = match device {
            Unplug::Drive(id) => {
                let drive = self.spec.drives.iter().find(|drive| drive.drive_id == *id);
                (drive.is_some(), drive.is_some_and(|drive| drive.is_root_device))
            }
            Unplug::NetworkInterface(id) => {
                (self.spec.network_interfaces.iter().any(|interface| interface.iface_id == *id), false)
            }
        };
        match (is_there, is_root, device) {
            (false, _, Unplug::Drive(id)) => {
                Err(Fault::bad_request(format!("Device not found: there is no drive {id:?}.")))
            }
            (false, _, Unplug::NetworkInterface(id)) => {
                Err(Fault::bad_request(format!("Device not found: there is no network interface {id:?}.")))
            }
            (true, true, _) => Err(Fault::bad_request("Cannot unplug root device: the guest runs from it.")),
            (true, false, _) => {
                self.running()?.machine.unplug(&device.name());
                Ok(())
            }
        }
    }

    /// Takes note of what the guest has let go of.
    pub(super) fn settle(&mut self) {
        let Some(vm) = &mut self.vm else { return };
        for name in vm.machine.settle() {
            self.spec.drives.retain(|drive| Devices::name_of_disk(&drive.drive_id) != name);
            self.spec.network_interfaces.retain(|interface| Devices::name_of_net(&interface.iface_id) != name);
            self.log.write(LogLevel::Info, &format!("the guest has let go of {name}"));
        }
    }

    fn in_use(&self, device: &Unplug, what: &str) -> Fault {
        let unplugging = self.vm.as_ref().is_some_and(|vm| vm.machine.is_unplugging(&device.name()));
        let (Unplug::Drive(id) | Unplug::NetworkInterface(id)) = device;
        Fault::bad_request(if unplugging {
            format!(
                "Device ID in use: the guest was asked to let go of {what} {id:?} and has not yet. Try again when it has"
            )
        } else {
            format!("Device ID in use: there is {what} {id:?} already. Give another one, or DELETE it first")
        })
    }
}

/// A file that is there may not be seen from inside of the sandbox.
fn fault_of_file(error: &BuildError, is_walled: bool) -> Fault {
    let is_about_file = matches!(
        error,
        BuildError::Device(DeviceError::Drive { .. } | DeviceError::ImageDisk { .. } | DeviceError::Path { .. })
    );
    Fault::bad_request(format!("{error}{}", if is_about_file && is_walled { ONLY_VISIBLE } else { "" }))
}
