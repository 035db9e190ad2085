//! A VM with one vCPU in real mode and some code: for tests and benchmarks, which need exits and no Linux.

use std::sync::Arc;

use bedplate_api::vmm::{Exit, ExitCounts, ExitReason};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::BuildError;
use super::counters::ExitCounters;
use super::lifecycle::Lifecycle;
use super::unknown_msrs::UnknownMsrs;
use super::vcpu::{self, Buses};
use crate::boot::{BootError, Entry};
use crate::kvm::{Creation, Interrupts, Topology, Vcpu, Vm, VmConfig, install_kick_signal};
use crate::memory::{Pages, Ram};

/// Where the code lies and begins.
pub const CODE_ADDRESS: u16 = 0x1000;
const MEMORY_MIB: u64 = 2;

/// The VM. Devices are put on its buses; one of them, or another thread, ends it.
pub struct BareMachine {
    /// Devices.
    pub buses: Buses,
    life: Arc<Lifecycle>,
    counters: ExitCounters,
    vcpu: Vcpu,
    vm: Vm,
    ram: Ram,
}

impl BareMachine {
    /// A VM that will execute `code` in real mode, all segments at 0.
    ///
    /// # Errors
    /// There is no KVM, or it refuses.
    pub fn new(code: &[u8]) -> Result<Self, BuildError> {
        install_kick_signal()?;
        let ram = Ram::new(MEMORY_MIB, Pages::Normal)?;
        ram.memory
            .write_slice(code, GuestAddress(CODE_ADDRESS.into()))
            .map_err(|e| BootError::Structures(e.to_string()))?;
        let config = VmConfig::default();
        let (created, ()) = Creation::new(&config)?.create(|| ())?;
        let vm = created.finish(Arc::clone(&ram.memory), &config)?;
        let mut vcpus = vm.create_vcpus(Topology { vcpus: 1, threads_per_core: 1 }, 1)?;
        let Some(vcpu) = vcpus.pop() else { unreachable!("one was asked for") };
        vcpu.enter_at(Entry::Real { address: CODE_ADDRESS })?;
        let ended = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(BuildError::Host)?;
        let life = Arc::new(Lifecycle::new(ended));
        life.set_vcpus(vec![vcpu.kicker()]);
        Ok(Self { buses: Buses::new(), life, counters: ExitCounters::default(), vcpu, vm, ram })
    }

    /// What ends it: call [`Lifecycle::end`] from a device or from another thread.
    pub fn lifecycle(&self) -> Arc<Lifecycle> {
        Arc::clone(&self.life)
    }

    /// Interrupts and notifies.
    pub fn interrupts(&self) -> Interrupts {
        self.vm.interrupts()
    }

    /// Its memory.
    pub const fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Runs the vCPU on the calling thread until the machine has ended; says how, and what was counted.
    pub fn run(mut self) -> (Exit, ExitCounts) {
        let unknown = UnknownMsrs::new(Box::new(|_| {}));
        vcpu::run(&mut self.vcpu, &self.buses, &self.life, &self.counters, &unknown);
        let mut counts = ExitCounts::default();
        self.counters.add_to(&mut counts);
        let exit = self.life.exit().cloned();
        (
            exit.unwrap_or(Exit { reason: ExitReason::HostFault, detail: "the vCPU left without a reason".into() }),
            counts,
        )
    }
}
