//! How a configuration becomes a running VM, from top to bottom.

use std::io::Write;
use std::ops::Range;
use std::sync::Arc;

use bedplate_devices::pci::{self, PciRoot};
use bedplate_devices::platform::{Booted, DebugLine, FwCfg, Rtc};
use bedplate_devices::virtio::mmio::Place;
use vmm_sys_util::eventfd::EventFd;

use super::lifecycle::Lifecycle;
use super::pci_devices::When;
use super::plug::{Departures, Plug};
use super::plug_pmem::{PmemFiles, unwatched};
use super::taps::Taps;
use super::unknown_msrs::{UnknownMsrs, Warn};
use super::vcpu::Buses;
use super::{BuildError, Devices, Machine, platform, ports};
use crate::acpi;
use crate::boot::{self, Boot, Entry, Loading};
use crate::config::Config;
use crate::console::Sink;
use crate::debugger::{DebugSocket, Debugger, Words};
use crate::firmware::{self, FirmwareError};
use crate::kvm::{Creation, Vcpu, install_kick_signal};
use crate::memory::{Above, MemoryError, Ram, Room, Sharing, layout};
use crate::metadata::Metadata;
use crate::mp_table;
use crate::pmem::{PmemFile, Watch};
use crate::sandbox::Sandbox;

/// What a VM is connected to, and what it is kept in.
pub struct Outlets<'a> {
    /// The guest's serial output; must not block.
    pub serial: Box<dyn Write + Send>,
    /// The output of its virtio console, if it has one.
    pub console: Option<Sink>,
    /// Signalled when the VM has ended.
    pub ended: &'a EventFd,
    /// Signalled when the guest has let go of a device ([`Machine::settle`]).
    pub departed: &'a EventFd,
    /// Taps that interfaces can have while the VM runs, beside those of its own.
    pub taps: &'a [String],
    /// There is a boot timer, and this is told its time. Called once, on a vCPU's thread.
    pub booted: Option<Booted>,
    /// Told what firmware says while it works, line by line, if somebody wants to know: it takes time. Called on a vCPU's
    /// thread.
    pub firmware_words: Option<DebugLine>,
    /// Told which model-specific registers the guest has touched that it does not have.
    pub warn: Warn,
    /// Where a debugger is awaited, if at all, and who is told what it does.
    pub debugger: Option<(&'a DebugSocket, Words)>,
    /// What the guest can ask for.
    pub metadata: Metadata,
    /// What the process goes into before the guest runs, if it shall.
    pub sandbox: Option<Sandbox>,
}

/// Where BARs may be.
struct Windows {
    /// The guest is told of these.
    mmio32: Vec<Range<u64>>,
    mmio64: Vec<Range<u64>>,
    /// Where Linux puts BARs if it shall not believe that (`pci=nocrs`, `pci=noacpi`): above 4 GiB and all memory.
    elsewhere: Vec<Range<u64>>,
}

impl Windows {
    /// Of a VM that begins with `boot`: firmware moves BARs to where it wants them. Beside them, the room for files that come
    /// later.
    fn of(boot: &Boot, ram: &Ram, address_bits: u8) -> Result<(Self, Room), MemoryError> {
        let align = match boot {
            Boot::Kernel(_) => layout::MMIO64_LEN,
            Boot::Firmware(_) => layout::MMIO64_ALIGN_FIRMWARE,
        };
        let Above { gap, mmio64, room, rest } = ram.above(address_bits, align)?;
        let windows = match boot {
            Boot::Kernel(_) => Self { mmio32: vec![layout::MMIO32], mmio64: vec![mmio64], elsewhere: vec![gap, rest] },
            Boot::Firmware(_) => Self {
                mmio32: layout::MMIO32_FIRMWARE.to_vec(),
                mmio64: [mmio64, rest].into_iter().filter(|window| !window.is_empty()).collect(),
                elsewhere: vec![gap],
            },
        };
        Ok((windows, Room::new(room)))
    }

    /// In the order in which BARs get their first places: below 4 GiB for a kernel of 32 bits, which need not reach further.
    fn in_order(self, entry: Entry) -> Vec<Range<u64>> {
        // No BAR is so long or so placed that it would be in two of them.
        match entry {
            Entry::Linux32 { .. } => [self.mmio32, self.mmio64, self.elsewhere].concat(),
            _ => [self.mmio64, self.mmio32, self.elsewhere].concat(),
        }
    }
}

/// Where virtio devices are for a guest without PCI, which firmware never is. As many as have a place.
fn places(config: &Config) -> Vec<Place> {
    match config.boot {
        Boot::Kernel(_) => ports::virtio_places().take(config.devices()).collect(),
        Boot::Firmware(_) => Vec::new(),
    }
}

/// The clock; in its RAM is what firmware looks for there.
fn clock(boot: &Boot, ram: &Ram) -> Rtc {
    match boot {
        Boot::Kernel(_) => Rtc::new(),
        Boot::Firmware(_) => {
            let high = ram.ranges().find(|(start, _)| *start == layout::HIGH_RAM).map_or(0, |(start, end)| end - start);
            Rtc::with_memory(ram.low_end(), high)
        }
    }
}

/// What a VM is given that need not be there for it: memory, what the guest is told, and the kernel it boots.
struct Prepared {
    ram: Ram,
    files: Vec<PmemFile>,
    /// Where files may come later.
    room: Room,
    description: acpi::Description,
    entry: Entry,
    loading: Option<Loading>,
    /// Where BARs get their first places.
    bars: Vec<Range<u64>>,
}

impl Prepared {
    fn new(config: &Config, address_bits: u8) -> Result<Self, BuildError> {
        let sharing = if config.has_backends() { Sharing::Backends } else { Sharing::Nobody };
        let mut ram = Ram::with_sharing(config.memory_mib, config.pages, sharing)?;
        if let Some(hotplug) = config.hotplug {
            ram = ram.with_hotplug(hotplug.total_mib)?;
        }
        let open = |pmem| PmemFile::open(pmem, |len| ram.reserve(len));
        let files = config.pmems.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let (windows, room) = Windows::of(&config.boot, &ram, address_bits)?;
        let description = acpi::Description {
            vcpus: config.topology.vcpus,
            present: config.vcpus,
            mmio32: windows.mmio32.clone(),
            mmio64: windows.mmio64.clone(),
            timer: matches!(config.boot, Boot::Firmware(_)),
            virtio: places(config),
        };
        let (entry, loading) = match &config.boot {
            Boot::Kernel(kernel) => {
                let rsdp = acpi::write(&ram.memory, &description)?;
                mp_table::write(&ram.memory, config.vcpus)?;
                boot::load(&ram, kernel, rsdp, &description.virtio)?
            }
            // It goes around RAM and reads its tables from a device: in [`start`].
            Boot::Firmware(_) => (Entry::Reset, None),
        };
        let bars = windows.in_order(entry);
        Ok(Self { ram, files, room, description, entry, loading, bars })
    }
}

/// Builds and starts the VM that `config` describes.
///
/// The order matters in three places: devices are attached in the order in which the guest shall see them; whatever is opened by
/// name is opened before the sandbox is entered; and no other thread is left by then.
///
/// # Errors
/// The host cannot give what is asked, or a file is not what it should be. Nothing is left running.
pub fn start(config: &Config, outlets: Outlets<'_>) -> Result<Machine, BuildError> {
    // KVM makes a VM, and mostly waits; meanwhile, what needs none yet.
    let creation = Creation::new(&config.kvm)?;
    let address_bits = creation.address_bits();
    let (created, prepared) = creation.create(|| Prepared::new(config, address_bits))?;
    let Prepared { ram, files, room, description, entry, loading, bars } = prepared?;

    // The VM around that, with interrupt controllers.
    let mut vm = created.finish(Arc::clone(&ram.memory), &config.kvm)?;
    let interrupts = vm.interrupts();

    // What can end it.
    install_kick_signal()?;
    let life = Arc::new(Lifecycle::new(outlets.ended.try_clone().map_err(BuildError::Host)?));
    let debugger = outlets.debugger.map(|(socket, words)| Debugger::new(socket, words, &life));
    let debugger = debugger.transpose().map_err(BuildError::Host)?;
    files.iter().for_each(|file| life.add_file(file.witness()));

    // The platform: devices at fixed places.
    let buses = Buses::new();
    let serial = platform::attach_serial(&buses.ports, &interrupts, outlets.serial)?;
    platform::attach_rtc(&buses.ports, clock(&config.boot, &ram))?;
    platform::attach_pit(&buses.ports, &interrupts)?;
    platform::attach_i8042(&buses.ports, &life)?;
    let power = platform::attach_acpi(&buses.ports, &interrupts, &life)?;
    if let Some(booted) = outlets.booted {
        platform::attach_boot_timer(&buses.mmio, booted)?;
    }

    // PCI, and on it the devices, in the order in which the guest shall see them.
    let pci = PciRoot::new((&buses.mmio, bars), (&buses.ports, vec![ports::PCI, ports::PCI_ELSEWHERE]));
    buses.mmio.insert(layout::ECAM, pci::ECAM_LEN, pci.ecam())?;
    let config_ports = pci.config_ports();
    buses.ports.insert(pci::CONFIG_PORT, pci::CONFIG_PORTS, Arc::clone(&config_ports) as _)?;
    let mut devices = Devices::default();
    let mut plug = Plug {
        host: Arc::new(interrupts.clone()),
        vcpus: config.topology.vcpus,
        metadata: outlets.metadata,
        taps: Taps::keep(outlets.taps, config.topology.vcpus)?,
        signals: platform::hotplug_signals(&power, config.vcpus),
        departures: Arc::new(Departures::new(outlets.departed.try_clone().map_err(BuildError::Host)?)),
    };
    let mut attach = plug.attach(When::Start, &pci, &ram.memory, &mut devices);
    attach.files = &files;
    attach.places = Some((&buses.mmio, description.virtio.iter()));
    if let Boot::Kernel(kernel) = &config.boot
        && boot::is_without_pci(&kernel.cmdline)
        && description.virtio.len() < config.devices()
    {
        attach.devices.warnings.push(format!(
            "a guest with pci=off finds the first {} of {} devices, disks before others: leave pci=off out of boot_args",
            description.virtio.len(),
            config.devices()
        ));
    }
    let disks = config.drives.iter().map(|disk| attach.disk(disk)).collect::<Result<Vec<_>, _>>()?;
    for net in &config.nets {
        attach.net(net)?;
    }
    for file_system in &config.filesystems {
        attach.file_system(file_system)?;
    }
    let mut watch = Watch::default();
    for file in &files {
        attach.pmem(file, &mut vm, &buses.mmio)?;
        let watched = watch.add(file);
        attach.devices.warnings.extend(watched.err().map(|error| unwatched(file, &error)));
    }
    if let Some(vsock) = &config.vsock {
        attach.vsock(vsock)?;
    }
    if let Some(entropy) = &config.entropy {
        attach.rng(entropy)?;
    }
    if let Some(balloon) = config.balloon {
        attach.balloon(balloon)?;
    }
    if let (Some(hotplug), Some(region)) = (config.hotplug, ram.hotplug()) {
        attach.mem(hotplug, region)?;
    }

    if let (Some(console), Some(sink)) = (&config.console, outlets.console) {
        attach.console(sink, console.size)?;
    }

    // Some of them may go again, and others come.
    platform::attach_hotplug(&buses.ports, &plug.signals, plug.departures.sink(&pci, &plug.signals))?;

    if let Boot::Firmware(path) = &config.boot {
        let rom = firmware::read(path)?;
        vm.add_rom(&rom, firmware::address(&rom))?;
        firmware::shadow(&ram, &rom)?;
        let items = firmware::items(&ram, &description, &disks).map_err(FirmwareError::Items)?;
        let items = FwCfg::new(items, &ram.memory);
        platform::attach_for_firmware(&buses.ports, &config_ports, &life, items, outlets.firmware_words)?;
    }

    // Processors, the first of them where the guest begins, the others waiting for it; some of them may come later.
    let vcpus = vm.create_vcpus(config.topology, config.vcpus)?;
    if let Some(first) = vcpus.first() {
        first.enter_at(entry)?;
    }

    // All that the VM needs is open, and there is no second thread yet.
    if let Some(sandbox) = outlets.sandbox {
        sandbox.enter()?;
        plug.taps.seal();
    }
    watch.start(&life, |thread| thread()).map_err(BuildError::Host)?;
    life.set_vcpus(vcpus.iter().map(Vcpu::kicker).collect());
    let debugging = debugger.map(|debugger| debugger.start(&life, Arc::clone(&ram.memory), vcpus.len()));
    let _debugging = debugging.transpose().map_err(BuildError::Host)?;
    let (threads, counters) = (Vec::new(), Vec::new());
    Machine {
        vm,
        pmem_files: PmemFiles::new(files, room, watch),
        _debugging,
        ram,
        buses,
        life,
        pci,
        devices,
        plug,
        serial,
        power,
        present: config.vcpus,
        threads,
        counters,
        loading: None,
        started: None,
    }
    .run(vcpus, &Arc::new(UnknownMsrs::new(outlets.warn)), loading)
}
