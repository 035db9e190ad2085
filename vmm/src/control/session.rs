//! What a VM process knows: a configuration that is being put together, then a machine that runs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use bedplate_api::vmm::{
    ActionType, Exit, ExitCounts, ExitReason, InstanceInfo, LogLevel, Logger, MachineConfig, MachineConfigPatch,
    Metrics, RunState, SerialDevice, Status, TargetState, Version, VmConfig,
};
use bedplate_devices::virtio::block::SECTOR;
use bedplate_images::disk::Disk;
use serde::Serialize;
use vmm_sys_util::eventfd::EventFd;

use super::commands::{Answer, Command};
use super::fault::Fault;
use super::log::Log;
use super::signals::Signal;
use crate::config::{self, Config, ConfigError, DriveConfig};
use crate::console::{Console, ConsoleError, Serving, Target};
use crate::files;
use crate::machine::{BuildError, Machine, builder};
use crate::sandbox::{self, Access, Sandbox};

const NAME: &str = "Bedplate";
const VERSION: &str = env!("CARGO_PKG_VERSION");
const AFTER_START: &str = "The requested operation is not supported after starting the microVM.";
const BEFORE_START: &str = "The requested operation is not supported before starting the microVM.";

/// Why the VM did not start.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Console(#[from] ConsoleError),
    #[error("{what} {path}: {source}; {}", files::remedy(.source))]
    File { what: &'static str, path: String, source: io::Error },
    #[error("the host cannot give what the process needs: {0}")]
    Host(#[from] io::Error),
}

/// The process's state, owned by the control thread.
pub struct Session {
    id: String,
    pub(super) spec: VmConfig,
    /// Until the start.
    console: Option<Console>,
    vm: Option<Running>,
    log: Log,
    metrics: Option<File>,
    /// What the process goes into at the start, with what must stay visible whatever the VM is; none if a person wants
    /// none.
    sandbox: Option<Sandbox>,
    leave: EventFd,
    ended: EventFd,
    /// Set where the process shall end without a VM.
    early_exit: Option<Exit>,
}

/// Dropped in this order: the console delivers the last output of a machine that runs no more.
pub(super) struct Running {
    pub(super) machine: Machine,
    paused: bool,
    _console: Serving,
}

impl Session {
    /// A process without a VM. `console` is where the guest's serial port will go, `sandbox` what the process goes into
    /// with the VM.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(id: String, console: Console, sandbox: Option<Sandbox>) -> io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Self {
            id,
            spec: VmConfig::default(),
            console: Some(console),
            vm: None,
            log: Log::default(),
            metrics: None,
            sandbox,
            leave: event()?,
            ended: event()?,
            early_exit: None,
        })
    }

    /// Takes over all of `spec` and starts it.
    ///
    /// # Errors
    /// It cannot be built here; the message is for a person.
    pub fn start_with(&mut self, spec: VmConfig) -> Result<(), StartError> {
        if let Some(logger) = &spec.logger {
            self.set_logger(logger)?;
        }
        if let Some(metrics) = &spec.metrics {
            self.set_metrics(metrics)?;
        }
        if let Some(serial) = &spec.serial {
            self.set_serial(serial)?;
        }
        self.spec = spec;
        self.start()
    }

    fn start(&mut self) -> Result<(), StartError> {
        let config = config::validate(&self.spec)?;
        config::separate(&config.drives)?;
        let console = match self.console.take() {
            Some(console) => console,
            None => Console::open(&Target::Off, None)?,
        };
        let sandbox = self.sandbox.clone().map(|sandbox| around(sandbox, &config));
        let machine = match builder::start(&config, Box::new(console.sink()), &self.ended, sandbox.as_ref()) {
            Ok(machine) => machine,
            Err(error) => {
                // To be tried again after a correction.
                self.console = Some(console);
                return Err(error.into());
            }
        };
        for drive in &config.drives {
            self.warn_of_length(drive);
        }
        for warning in machine.devices().warnings() {
            self.log.write(LogLevel::Warning, warning);
        }
        let console = console.serve(machine.serial(), &self.leave)?;
        sandbox::narrow(sandbox::Thread::Control);
        self.vm = Some(Running { machine, paused: false, _console: console });
        self.log.write(LogLevel::Info, "the VM runs");
        Ok(())
    }

    /// A disk has whole sectors; Firecracker accepts such a file, too, and says so.
    fn warn_of_length(&mut self, drive: &DriveConfig) {
        let Some(file) = std::fs::metadata(&drive.path).ok().filter(|file| file.is_file()) else { return };
        let (id, path, len) = (&drive.id, drive.path.display(), file.len());
        let message = if len == 0 {
            format!("drive {id:?}: {path} has 0 bytes; the guest sees a disk without sectors. Give the file a size")
        } else if !len.is_multiple_of(SECTOR) {
            format!(
                "drive {id:?}: {path} has {len} bytes, which is no multiple of {SECTOR}; the guest does not see the \
                 last {} of them. Pad the file to whole sectors",
                len % SECTOR
            )
        } else {
            return;
        };
        self.log.write(LogLevel::Warning, &message);
    }

    pub(super) const fn leave(&self) -> &EventFd {
        &self.leave
    }

    pub(super) const fn ended(&self) -> &EventFd {
        &self.ended
    }

    /// How it all ended, once: then there is no machine any more.
    pub(super) fn take_exit(&mut self) -> Option<Exit> {
        if let Some(exit) = self.early_exit.take() {
            return Some(exit);
        }
        let exit = self.vm.as_ref()?.machine.exit()?.clone();
        if let Err(error) = self.flush_metrics() {
            self.log.write(LogLevel::Warning, &error.message);
        }
        self.vm = None;
        self.log.write(LogLevel::Info, &format!("the VM has ended: {}", exit.detail));
        Some(exit)
    }

    pub(super) fn signal(&mut self, signal: Signal) {
        match (signal, &self.vm) {
            (Signal::PowerButton, Some(vm)) => {
                vm.machine.press_power_button();
                self.log.write(LogLevel::Info, "SIGTERM: pressed the power button");
            }
            (Signal::PowerButton, None) => self.stop("SIGTERM before the start"),
            (Signal::Stop, _) => self.stop("stopped by a signal"),
        }
    }

    pub(super) fn stop(&mut self, detail: &str) {
        match &self.vm {
            Some(vm) => vm.machine.stop(detail),
            None => self.early_exit = Some(Exit { reason: ExitReason::Stopped, detail: detail.into() }),
        }
    }

    /// Does what was asked.
    pub(super) fn execute(&mut self, command: Command) -> Result<Answer, Fault> {
        match command {
            Command::DescribeInstance => Ok(Answer::Instance(InstanceInfo {
                app_name: NAME.into(),
                id: self.id.clone(),
                state: self.state(),
                vmm_version: VERSION.into(),
            })),
            Command::DescribeVersion => Ok(Answer::Version(Version { firecracker_version: VERSION.into() })),
            Command::DescribeConfig => Ok(Answer::Config(Box::new(self.spec.clone()))),
            Command::DescribeMachine => Ok(Answer::Machine(self.spec.machine_config.clone())),
            Command::DescribeStatus => Ok(Answer::Status(self.status())),
            Command::Stop => {
                self.stop("stopped through the API");
                Ok(Answer::Done)
            }
            Command::Act(ActionType::InstanceStart) => {
                self.before_start()?.start().map_err(Fault::bad_request).map(done)
            }
            Command::Act(ActionType::FlushMetrics) => {
                self.running()?;
                self.flush_metrics().map(done)
            }
            Command::Act(ActionType::SendCtrlAltDel) | Command::PressPowerButton => {
                self.running()?.machine.press_power_button();
                Ok(Answer::Done)
            }
            Command::Balloon(command) => self.execute_balloon(command),
            Command::Hotplug(command) => self.execute_hotplug(command),
            Command::ChangeState(target) => self.running()?.change_state(target).map(done),
            configuring => self.before_start()?.configure(configuring).map(done),
        }
    }

    pub(super) fn before_start(&mut self) -> Result<&mut Self, Fault> {
        if self.vm.is_some() { Err(Fault::bad_request(AFTER_START)) } else { Ok(self) }
    }

    pub(super) fn running(&mut self) -> Result<&mut Running, Fault> {
        self.vm.as_mut().ok_or_else(|| Fault::bad_request(BEFORE_START))
    }

    /// The commands that only change the configuration. Each is checked as far as it can be alone.
    fn configure(&mut self, command: Command) -> Result<(), Fault> {
        let spec = &mut self.spec;
        match command {
            Command::SetBootSource(source) => spec.boot_source = Some(source),
            Command::SetMachine(machine) => return self.set_machine(machine),
            Command::PatchMachine(patch) => {
                let machine = patched(&spec.machine_config, &patch);
                return self.set_machine(machine);
            }
            Command::PutDrive(drive) => {
                config::drive(&drive).map_err(Fault::bad_request)?;
                replace(&mut spec.drives, drive, |drive| &drive.drive_id);
            }
            Command::PutNetworkInterface(interface) => {
                config::net(&interface).map_err(Fault::bad_request)?;
                replace(&mut spec.network_interfaces, interface, |interface| &interface.iface_id);
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
                self.spec.logger = Some(logger);
            }
            Command::SetMetrics(metrics) => {
                self.set_metrics(&metrics).map_err(Fault::bad_request)?;
                self.spec.metrics = Some(metrics);
            }
            other => unreachable!("{other:?} is no configuration: execute() has its own arm for it"),
        }
        Ok(())
    }

    fn set_machine(&mut self, machine: MachineConfig) -> Result<(), Fault> {
        config::machine(&machine).map_err(Fault::bad_request)?;
        self.spec.machine_config = machine;
        Ok(())
    }

    fn set_logger(&mut self, logger: &Logger) -> Result<(), StartError> {
        let path = || logger.log_path.clone().unwrap_or_default();
        self.log = Log::open(logger).map_err(|source| StartError::File { what: "log_path", path: path(), source })?;
        Ok(())
    }

    fn set_metrics(&mut self, metrics: &Metrics) -> Result<(), StartError> {
        let path = metrics.metrics_path.clone();
        let file = files::append_to(path.as_ref()).map_err(|source| StartError::File {
            what: "metrics_path",
            path,
            source,
        })?;
        self.metrics = Some(file);
        Ok(())
    }

    fn set_serial(&mut self, serial: &SerialDevice) -> Result<(), StartError> {
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

    fn flush_metrics(&mut self) -> Result<(), Fault> {
        let status = self.status();
        let Some(file) = &mut self.metrics else { return Ok(()) };
        let mut line = serde_json::to_vec(&Line::new(&status)).map_err(Fault::bad_request)?;
        line.push(b'\n');
        file.write_all(&line).map_err(|error| Fault::bad_request(format!("metrics cannot be written: {error}")))
    }

    fn state(&self) -> RunState {
        match &self.vm {
            None => RunState::NotStarted,
            Some(vm) if vm.paused => RunState::Paused,
            Some(_) => RunState::Running,
        }
    }

    fn status(&self) -> Status {
        Status {
            id: self.id.clone(),
            state: self.state(),
            pid: std::process::id(),
            uptime_seconds: self.vm.as_ref().map_or(0, |vm| vm.machine.uptime().as_secs()),
            exits: self.vm.as_ref().map_or(ExitCounts::default(), |vm| vm.machine.exits()),
            devices: self.vm.as_ref().map(|vm| vm.machine.devices().status()).unwrap_or_default(),
        }
    }
}

impl Running {
    fn change_state(&mut self, target: TargetState) -> Result<(), Fault> {
        self.paused = match target {
            TargetState::Paused => self.machine.pause(),
            TargetState::Resumed => {
                self.machine.resume();
                false
            }
        };
        Ok(())
    }
}

/// What this VM uses by name while it runs.
fn around(mut sandbox: Sandbox, config: &Config) -> Sandbox {
    for drive in &config.drives {
        let dir = Path::new(&drive.path);
        // A copy-on-write disk reads its image's chunks as the guest asks for them; a raw file is open already. One that
        // cannot be read is the builder's to complain about.
        if let Ok(spec) = Disk::spec_of(dir) {
            sandbox.keep(dir, Access::Write);
            sandbox.keep(&spec.store, Access::Read);
        }
    }
    if let Some(vsock) = &config.vsock {
        sandbox.keep_place_of(&vsock.path);
    }
    sandbox
}

/// A line of metrics: the status, and what devices count also where Firecracker's readers look for it.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    status: &'a Status,
    #[serde(flatten)]
    devices: BTreeMap<&'a str, BTreeMap<&'a str, u64>>,
}

impl<'a> Line<'a> {
    fn new(status: &'a Status) -> Self {
        let mut devices = BTreeMap::<_, BTreeMap<_, u64>>::new();
        for (name, device) in &status.devices {
            // Of drives and interfaces also the sum.
            let kind = ["block", "net"]
                .into_iter()
                .find(|kind| name.strip_prefix(kind).is_some_and(|rest| rest.starts_with('_')));
            for (counter, value) in &device.counters {
                devices.entry(name.as_str()).or_default().insert(counter.as_str(), *value);
                if let Some(kind) = kind {
                    *devices.entry(kind).or_default().entry(counter.as_str()).or_default() += value;
                }
            }
        }
        Self { status, devices }
    }
}

fn done((): ()) -> Answer {
    Answer::Done
}

fn patched(machine: &MachineConfig, patch: &MachineConfigPatch) -> MachineConfig {
    MachineConfig {
        vcpu_count: patch.vcpu_count.unwrap_or(machine.vcpu_count),
        mem_size_mib: patch.mem_size_mib.unwrap_or(machine.mem_size_mib),
        smt: patch.smt.unwrap_or(machine.smt),
        track_dirty_pages: patch.track_dirty_pages.unwrap_or(machine.track_dirty_pages),
        huge_pages: patch.huge_pages.unwrap_or(machine.huge_pages),
    }
}

/// Puts `item` in the place of the one with the same id, or at the end.
fn replace<T>(items: &mut Vec<T>, item: T, id: impl Fn(&T) -> &String) {
    match items.iter().position(|other| id(other) == id(&item)) {
        Some(at) => items[at] = item,
        None => items.push(item),
    }
}

#[cfg(test)]
mod tests {
    use bedplate_api::vmm::DeviceStatus;

    use super::*;

    #[test]
    fn a_line_of_metrics_has_each_device_and_the_sums() {
        let device = |reads: u64| DeviceStatus {
            counters: BTreeMap::from([("read_count".to_owned(), reads)]),
            ..DeviceStatus::default()
        };
        let names = [("block_a", 2), ("block_b_c", 3), ("balloon", 7)];
        let status = Status {
            id: "vm".into(),
            state: RunState::Running,
            pid: 1,
            uptime_seconds: 0,
            exits: ExitCounts::default(),
            devices: names.into_iter().map(|(name, reads)| (name.to_owned(), device(reads))).collect(),
        };
        let line = serde_json::to_value(Line::new(&status)).unwrap();
        let reads = |name: &str| line[name]["read_count"].as_u64();
        assert_eq!(["block_a", "block_b_c", "block", "balloon"].map(reads), [Some(2), Some(3), Some(5), Some(7)]);
        assert_eq!((&line["id"], &line["devices"]["balloon"]["read_count"]), (&"vm".into(), &7.into()));
    }
}
