//! The guest in our VMM.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bedplate_api::vmm::ExitReason;
use bedplate_devices::bus::BusDevice;
use bedplate_devices::host::{Doorbell, TransportHost};
use bedplate_vmm::machine::bare::{BareMachine, CODE_ADDRESS};
use bedplate_vmm::machine::lifecycle::Lifecycle;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::{self, ADDRESS, Access, BEGIN_PORT, END_PORT, PORT};

/// A device that counts what is written to it.
#[derive(Default)]
pub struct Counter(pub u64);

impl BusDevice for Counter {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        self.0 += data.len() as u64;
    }
}

/// From [`BEGIN_PORT`] to [`END_PORT`].
const CLOCK_PORTS: u64 = (END_PORT - BEGIN_PORT + 1) as u64;

/// A device that takes the time, at the guest's first write and at its second, which ends the machine.
struct Clock {
    life: Arc<Lifecycle>,
    begin: Option<Instant>,
    time: Duration,
}

impl BusDevice for Clock {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, _data: &[u8]) {
        if offset == 0 {
            self.begin = Some(Instant::now());
        } else if let Some(begin) = self.begin {
            self.time = begin.elapsed();
            self.life.end(ExitReason::GuestPowerOff, "the guest is done");
        }
    }
}

/// How long the guest takes for `count` accesses.
pub fn run(access: Access, count: u64) -> Duration {
    assert_eq!(CODE_ADDRESS, guest::CODE_ADDRESS);
    let machine = BareMachine::new(&guest::code(access, u32::try_from(count).unwrap())).unwrap();
    let counter = Arc::<Mutex<Counter>>::default();
    machine.buses.ports.insert(PORT.into(), 1, counter.clone()).unwrap();
    machine.buses.mmio.insert(ADDRESS.into(), 0x1000, counter.clone()).unwrap();
    let clock = Arc::new(Mutex::new(Clock { life: machine.lifecycle(), begin: None, time: Duration::ZERO }));
    machine.buses.ports.insert(BEGIN_PORT.into(), CLOCK_PORTS, clock.clone()).unwrap();
    surround(&machine);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    if access == Access::Notify {
        machine.interrupts().add_doorbell(Doorbell::Port(PORT), &event).unwrap();
    }
    let (exit, _) = machine.run();
    assert_eq!(exit.reason, ExitReason::GuestPowerOff, "{}", exit.detail);
    let seen = if access == Access::Notify { event.read().unwrap() } else { counter.lock().unwrap().0 };
    assert_eq!(seen, count);
    clock.lock().unwrap().time
}

/// As many other devices as a VM has, so that the bus has something to search.
fn surround(machine: &BareMachine) {
    for port in [0x20, 0x40, 0x60, 0x70, 0x80, 0x3f8, 0x600, 0x604, 0xcf8] {
        machine.buses.ports.insert(port, 1, Arc::<Mutex<Counter>>::default()).unwrap();
    }
    for index in 0..8 {
        let address = 0x80_0000_0000 + index * 0x8000;
        machine.buses.mmio.insert(address, 0x8000, Arc::<Mutex<Counter>>::default()).unwrap();
    }
}
