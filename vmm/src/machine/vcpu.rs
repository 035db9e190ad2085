//! The loop of a vCPU thread: every exit is dispatched here, in one `match`.

use std::sync::Arc;
use std::thread::panicking;
use std::time::{Duration, Instant};

use bedplate_api::vmm::ExitReason;
use bedplate_devices::bus::Bus;

use super::counters::ExitCounters;
use super::lifecycle::{Lifecycle, Stop};
use super::unknown_msrs::UnknownMsrs;
use crate::kvm::{Exit, KvmError, Vcpu};

/// The two address spaces of devices.
#[derive(Clone)]
pub struct Buses {
    /// Port I/O.
    pub ports: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
}

impl Buses {
    /// Two empty ones.
    pub fn new() -> Self {
        Self { ports: Arc::new(Bus::new()), mmio: Arc::new(Bus::new()) }
    }
}

impl Default for Buses {
    fn default() -> Self {
        Self::new()
    }
}

/// Runs `vcpu` on the calling thread until the machine ends. Whatever ends it is told to `life`.
///
/// Nothing here allocates, logs or takes a lock that another vCPU holds for long, except for the few registers that are
/// named to `unknown` first.
pub fn run(vcpu: &mut Vcpu, buses: &Buses, life: &Lifecycle, counters: &ExitCounters, unknown: &UnknownMsrs) {
    let kicker = vcpu.kicker();
    let seat = Seat::take(vcpu, life);
    let vcpu = &mut *seat.vcpu;
    // One that has not come stands still there.
    let mut goes_on = life.checkpoint(vcpu, &kicker);
    let mut refusals = Refusals { begun: Instant::now(), last: 0, count: 0 };
    while goes_on {
        match vcpu.run() {
            Ok(Exit::PortRead { port, width, data }) => {
                counters.port_read(port, data.len());
                for item in data.chunks_exact_mut(width.max(1)) {
                    if !buses.ports.read(port.into(), item) {
                        counters.unknown_port.count();
                    }
                }
            }
            Ok(Exit::PortWrite { port, width, data }) => {
                counters.port_write(port, data.len());
                for item in data.chunks_exact(width.max(1)) {
                    if !buses.ports.write(port.into(), item) {
                        counters.unknown_port.count();
                    }
                }
            }
            Ok(Exit::MmioRead { address, data }) => {
                counters.mmio_read(address, data.len());
                if !buses.mmio.read(address, data) {
                    counters.unknown_mmio.count();
                }
            }
            Ok(Exit::MmioWrite { address, data }) => {
                counters.mmio_write(address, data.len());
                if !buses.mmio.write(address, data) {
                    counters.unknown_mmio.count();
                }
            }
            Ok(Exit::Msr { register, write, faults }) => {
                counters.msr(register, write, faults);
                if faults {
                    unknown.note(register, write);
                }
            }
            Ok(Exit::Interrupted) => {
                counters.interrupted();
                goes_on = life.checkpoint(vcpu, &kicker);
            }
            Ok(Exit::NotRun) => {
                counters.interrupted();
                if refusals.are_too_many(counters.all()) && vcpu.is_started() {
                    finish(vcpu, life, End::Host(KvmError::NoThread.to_string()));
                    goes_on = false;
                } else {
                    goes_on = life.checkpoint(vcpu, &kicker);
                }
            }
            Ok(Exit::Debug(exit)) => {
                counters.other();
                match vcpu.sort_out(exit) {
                    Ok(None) => {}
                    Ok(Some(trap)) => {
                        life.stopped(Stop { vcpu: vcpu.index().into(), trap });
                        goes_on = life.checkpoint(vcpu, &kicker);
                    }
                    Err(error) => {
                        finish(vcpu, life, End::Host(error.to_string()));
                        goes_on = false;
                    }
                }
            }
            other => {
                counters.other();
                let end = classify(other);
                if let Some(end) = end {
                    finish(vcpu, life, end);
                    goes_on = false;
                }
            }
        }
    }
}

/// The calling thread's, as that of a vCPU.
struct Seat<'a> {
    vcpu: &'a mut Vcpu,
    life: &'a Lifecycle,
}

impl<'a> Seat<'a> {
    fn take(vcpu: &'a mut Vcpu, life: &'a Lifecycle) -> Self {
        vcpu.attach();
        Self { vcpu, life }
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.vcpu.detach();
        let index = self.vcpu.index();
        if panicking() {
            self.life
                .end(ExitReason::HostFault, format!("the thread of vCPU {index} has died: a fault of bedplate-vmm"));
        }
        self.life.leave(index.into());
    }
}

/// Runs in a row that were none. A vCPU that is started by another one, and again after the guest has switched it off, has a few.
struct Refusals {
    begun: Instant,
    /// The number of the last one, among all exits.
    last: u64,
    count: u32,
}

impl Refusals {
    /// So many within so short a time are no guest's doing.
    const MOST: u32 = 1000;
    const TIME: Duration = Duration::from_secs(1);

    /// Counts one, which is exit number `exit`.
    #[cold]
    fn are_too_many(&mut self, exit: u64) -> bool {
        if exit != self.last + 1 || self.begun.elapsed() > Self::TIME {
            (self.begun, self.count) = (Instant::now(), 0);
        }
        (self.last, self.count) = (exit, self.count + 1);
        self.count >= Self::MOST
    }
}

/// An exit after which this vCPU runs no more.
enum End {
    Shutdown,
    Reset,
    PowerOff,
    Guest(String),
    Host(String),
    Unbacked(String),
}

/// The seldom exits.
fn classify(exit: Result<Exit<'_>, KvmError>) -> Option<End> {
    match exit {
        Ok(Exit::Shutdown) => Some(End::Shutdown),
        Ok(Exit::Reset) => Some(End::Reset),
        Ok(Exit::PowerOff) => Some(End::PowerOff),
        Ok(Exit::SystemEvent(kind)) => Some(End::Guest(format!("KVM reports system event {kind}"))),
        Ok(Exit::InternalError(detail)) => Some(End::Host(format!("KVM internal error: {detail}"))),
        Ok(Exit::FailedEntry { reason }) => {
            Some(End::Host(format!("the processor refuses to enter the guest ({reason:#x})")))
        }
        Ok(Exit::Halted) => Some(End::Guest("halted without an interrupt controller".into())),
        Err(error @ KvmError::Unbacked) => Some(End::Unbacked(error.to_string())),
        Err(error) => Some(End::Host(error.to_string())),
        Ok(_) => None,
    }
}

fn finish(vcpu: &Vcpu, life: &Lifecycle, end: End) {
    let place = vcpu.describe();
    match end {
        // A PC resets on a triple fault, and Linux's `reboot=t` uses that, with an empty interrupt table. Any other one
        // is a crash; AMD's processors forget the difference, and there it counts as a crash, too.
        End::Shutdown if vcpu.has_no_idt() => {
            life.end(ExitReason::GuestReset, "the guest reset itself by a triple fault")
        }
        End::Shutdown => life.end(ExitReason::GuestFault, format!("triple fault: {place}")),
        End::Reset => life.end(ExitReason::GuestReset, "the guest asked KVM for a reset"),
        End::PowerOff => life.end(ExitReason::GuestPowerOff, "the guest asked KVM for power off"),
        End::Guest(what) => life.end(ExitReason::GuestFault, format!("{what}: {place}")),
        End::Unbacked(what) => life.end(ExitReason::HostFault, format!("{what}: {}; {place}", life.why_unbacked())),
        End::Host(what) => life.end(ExitReason::HostFault, format!("{what}: {place}")),
    }
}
