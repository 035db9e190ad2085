//! A VM that KVM is making.

use std::sync::Arc;
use std::thread::JoinHandle;

use bedplate_devices::Memory;
use bedplate_devices::threads;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VmFd};

use super::{KvmError, Vm, VmConfig, baseline, call, cpuid, missing_for_baselines, open};

/// KVM at work on a VM. It has little to do and waits long: for each VM it makes a thread of the kernel, and moving that into
/// our control group takes a grace period of RCU, some ten milliseconds. What needs no VM yet is done meanwhile.
pub struct Creation {
    kvm: Arc<Kvm>,
    supported: CpuId,
    /// `None` once it was joined.
    thread: Option<JoinHandle<Result<VmFd, kvm_ioctls::Error>>>,
}

impl Creation {
    /// Checks KVM, and has it begin.
    ///
    /// # Errors
    /// There is no KVM, or it or the processor lacks what is needed.
    pub fn begin(config: &VmConfig) -> Result<Self, KvmError> {
        let kvm = Arc::new(open(&config.cpu.kvm_capabilities)?);
        let mut supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("list processor features"))?;
        if let Some(baseline) = config.baseline {
            if let [missing, ..] = &missing_for_baselines(&kvm)[..] {
                return Err(KvmError::Baseline { baseline, missing: missing.clone(), best: None });
            }
            supported = baseline::apply(&supported, baseline)?;
        } else {
            cpuid::complete(&mut supported);
        }
        let supported = cpuid::templated(&supported, &config.cpu.cpuid_modifiers)?;
        let theirs = Arc::clone(&kvm);
        let thread = threads::named("create-vm").spawn(move || theirs.create_vm());
        let thread = thread.map_err(KvmError::Thread)?;
        Ok(Self { kvm, supported, thread: Some(thread) })
    }

    /// Number of bits in a guest-physical address.
    pub fn address_bits(&self) -> u8 {
        cpuid::address_bits(&self.supported)
    }

    /// Waits until it is there, and gives it `memory`, interrupt controllers and PIT. It has no vCPU yet.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn finish(mut self, memory: Memory, config: &VmConfig) -> Result<Vm, KvmError> {
        let made = self.thread.take().map(JoinHandle::join);
        let Some(Ok(made)) = made else { unreachable!("the thread makes one call and cannot panic") };
        let fd = made.map_err(call("create a VM"))?;
        Vm::new(&self.kvm, fd, self.supported.clone(), memory, config)
    }
}

impl Drop for Creation {
    fn drop(&mut self) {
        // Whoever gives up may go on with what wants a process of one thread.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
