//! One VM, assembled and running.
//!
//! Threads: one per vCPU, made here, also for those that may come later; one that reads what the kernel lacks, until it is there; device
//! workers and the interval timer's, made by the devices when they are needed. Everything else is done by whoever holds the [`Machine`], which is the
//! control thread.

pub mod bare;
pub mod builder;
pub mod counters;
mod devices;
pub mod lifecycle;
mod pci_devices;
mod platform;
mod plug;
mod plug_pmem;
pub mod ports;
mod taps;
pub mod unknown_msrs;
pub mod vcpu;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bedplate_api::vmm::{DeviceStatus, Exit, ExitCounts, ExitReason, VcpuInspection, Vcpus};
use bedplate_devices::bus::OverlapError;
use bedplate_devices::pci::{PciError, PciRoot};
use bedplate_devices::platform::AcpiPm;
use bedplate_devices::threads;

use crate::acpi::AcpiError;
use crate::boot::{BootError, Loader, Loading};
use crate::core_dump::{self, CoreDumpError};
use crate::debugger::Debugging;
use crate::firmware::FirmwareError;
use crate::kvm::{KvmError, Vcpu, VcpuState, Vm};
use crate::memory::{MemoryError, Ram};
use crate::mp_table::MpTableError;
use crate::pmem::PmemFileError;
use crate::sandbox::SandboxError;
use counters::ExitCounters;
use lifecycle::Lifecycle;
use plug::Plug;
use plug_pmem::PmemFiles;
use unknown_msrs::UnknownMsrs;
use vcpu::Buses;

pub use devices::{Devices, DiskControl};
pub use lifecycle::PauseError;
pub use pci_devices::DeviceError;
pub use platform::SerialLine;
pub use taps::KeepError;

/// Why no VM could be built.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum BuildError {
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    #[error(transparent)]
    Pmem(#[from] PmemFileError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Tap(#[from] KeepError),
    #[error(transparent)]
    Pci(#[from] PciError),
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    #[error(transparent)]
    MpTable(#[from] MpTableError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// Two devices in one place: our bug.
    #[error("the machine's own layout is contradictory: {0}")]
    Overlap(#[from] OverlapError),
    /// Descriptors or threads ran out.
    #[error("the host cannot give what the VM needs: {0}; raise its limits on open files and threads (ulimit -n, -u)")]
    Host(io::Error),
}

/// How long a vCPU may take to stop. One that resets a disk waits until it is flushed.
const PAUSE_PATIENCE: Duration = Duration::from_secs(10);

/// A VM that has been started. Dropped, it ends: threads are joined, devices stopped.
pub struct Machine {
    /// Open as long as vCPUs run and devices signal.
    vm: Vm,
    /// In its address space, beside its memory.
    pmem_files: PmemFiles,
    /// Serves a debugger, which may hold the vCPUs.
    _debugging: Option<Debugging>,
    ram: Ram,
    buses: Buses,
    life: Arc<Lifecycle>,
    pci: PciRoot,
    devices: Devices,
    plug: Plug,
    serial: SerialLine,
    power: Arc<Mutex<AcpiPm>>,
    /// The first so many vCPUs are there.
    present: u8,
    threads: Vec<JoinHandle<()>>,
    /// Reads what the kernel lacks.
    loading: Option<Loader>,
    counters: Vec<Arc<ExitCounters>>,
    started: Option<Instant>,
}

impl Machine {
    /// Starts one thread per vCPU, and then what they may wait for.
    fn run(
        mut self,
        vcpus: Vec<Vcpu>,
        unknown: &Arc<UnknownMsrs>,
        loading: Option<Loading>,
    ) -> Result<Self, BuildError> {
        self.started = Some(Instant::now());
        let all = vcpus.len();
        let (begins, first) = channel::<Infallible>();
        let mut begins = Some(begins);
        for mut vcpu in vcpus {
            let (buses, life, unknown) = (self.buses.clone(), Arc::clone(&self.life), Arc::clone(unknown));
            let counters = Arc::new(ExitCounters::default());
            self.counters.push(Arc::clone(&counters));
            let index = usize::from(vcpu.index());
            let name = format!("vcpu{index}");
            let begins = begins.take();
            let body = move || {
                drop(begins);
                vcpu::run(&mut vcpu, &buses, &life, &counters, &unknown);
            };
            match threads::named(name).spawn(body) {
                Ok(thread) => self.threads.push(thread),
                Err(error) => {
                    // Those that have no thread will never leave by themselves.
                    self.life.end(ExitReason::HostFault, error.to_string());
                    (index..all).for_each(|vcpu| self.life.leave(vcpu));
                    return Err(BuildError::Host(error));
                }
            }
        }
        drop(begins);
        until_begun(&first);
        self.loading = loading.map(|loading| loading.start(&self.life)).transpose().map_err(BuildError::Host)?;
        Ok(self)
    }

    /// How it ended, once it has.
    pub fn exit(&self) -> Option<&Exit> {
        self.life.exit()
    }

    /// Ends it at once, as seen from outside.
    pub fn stop(&self, detail: &str) {
        self.life.end(ExitReason::Stopped, detail);
    }

    /// Stops all vCPUs.
    ///
    /// # Errors
    /// The machine has ended, or one does not stop.
    pub fn pause(&self) -> Result<(), PauseError> {
        self.life.pause(PAUSE_PATIENCE)
    }

    /// Lets the vCPUs go on.
    pub fn resume(&self) {
        self.life.resume();
    }

    /// Presses the ACPI power button.
    pub fn press_power_button(&self) {
        self.power.lock().unwrap_or_else(|e| e.into_inner()).press_power_button();
    }

    /// Its devices.
    pub const fn devices(&self) -> &Devices {
        &self.devices
    }

    /// Likewise, to change what is known of them.
    pub const fn devices_mut(&mut self) -> &mut Devices {
        &mut self.devices
    }

    /// How they are, by their names.
    pub fn status(&self) -> BTreeMap<String, DeviceStatus> {
        let mut devices = self.devices.status();
        for (name, status) in &mut devices {
            status.unplugging = self.is_unplugging(name);
        }
        devices
    }

    /// The serial port.
    pub const fn serial(&self) -> &SerialLine {
        &self.serial
    }

    /// Guest memory.
    pub const fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Time since the first vCPU was started.
    pub fn uptime(&self) -> Duration {
        self.started.map_or(Duration::ZERO, |start| start.elapsed())
    }

    /// How many vCPUs there are, and may be.
    pub fn vcpus(&self) -> Vcpus {
        // At most 32.
        Vcpus { count: self.present, max_count: self.counters.len() as u8 }
    }

    /// What each vCPU does that is there: its registers, unless it does not leave the guest within `patience`, and its exits.
    pub fn inspect(&self, patience: Duration) -> Vec<VcpuInspection> {
        let registers = self.life.look(patience);
        let vcpu = |(index, (registers, counters)): (usize, (_, &Arc<ExitCounters>))| VcpuInspection {
            index: index as u8,
            registers,
            exits: counters.counts(),
            last_exits: counters.last(),
        };
        registers.into_iter().zip(&self.counters).take(self.present.into()).enumerate().map(vcpu).collect()
    }

    /// Writes memory and registers to a file, while the vCPUs stand still; they do so after it, too. Devices finish what they
    /// have begun.
    ///
    /// # Errors
    /// It cannot be written, or the machine has ended.
    pub fn dump_core(&self, path: &Path, patience: Duration) -> Result<(), CoreDumpError> {
        // The dump is of the file that RAM is, where nobody waits for what is not there yet.
        if self.loading.as_ref().is_some_and(|loader| !loader.wait(patience)) {
            return Err(CoreDumpError::Loading);
        }
        self.pause()?;
        let states = self.life.ask_each(patience, |vcpu| vcpu.state().ok());
        let known =
            |(index, state): (usize, Option<Option<VcpuState>>)| state.flatten().ok_or(CoreDumpError::Vcpu(index));
        let states = states.into_iter().enumerate().map(known).collect::<Result<Vec<_>, _>>()?;
        core_dump::write(path, &states, &self.ram)
    }

    /// Exits of all vCPUs so far.
    pub fn exits(&self) -> ExitCounts {
        let mut sum = ExitCounts::default();
        self.counters.iter().for_each(|counters| counters.add_to(&mut sum));
        sum
    }
}

/// Waits until the first vCPU's thread, which holds the other end of `first`, has begun. So the guest comes before what the
/// start still has to do for others, also where all have one processor: of several new threads the kernel lets the newest
/// begin first. This thread waits for its turn meanwhile: otherwise it would take the processor from the vCPU that wakes it.
fn until_begun(first: &Receiver<Infallible>) {
    let waits = threads::wait_for_turns();
    // Nothing is ever sent: the other end is dropped.
    let _ = first.recv();
    if waits {
        threads::stop_waiting_for_turns();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop("the machine was dropped");
        for thread in self.threads.drain(..) {
            // A panic of that thread has been reported by the panic hook, and the machine ends either way.
            let _ = thread.join();
        }
        // It works on our memory.
        self.loading = None;
        // No vCPU runs: nothing starts a worker again.
        self.pci.shutdown();
    }
}
