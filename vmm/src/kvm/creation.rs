//! A VM that KVM is making.

use std::panic::resume_unwind;
use std::thread::scope;

use bedplate_devices::Memory;
use bedplate_devices::threads;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VmFd};

use super::{KvmError, Vm, VmConfig, baseline, call, cpuid, missing_for_baselines, open, template};

/// To make a VM, beside the last one.
const ATTEMPTS: usize = 5;

/// KVM as it was found, and the processor that a VM is going to have.
pub struct Creation {
    kvm: Kvm,
    supported: CpuId,
}

/// A VM that has nothing yet.
pub struct Created {
    creation: Creation,
    fd: VmFd,
}

impl Creation {
    /// Checks KVM.
    ///
    /// # Errors
    /// There is no KVM, or it or the processor lacks what is needed.
    pub fn new(config: &VmConfig) -> Result<Self, KvmError> {
        let kvm = open(&config.cpu.kvm_capabilities)?;
        let mut supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("list processor features"))?;
        if let Some(baseline) = config.baseline {
            if let [missing, ..] = &missing_for_baselines(&kvm)[..] {
                return Err(KvmError::Baseline { baseline, missing: missing.clone(), best: None });
            }
            supported = baseline::apply(&supported, baseline)?;
        } else {
            cpuid::complete(&mut supported);
        }
        template::check(config.template)?;
        let supported = cpuid::templated(&supported, &config.cpu.cpuid_modifiers)?;
        Ok(Self { kvm, supported })
    }

    /// Number of bits in a guest-physical address.
    pub fn address_bits(&self) -> u8 {
        cpuid::address_bits(&self.supported)
    }

    /// Has KVM make it, and a thread do `meanwhile`; waits for both. KVM has little to do and waits long: for each VM it makes
    /// a thread of the kernel, and moving that into our control group takes a grace period of RCU, some ten milliseconds. It
    /// is the calling thread that asks it, since a new one begins only when this one gives way or its turn is over.
    ///
    /// # Errors
    /// KVM refuses, or the host has no thread left.
    pub fn create<T: Send>(self, meanwhile: impl FnOnce() -> T + Send) -> Result<(Created, T), KvmError> {
        scope(|scope| {
            let thread = threads::named("prepare").spawn_scoped(scope, meanwhile).map_err(KvmError::Thread)?;
            let fd = create_vm(&self.kvm);
            let done = thread.join().unwrap_or_else(|panic| resume_unwind(panic));
            let fd = fd.map_err(call("create a VM"))?;
            Ok((Created { creation: self, fd }, done))
        })
    }
}

/// KVM gives up when a signal comes for the thread that it waits with.
fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    for _ in 0..ATTEMPTS {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            made => return made,
        }
    }
    kvm.create_vm()
}

impl Created {
    /// Gives it `memory` and interrupt controllers. It has no vCPU yet.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn finish(self, memory: Memory, config: &VmConfig) -> Result<Vm, KvmError> {
        Vm::new(&self.creation.kvm, self.fd, self.creation.supported, memory, config)
    }
}
