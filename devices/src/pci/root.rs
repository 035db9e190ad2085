//! The root complex: which function sits where, and where its BARs are decoded.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use super::bridge::HostBridge;
use super::{BAR_COUNT, Bar, ConfigPorts, ConfigSpace, Ecam, PciFunction, Space};
use crate::bus::{Bus, BusDevice};

/// Devices that one bus can have.
pub const SLOTS: u8 = 32;

/// A function could not be added.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// All device numbers are taken.
    #[error(
        "no free PCI slot: the bus has {SLOTS} and one is the host bridge's; configure fewer devices, or remove one"
    )]
    NoSlot,
    /// The windows are used up.
    #[error("no room for a BAR of {size:#x} bytes in the PCI windows")]
    NoSpace {
        /// What was asked for.
        size: u64,
    },
}

/// The place of a device on the bus: its device number. Every device has one function, 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(u8);

impl Slot {
    /// The slot of device number `device`; none past the end of the bus.
    pub fn new(device: u8) -> Option<Self> {
        (device < SLOTS).then_some(Self(device))
    }

    /// The device number, 0 to 31.
    pub fn number(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.0", self.0)
    }
}

/// Where the host bridge is.
const BRIDGE: Slot = Slot(0);

/// A PCI Express root complex with one bus. Cheap to clone; all clones are the same one.
#[derive(Clone)]
pub struct PciRoot {
    functions: Arc<Mutex<Functions>>,
}

impl PciRoot {
    /// A root with nothing but its host bridge. BARs are decoded on the buses of `memory` and `ports`, and only inside one of
    /// the windows beside them, which are free of RAM and mostly of other devices. They get their first places in the first
    /// that has room: so those come first that the machine's description names (ACPI `_CRS`).
    pub fn new(memory: (&Arc<Bus>, Vec<Range<u64>>), ports: (&Arc<Bus>, Vec<Range<u64>>)) -> Self {
        let bridge = Entry { function: Arc::new(Mutex::new(HostBridge::new())), bars: Vec::new() };
        let slots = BTreeMap::from([(BRIDGE, bridge)]);
        let memory = Forwarding::new(memory.0, memory.1);
        let spaces = Spaces { memory, ports: Forwarding::new(ports.0, ports.1) };
        Self { functions: Arc::new(Mutex::new(Functions { slots, spaces, configured: Arc::default() })) }
    }

    /// Puts `function` into the next free slot and gives each of its BARs an address, as firmware would. The guest still
    /// has to enable memory decoding.
    ///
    /// # Errors
    /// No slot or no address space is left; the function was not added.
    pub fn add<F: PciFunction + 'static>(&self, function: F) -> Result<Slot, PciError> {
        self.add_shared(Arc::new(Mutex::new(function)))
    }

    /// The same for a function that the caller goes on to share. Lock order: root before function.
    ///
    /// # Errors
    /// As [`PciRoot::add`].
    pub fn add_shared(&self, function: Arc<Mutex<dyn PciFunction>>) -> Result<Slot, PciError> {
        self.lock().add(function, Placement::ByUs)
    }

    /// The same while the guest runs, which alone knows by now what lies where: the BARs have no address until the guest
    /// gives them one. It still has to be told that there is something.
    ///
    /// # Errors
    /// No slot is free.
    pub fn plug(&self, function: Arc<Mutex<dyn PciFunction>>) -> Result<Slot, PciError> {
        self.lock().add(function, Placement::ByGuest)
    }

    /// Whether there is a device in `slot`. The host bridge is none: it neither comes nor goes.
    pub fn is_occupied(&self, slot: Slot) -> bool {
        slot != BRIDGE && self.lock().slots.contains_key(&slot)
    }

    /// Takes what is in `slot` off the bus, and stops it: when this returns nothing of it answers, and none of its threads
    /// touches guest memory. Does nothing for an empty slot and the host bridge.
    ///
    /// The slot is free as soon as configuration space does not know the function any more. Stopping it can take as long
    /// as a reset of the device, and the root is not locked for that time.
    pub fn remove(&self, slot: Slot) {
        if slot == BRIDGE {
            return;
        }
        let (entry, buses) = {
            let mut functions = self.lock();
            (functions.slots.remove(&slot), functions.spaces.buses())
        };
        if let Some(entry) = entry {
            entry.retire(&buses);
        }
    }

    /// Set as soon as the guest has written a register of a device here, the host bridge not counted: it has PCI and takes
    /// devices from there, which begins with a look at how large their BARs are. To read is not enough: Linux looks for
    /// graphics of Intel's whatever it was told.
    pub fn configured(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.lock().configured)
    }

    /// What answers at the memory-mapped configuration window, [`super::ECAM_LEN`] bytes long.
    pub fn ecam(&self) -> Arc<Mutex<Ecam>> {
        Arc::new(Mutex::new(Ecam { functions: Arc::clone(&self.functions) }))
    }

    /// What answers at the ports [`super::CONFIG_PORT`] and the [`super::CONFIG_PORTS`] - 1 after it.
    pub fn config_ports(&self) -> Arc<Mutex<ConfigPorts>> {
        Arc::new(Mutex::new(ConfigPorts { functions: Arc::clone(&self.functions), address: 0, reset: None }))
    }

    /// Stops all functions: when this returns no device thread touches guest memory. Idempotent.
    pub fn shutdown(&self) {
        for entry in self.lock().slots.values() {
            lock(&entry.function).shutdown();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Functions> {
        self.functions.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn lock(function: &Mutex<dyn PciFunction>) -> MutexGuard<'_, dyn PciFunction + 'static> {
    function.lock().unwrap_or_else(|e| e.into_inner())
}

/// An address range that the bridge forwards, handed out from the bottom.
struct Window {
    range: Range<u64>,
    next: u64,
}

impl Window {
    fn allocate(&mut self, size: u64) -> Option<u64> {
        let start = self.next.checked_next_multiple_of(size)?;
        let end = start.checked_add(size).filter(|end| *end <= self.range.end)?;
        self.next = end;
        Some(start)
    }
}

/// A bus of the machine, and what of it the bridge forwards.
struct Forwarding {
    /// Not an owner: the buses hold the ways to configuration space, which hold this.
    bus: Weak<Bus>,
    windows: Vec<Window>,
}

impl Forwarding {
    fn new(bus: &Arc<Bus>, windows: Vec<Range<u64>>) -> Self {
        let windows = windows.into_iter().map(|range| Window { next: range.start, range }).collect();
        Self { bus: Arc::downgrade(bus), windows }
    }

    /// Whether all of `range` is forwarded, in one window.
    fn covers(&self, start: u64, size: u64) -> bool {
        let end = start.checked_add(size);
        end.is_some_and(|end| self.windows.iter().any(|window| window.range.start <= start && end <= window.range.end))
    }
}

struct Spaces {
    memory: Forwarding,
    ports: Forwarding,
}

impl Spaces {
    fn of(&self, space: Space) -> &Forwarding {
        match space {
            Space::Memory => &self.memory,
            Space::Ports => &self.ports,
        }
    }

    fn allocate(&mut self, bar: Bar) -> Option<u64> {
        let windows = match bar.space {
            Space::Memory => &mut self.memory.windows,
            Space::Ports => &mut self.ports.windows,
        };
        windows.iter_mut().find_map(|window| window.allocate(bar.size))
    }

    /// The buses, unless the machine is gone.
    fn buses(&self) -> Buses {
        Buses { memory: self.memory.bus.upgrade(), ports: self.ports.bus.upgrade() }
    }
}

/// The machine's buses, held for a moment.
struct Buses {
    memory: Option<Arc<Bus>>,
    ports: Option<Arc<Bus>>,
}

impl Buses {
    fn of(&self, space: Space) -> Option<&Bus> {
        match space {
            Space::Memory => self.memory.as_deref(),
            Space::Ports => self.ports.as_deref(),
        }
    }
}

/// One BAR and where the bus knows it.
struct BarMapping {
    index: usize,
    bar: Bar,
    device: Arc<Mutex<BarDevice>>,
    mapped: Option<u64>,
}

struct Entry {
    function: Arc<Mutex<dyn PciFunction>>,
    bars: Vec<BarMapping>,
}

/// Who gives BARs their addresses.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Placement {
    ByUs,
    ByGuest,
}

/// The state behind every handle.
pub(super) struct Functions {
    slots: BTreeMap<Slot, Entry>,
    spaces: Spaces,
    configured: Arc<AtomicBool>,
}

impl Functions {
    fn add(&mut self, function: Arc<Mutex<dyn PciFunction>>, placement: Placement) -> Result<Slot, PciError> {
        let free = (0..SLOTS).map(Slot).find(|slot| !self.slots.contains_key(slot)).ok_or(PciError::NoSlot)?;
        let mut bars = Vec::new();
        for index in 0..BAR_COUNT {
            let Some(bar) = lock(&function).config().bar(index) else { continue };
            if placement == Placement::ByUs {
                let address = self.spaces.allocate(bar).ok_or(PciError::NoSpace { size: bar.size })?;
                lock(&function).config().set_bar_address(index, address);
            }
            let device = Arc::new(Mutex::new(BarDevice { function: Some(Arc::clone(&function)), index }));
            bars.push(BarMapping { index, bar, device, mapped: None });
        }
        lock(&function).placed(free);
        self.slots.insert(free, Entry { function, bars });
        Ok(free)
    }

    pub(super) fn read_config(&mut self, slot: Slot, register: u16, data: &mut [u8]) {
        match self.slots.get(&slot) {
            Some(entry) => lock(&entry.function).read_config(register, data),
            // Nobody answers: a master abort, which reads as ones.
            None => data.fill(0xff),
        }
    }

    pub(super) fn write_config(&mut self, slot: Slot, register: u16, data: &[u8]) {
        if let Some(entry) = self.slots.get_mut(&slot) {
            if slot != BRIDGE {
                self.configured.store(true, Ordering::SeqCst);
            }
            lock(&entry.function).write_config(register, data);
            entry.remap(&self.spaces);
        }
    }
}

impl Entry {
    /// Makes the buses agree with command register and BARs.
    fn remap(&mut self, spaces: &Spaces) {
        let buses = spaces.buses();
        let mut function = lock(&self.function);
        // What leaves makes room for what comes.
        for bar in &mut self.bars {
            let Some(bus) = buses.of(bar.bar.space) else { continue };
            let wanted = bar.wanted(function.config(), spaces);
            if let Some(old) = bar.mapped.take_if(|mapped| wanted != Some(*mapped)) {
                function.bar_moved(bar.index, None);
                bus.remove(old);
            }
        }
        for bar in &mut self.bars {
            let Some(bus) = buses.of(bar.bar.space) else { continue };
            // Two BARs in one place are a fault of the guest: the first one stays, the second is not decoded.
            if bar.mapped.is_none()
                && let Some(new) = bar.wanted(function.config(), spaces)
                && bus.insert(new, bar.bar.size, Arc::clone(&bar.device) as Arc<Mutex<dyn BusDevice>>).is_ok()
            {
                bar.mapped = Some(new);
                function.bar_moved(bar.index, Some(new));
            }
        }
    }
}

impl Entry {
    /// Ends what is on the bus no more. Called without the root's lock: an access to a BAR that is under way may hold the
    /// function's for long, and is waited for.
    fn retire(self, buses: &Buses) {
        for bar in &self.bars {
            // Who finds it on the bus, or has found it, must not set it going again.
            bar.device.lock().unwrap_or_else(|e| e.into_inner()).function = None;
        }
        let mut function = lock(&self.function);
        for bar in &self.bars {
            if let Some(mapped) = bar.mapped {
                function.bar_moved(bar.index, None);
                // Last: the guest can put another BAR there then, whose notifications must find the place free, too.
                if let Some(bus) = buses.of(bar.bar.space) {
                    bus.remove(mapped);
                }
            }
        }
        function.shutdown();
    }
}

impl BarMapping {
    /// Where the registers say that the BAR is decoded: nowhere outside of what the bridge forwards.
    fn wanted(&self, config: &ConfigSpace, spaces: &Spaces) -> Option<u64> {
        let Bar { space, size } = self.bar;
        let address = config.bar_address(self.index);
        (config.decodes(space) && spaces.of(space).covers(address, size)).then_some(address)
    }
}

/// One BAR of a function, as its bus sees it.
struct BarDevice {
    /// None once the function is off the bus.
    function: Option<Arc<Mutex<dyn PciFunction>>>,
    index: usize,
}

impl BusDevice for BarDevice {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match &self.function {
            Some(function) => lock(function).read_bar(self.index, offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(function) = &self.function {
            lock(function).write_bar(self.index, offset, data);
        }
    }
}
