//! Commands before the start: each changes the configuration, and is checked as far as it can be alone.

use std::io;
use std::path::Path;

use bedplate_api::vmm::{
    CpuConfigSource, Logger, MachineConfig, MachineConfigPatch, Metrics, MmdsConfig, SerialDevice,
};
use bedplate_devices::virtio::block::SECTOR;

use super::commands::Command;
use super::fault::Fault;
use super::session::{Session, StartError};
use crate::boot::Boot;
use crate::config::{self, DriveConfig};
use crate::console::{Console, Target};
use crate::files;

/// Bytes of a file with metadata, at most.
const MAX_METADATA_FILE: u64 = 16 << 20;

impl Session {
    pub(super) fn configure(&mut self, command: Command) -> Result<(), Fault> {
        let spec = &mut self.spec;
        match command {
            Command::SetBootSource(source) => {
                let boot = config::boot_source(&source, None).map_err(Fault::bad_request)?;
                try_boot(&boot)?;
                spec.boot_source = Some(source);
            }
            Command::SetMachine(machine) => return self.set_machine(machine),
            Command::PatchMachine(patch) => {
                let machine = patched(&spec.machine_config, &patch);
                return self.set_machine(machine);
            }
            Command::SetCpu(cpu) => {
                spec.cpu_config = Some(CpuConfigSource::Template(cpu));
                spec.machine_config.cpu_template = None;
            }
            Command::PutDrive(drive) => {
                let disk = config::disk(&drive).map_err(Fault::bad_request)?;
                if drive.is_root_device && spec.pmem.iter().any(|pmem| pmem.root_device) {
                    return Err(Fault::bad_request(config::PmemError::DriveBesideRoot));
                }
                let mut drives = spec.drives.clone();
                replace(&mut drives, drive, |drive| &drive.drive_id);
                config::root_device(&drives, &spec.pmem).map_err(Fault::bad_request)?;
                disk.file().map_or(Ok(()), try_drive)?;
                spec.drives = drives;
            }
            Command::PutNetworkInterface(interface) => {
                let net = config::net(&interface).map_err(Fault::bad_request)?;
                let is_elsewhere = net.vhost || interface.socket.is_some();
                if is_elsewhere && spec.mmds_config.iter().any(|mmds| mmds.network_interfaces.contains(&net.id)) {
                    return Err(Fault::bad_request(config::ConfigError::VhostMmds(net.id)));
                }
                let mut interfaces = spec.network_interfaces.clone();
                replace(&mut interfaces, interface, |interface| &interface.iface_id);
                config::apart(&interfaces).map_err(Fault::bad_request)?;
                spec.network_interfaces = interfaces;
            }
            Command::SetMmds(mmds) => {
                config::mmds_address(&mmds, &spec.network_interfaces).map_err(Fault::bad_request)?;
                self.set_mmds(&mmds);
                self.spec.mmds_config = Some(mmds);
            }
            Command::SetVsock(vsock) => {
                config::vsock(&vsock).map_err(Fault::bad_request)?;
                spec.vsock = Some(vsock);
            }
            Command::SetEntropy(entropy) => spec.entropy = Some(entropy),
            Command::SetSerial(serial) => {
                self.set_serial(&serial).map_err(Fault::bad_request)?;
                self.spec.serial = Some(serial);
            }
            Command::SetLogger(logger) => {
                self.set_logger(&logger).map_err(Fault::bad_request)?;
                // What it leaves out, but for the level, goes on as it was.
                let before = self.spec.logger.take().unwrap_or_default();
                self.spec.logger = Some(Logger {
                    log_path: logger.log_path.or(before.log_path),
                    level: logger.level,
                    show_level: logger.show_level.or(before.show_level),
                    show_log_origin: logger.show_log_origin.or(before.show_log_origin),
                    module: logger.module.or(before.module),
                });
            }
            Command::SetMetrics(metrics) => {
                self.set_metrics(&metrics).map_err(Fault::bad_request)?;
                self.spec.metrics = Some(metrics);
            }
            other => unreachable!("{other:?} is no configuration: execute() has its own arm for it"),
        }
        Ok(())
    }

    /// A name of a processor takes the place of a `cpu-config`, and the other way about. What names none leaves both.
    fn set_machine(&mut self, mut machine: MachineConfig) -> Result<(), Fault> {
        let names_processor = machine.cpu_template.is_some();
        machine.cpu_template = machine.cpu_template.or(self.spec.machine_config.cpu_template);
        config::machine(&machine).map_err(Fault::bad_request)?;
        if let Some(balloon) = &self.spec.balloon {
            config::room_for(balloon, machine.mem_size_mib).map_err(Fault::bad_request)?;
        }
        self.spec.machine_config = machine;
        if names_processor {
            self.spec.cpu_config = None;
        }
        Ok(())
    }

    /// Messages of the VMM go where `logger` says.
    ///
    /// # Errors
    /// There they cannot be written.
    pub fn set_logger(&mut self, logger: &Logger) -> Result<(), StartError> {
        let path = || logger.log_path.clone().unwrap_or_default();
        self.log.configure(logger).map_err(|source| StartError::File { what: "log_path", path: path(), source })
    }

    /// Counters go where `metrics` says.
    ///
    /// # Errors
    /// There they cannot be written.
    pub fn set_metrics(&mut self, metrics: &Metrics) -> Result<(), StartError> {
        let path = metrics.metrics_path.clone();
        let file = files::append_messages_to(path.as_ref()).map_err(|source| StartError::File {
            what: "metrics_path",
            path,
            source,
        })?;
        self.metrics = Some(file);
        self.spec.metrics = Some(metrics.clone());
        Ok(())
    }

    /// The guest's metadata are what a file says.
    ///
    /// # Errors
    /// It cannot be read, is not JSON, or too large.
    pub fn load_metadata(&mut self, path: &Path) -> Result<(), StartError> {
        let read = || -> io::Result<()> {
            // JSON may be written with spaces, which do not count.
            let text = files::read_all(path, MAX_METADATA_FILE)?;
            let data = serde_json::from_slice(&text)?;
            self.metadata.lock().put(data).map_err(io::Error::other)
        };
        read().map_err(|source| StartError::Metadata { path: path.into(), source })
    }

    /// How the guest's requests are answered; at which address and over which interfaces is the machine's to know.
    pub(super) fn set_mmds(&self, mmds: &MmdsConfig) {
        let mut store = self.metadata.lock();
        (store.version, store.imds_compat) = (mmds.version, mmds.imds_compat);
    }

    pub(super) fn set_serial(&mut self, serial: &SerialDevice) -> Result<(), StartError> {
        if let Some(path) = &serial.serial_out_path {
            let target = Target::File(path.into());
            match &mut self.console {
                // Its log stays.
                Some(console) => console.redirect(&target)?,
                None => self.console = Some(Console::open(&target, None)?),
            }
        }
        Ok(())
    }
}

/// What cannot be opened is refused when it is named, as Firecracker does, and not only at the start. The kernel's words are
/// Firecracker's.
fn try_boot(boot: &Boot) -> Result<(), Fault> {
    let parts = match boot {
        Boot::Kernel(kernel) => {
            vec![("The kernel file", Some(&kernel.kernel)), ("The initrd file", kernel.initrd.as_ref())]
        }
        Boot::Firmware(firmware) => vec![("The firmware", Some(firmware))],
    };
    for (what, path) in parts.into_iter().filter_map(|(what, path)| Some((what, path?))) {
        files::read_regular(path).map_err(|error| {
            Fault::bad_request(format!("Boot source error: {what} cannot be opened: {error}: {}", path.display()))
        })?;
    }
    Ok(())
}

/// Likewise.
fn try_drive(drive: &DriveConfig) -> Result<(), Fault> {
    files::try_disk(&drive.path, !drive.read_only).map_err(|error| {
        let (id, path) = (&drive.id, drive.path.display());
        Fault::bad_request(format!("Drive config error: drive {id:?} cannot be opened: {error}: {path}"))
    })
}

/// A disk has whole sectors; Firecracker accepts another file, too, and says so.
pub(super) fn warning_of_length(drive: &DriveConfig) -> Option<String> {
    let file = std::fs::metadata(&drive.path).ok().filter(|file| file.is_file())?;
    let (id, path, len) = (&drive.id, drive.path.display(), file.len());
    if len == 0 {
        return Some(format!(
            "drive {id:?}: {path} has 0 bytes; the guest sees a disk without sectors. Give the file a size"
        ));
    }
    let rest = len % SECTOR;
    (rest != 0).then(|| {
        format!(
            "drive {id:?}: {path} has {len} bytes, which is no multiple of {SECTOR}; the guest does not see the last \
             {rest} of them. Pad the file to whole sectors"
        )
    })
}

fn patched(machine: &MachineConfig, patch: &MachineConfigPatch) -> MachineConfig {
    MachineConfig {
        vcpu_count: patch.vcpu_count.unwrap_or(machine.vcpu_count),
        max_vcpu_count: patch.max_vcpu_count.or(machine.max_vcpu_count),
        mem_size_mib: patch.mem_size_mib.unwrap_or(machine.mem_size_mib),
        smt: patch.smt.unwrap_or(machine.smt),
        cpu_template: patch.cpu_template,
        cpu_baseline: patch.cpu_baseline.or(machine.cpu_baseline),
        track_dirty_pages: patch.track_dirty_pages.unwrap_or(machine.track_dirty_pages),
        huge_pages: patch.huge_pages.unwrap_or(machine.huge_pages),
    }
}

/// Puts `item` in the place of the one with the same id, or at the end.
pub(super) fn replace<T>(items: &mut Vec<T>, item: T, id: impl Fn(&T) -> &String) {
    match items.iter().position(|other| id(other) == id(&item)) {
        Some(at) => items[at] = item,
        None => items.push(item),
    }
}
