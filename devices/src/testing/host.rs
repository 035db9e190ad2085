//! A host without KVM.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Memory;
use crate::bus::Bus;
use crate::host::{Doorbell, MsiVector, Pin, TransportHost};
use crate::pci::{self, PciFunction, PciRoot, Slot};
use crate::platform::IrqLine;

/// How long anything may take before a test gives up.
pub(super) const DEADLINE: Duration = Duration::from_secs(20);

/// Number of the pin that devices share here.
pub const INTX: u8 = 11;

/// An interrupt vector that a test can look at.
pub struct FakeVector {
    event: EventFd,
    route: Mutex<Option<(u64, u32)>>,
}

impl FakeVector {
    /// Where the device's message goes, if anywhere.
    pub fn route(&self) -> Option<(u64, u32)> {
        *self.route.lock().unwrap()
    }

    /// Signals since the last call.
    pub fn take(&self) -> u64 {
        self.event.read().unwrap_or(0)
    }

    /// Waits for a signal and takes it; false at the deadline.
    pub fn wait(&self, deadline: Instant) -> bool {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut poll = libc::pollfd { fd: self.event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid `pollfd`.
            let ready = unsafe { libc::poll(&mut poll, 1, left.as_millis() as libc::c_int) };
            // A signal, such as a fuzzer's timer, has interrupted it.
            if ready >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return ready == 1 && self.take() > 0;
            }
        }
    }
}

/// One that nothing has signalled.
fn silent() -> Arc<FakeVector> {
    Arc::new(FakeVector { event: EventFd::new(EFD_NONBLOCK).unwrap(), route: Mutex::new(None) })
}

struct Line(Arc<FakeVector>);

impl Pin for Line {
    fn trigger(&self) -> &EventFd {
        &self.0.event
    }
}

impl MsiVector for Line {
    fn trigger(&self) -> &EventFd {
        &self.0.event
    }

    fn route(&self, address: u64, data: u32) -> io::Result<()> {
        *self.0.route.lock().unwrap() = Some((address, data));
        Ok(())
    }

    fn unroute(&self) -> io::Result<()> {
        *self.0.route.lock().unwrap() = None;
        Ok(())
    }
}

/// What INTA# of a slot signals when it rises, and whether it is high.
type RisesAndIsHigh = (Arc<FakeVector>, Arc<AtomicBool>);

/// INTA# of a slot.
struct Level {
    rises: Arc<FakeVector>,
    is_high: Arc<AtomicBool>,
}

impl IrqLine for Level {
    fn set(&self, asserted: bool) {
        if !self.is_high.swap(asserted, Ordering::SeqCst) && asserted {
            self.rises.event.write(1).unwrap();
        }
    }
}

/// Vectors, pins and ioeventfds.
#[derive(Default)]
pub struct FakeHost {
    /// In the order of allocation.
    pub vectors: Mutex<Vec<Arc<FakeVector>>>,
    /// Whether it has no way to a pin.
    pub refuses_pins: AtomicBool,
    pins: Mutex<BTreeMap<u32, Arc<FakeVector>>>,
    intx: Mutex<BTreeMap<Slot, RisesAndIsHigh>>,
    doorbells: Mutex<Vec<(Doorbell, EventFd)>>,
}

impl FakeHost {
    /// Where a write signals an event.
    pub fn doorbells(&self) -> Vec<Doorbell> {
        self.doorbells.lock().unwrap().iter().map(|(doorbell, _)| *doorbell).collect()
    }

    /// What comes to this pin of the interrupt controllers.
    pub fn line(&self, pin: u32) -> Arc<FakeVector> {
        Arc::clone(self.pins.lock().unwrap().entry(pin).or_insert_with(silent))
    }

    /// What comes when INTA# of `slot` rises, and whether it is high.
    pub fn intx_of(&self, slot: Slot) -> RisesAndIsHigh {
        self.intx.lock().unwrap().entry(slot).or_insert_with(|| (silent(), Arc::default())).clone()
    }

    /// Does what KVM does with a guest's write before it leaves the guest; false if it has to leave.
    pub fn intercept(&self, doorbell: Doorbell) -> bool {
        let doorbells = self.doorbells.lock().unwrap();
        let hit = doorbells.iter().find(|(at, _)| *at == doorbell);
        hit.map(|(_, event)| event.write(1).unwrap()).is_some()
    }
}

impl TransportHost for FakeHost {
    fn msi_vector(&self) -> io::Result<Box<dyn MsiVector>> {
        let vector = Arc::new(FakeVector { event: EventFd::new(EFD_NONBLOCK)?, route: Mutex::new(None) });
        self.vectors.lock().unwrap().push(Arc::clone(&vector));
        Ok(Box::new(Line(vector)))
    }

    fn pin(&self, gsi: u32) -> io::Result<Box<dyn Pin>> {
        if self.refuses_pins.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Box::new(Line(self.line(gsi))))
    }

    fn intx(&self, slot: Slot) -> (u8, Box<dyn IrqLine>) {
        let (rises, is_high) = self.intx_of(slot);
        (INTX, Box::new(Level { rises, is_high }))
    }

    fn add_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> io::Result<()> {
        assert!(!self.doorbells().contains(&doorbell), "{doorbell:x?} is taken");
        self.doorbells.lock().unwrap().push((doorbell, event.try_clone()?));
        Ok(())
    }

    fn remove_doorbell(&self, doorbell: Doorbell, _event: &EventFd) -> io::Result<()> {
        let mut doorbells = self.doorbells.lock().unwrap();
        let before = doorbells.len();
        doorbells.retain(|(at, _)| *at != doorbell);
        if doorbells.len() < before { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
    }
}

/// Memory that can be shared: a file in memory for each of `ranges`.
pub fn ram(ranges: &[(GuestAddress, usize)]) -> GuestMemoryMmap {
    let ranges = ranges.iter().map(|(start, len)| {
        let memfd = rustix::fs::memfd_create("test-ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, *len as u64).unwrap();
        (*start, *len, Some(FileOffset::new(memfd.into(), 0)))
    });
    GuestMemoryMmap::from_ranges_with_files(ranges.collect::<Vec<_>>()).unwrap()
}

/// RAM, a bus and a PCI root.
pub struct Machine {
    /// Guest memory, from address 0.
    pub memory: Memory,
    /// The memory bus, with ECAM and BARs.
    pub bus: Arc<Bus>,
    /// The port bus, with BARs.
    pub ports: Arc<Bus>,
    /// The root complex.
    pub root: PciRoot,
    /// The host below.
    pub host: Arc<FakeHost>,
}

impl Machine {
    /// Where ECAM is.
    pub const ECAM: u64 = 0xe000_0000;
    /// Where BARs may be.
    pub const WINDOW: std::ops::Range<u64> = 0x80_0000_0000..0x80_1000_0000;
    /// And those of ports.
    pub const PORTS: std::ops::Range<u64> = 0xc000..0x1_0000;
    /// Bytes of RAM.
    pub const RAM: usize = 16 << 20;

    /// A machine with no devices but the host bridge.
    pub fn new() -> Self {
        let memory = Arc::new(ram(&[(GuestAddress(0), Self::RAM)]));
        let bus = Arc::new(Bus::new());
        let ports = Arc::new(Bus::new());
        let root = PciRoot::new((&bus, vec![Self::WINDOW]), (&ports, vec![Self::PORTS]));
        bus.insert(Self::ECAM, pci::ECAM_LEN, root.ecam()).unwrap();
        Self { memory, bus, ports, root, host: Arc::default() }
    }

    /// Adds a function.
    pub fn add(&self, function: impl PciFunction + 'static) -> Slot {
        self.root.add(function).unwrap()
    }

    /// The host, as devices take it.
    pub fn transport_host(&self) -> Arc<dyn TransportHost> {
        Arc::clone(&self.host) as Arc<dyn TransportHost>
    }

    /// A guest's write to memory space.
    pub fn write(&self, address: u64, data: &[u8]) {
        let rung = match *data {
            [a, b, c, d] => {
                self.host.intercept(Doorbell::Register { address, value: u32::from_le_bytes([a, b, c, d]) })
            }
            _ => false,
        };
        if !rung {
            self.bus.write(address, data);
        }
    }

    /// A guest's write to a port.
    pub fn write_port(&self, port: u16, data: &[u8]) {
        if !self.host.intercept(Doorbell::Port(port)) {
            self.ports.write(port.into(), data);
        }
    }

    /// A guest's read.
    pub fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.bus.read(address, &mut data);
        data
    }

    /// Address of a configuration register.
    pub fn config(slot: Slot, register: u64) -> u64 {
        Self::ECAM + (u64::from(slot.number()) << 15) + register
    }

    /// Reads a configuration register.
    pub fn read_config(&self, slot: Slot, register: u64) -> u32 {
        u32::from_le_bytes(self.read(Self::config(slot, register)))
    }

    /// Writes a configuration register.
    pub fn write_config(&self, slot: Slot, register: u64, value: u32) {
        self.write(Self::config(slot, register), &value.to_le_bytes());
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.root.shutdown();
    }
}
