//! One VM: its memory slots, interrupt controllers and vCPUs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bedplate_api::vmm::{CpuBaseline, CpuConfig, CpuTemplate, MsrModifier};
use bedplate_devices::Memory;
use kvm_bindings::{
    CpuId, KVM_CAP_SET_GUEST_DEBUG2, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, VolatileMemory};

use super::{Interrupts, KvmError, Topology, Vcpu, call, cpuid, msrs};
use crate::memory::layout;
use crate::pmem::FileMapping;

/// What a VM is like for KVM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmConfig {
    /// The processor, if it is one that has a name.
    pub baseline: Option<CpuBaseline>,
    /// Changes to it, or to the host's processor.
    pub cpu: CpuConfig,
    /// Whose changes these are: the host has to be of its models.
    pub template: CpuTemplate,
    /// Keep a log of the pages that the guest writes.
    pub log_dirty_pages: bool,
}

/// A VM.
pub struct Vm {
    fd: Arc<VmFd>,
    has_baseline: bool,
    msrs: Vec<MsrModifier>,
    supported: CpuId,
    interrupts: Interrupts,
    run_size: usize,
    max_vcpus: usize,
    debug_flags: u32,
    next_slot: AtomicU32,
    /// Kept because KVM knows the addresses of its mappings.
    memory: Memory,
    /// As `memory`.
    roms: Vec<MmapRegion>,
    files: Vec<FileSlot>,
    /// Numbers that files have left behind.
    free_slots: Vec<u32>,
}

/// A file in the guest's address space.
struct FileSlot {
    slot: u32,
    address: u64,
    /// As [`Vm::memory`].
    _mapping: Arc<FileMapping>,
}

impl Vm {
    /// What KVM has made, with `memory` and interrupt controllers: [`Created::finish`].
    pub(super) fn new(
        kvm: &Kvm,
        fd: VmFd,
        supported: CpuId,
        memory: Memory,
        config: &VmConfig,
    ) -> Result<Self, KvmError> {
        // Both are Intel's needs: a task segment and page table for real mode. They lie under the top of 4 GiB.
        fd.set_tss_address(layout::TSS as usize).map_err(call("place the task segment"))?;
        fd.set_identity_map_address(layout::IDENTITY_MAP).map_err(call("place the identity map"))?;
        fd.create_irq_chip().map_err(call("create interrupt controllers"))?;
        msrs::ask_for_exits(&fd);
        msrs::disable_counters(&fd);
        if config.baseline.is_some() {
            msrs::allow_only_listed(&fd)?;
        }
        let fd = Arc::new(fd);
        let vm = Self {
            has_baseline: config.baseline.is_some(),
            msrs: config.cpu.msr_modifiers.clone(),
            interrupts: Interrupts::new(Arc::clone(&fd))?,
            run_size: fd.run_size(),
            max_vcpus: kvm.get_max_vcpus(),
            debug_flags: u32::try_from(kvm.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into())).unwrap_or_default(),
            next_slot: AtomicU32::new(0),
            fd,
            supported,
            memory,
            roms: Vec::new(),
            files: Vec::new(),
            free_slots: Vec::new(),
        };
        vm.add_memory(config.log_dirty_pages)?;
        Ok(vm)
    }

    fn add_memory(&self, log_dirty_pages: bool) -> Result<(), KvmError> {
        for region in self.memory.iter() {
            let slot = kvm_userspace_memory_region {
                slot: self.next_slot.fetch_add(1, Ordering::Relaxed),
                flags: if log_dirty_pages { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the mapping is as large as the region says and lives as long as `self.memory`, which is dropped
            // after the VM's descriptor closes or with it; vCPUs hold a clone of neither and run only while the
            // machine holds this VM.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(call("map guest memory"))?;
        }
        Ok(())
    }

    /// Puts `bytes`, whole pages, at `address`, where the guest can read and execute them. Its writes there are exits to
    /// nobody, and no device reaches them.
    ///
    /// # Errors
    /// The host has no memory, or KVM refuses: something is there already.
    pub fn add_rom(&mut self, bytes: &[u8], address: u64) -> Result<(), KvmError> {
        const WHAT: &str = "map firmware";
        let host =
            |e: &dyn std::fmt::Display| KvmError::Call { what: WHAT, source: std::io::Error::other(e.to_string()) };
        let mapping = MmapRegion::new(bytes.len()).map_err(|e| host(&e))?;
        mapping.get_slice(0, bytes.len()).map_err(|e| host(&e))?.copy_from(bytes);
        let slot = kvm_userspace_memory_region {
            slot: self.next_slot.fetch_add(1, Ordering::Relaxed),
            flags: KVM_MEM_READONLY,
            guest_phys_addr: address,
            memory_size: mapping.size() as u64,
            userspace_addr: mapping.as_ptr() as u64,
        };
        // SAFETY: as in `add_memory`, with `self.roms` in the place of `self.memory`.
        unsafe { self.fd.set_user_memory_region(slot) }.map_err(call(WHAT))?;
        self.roms.push(mapping);
        Ok(())
    }

    /// Puts a file at `address`. What the guest writes to one that is mapped for reading is an exit.
    ///
    /// # Errors
    /// KVM refuses: something is there already.
    pub fn add_file(&mut self, mapping: &Arc<FileMapping>, address: u64) -> Result<(), KvmError> {
        let slot = self.free_slots.pop().unwrap_or_else(|| self.next_slot.fetch_add(1, Ordering::Relaxed));
        let region = kvm_userspace_memory_region {
            slot,
            flags: if mapping.read_only() { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: address,
            memory_size: mapping.len() as u64,
            userspace_addr: mapping.address() as u64,
        };
        // SAFETY: as in `add_memory`, with `self.files` in the place of `self.memory`; `remove_file` unmaps it first.
        if let Err(error) = unsafe { self.fd.set_user_memory_region(region) } {
            self.free_slots.push(slot);
            return Err(call("map a pmem device's file")(error));
        }
        self.files.push(FileSlot { slot, address, _mapping: Arc::clone(mapping) });
        Ok(())
    }

    /// Takes the file at `address` away from the guest, if there is one: when this returns no vCPU reaches it.
    ///
    /// # Errors
    /// KVM refuses. The file stays where it is.
    pub fn remove_file(&mut self, address: u64) -> Result<(), KvmError> {
        let Some(at) = self.files.iter().position(|file| file.address == address) else { return Ok(()) };
        // One of no bytes is none.
        let region = kvm_userspace_memory_region { slot: self.files[at].slot, ..Default::default() };
        // SAFETY: KVM forgets an address of this process, and learns none.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(call("unmap a pmem device's file"))?;
        self.free_slots.push(self.files.swap_remove(at).slot);
        Ok(())
    }

    /// Where interrupts and notifies are routed.
    pub fn interrupts(&self) -> Interrupts {
        self.interrupts.clone()
    }

    /// All vCPUs, with features and topology set, waiting at reset. Of those after the first `present` ones the guest
    /// reaches nothing until they come ([`Vcpu::come`]).
    ///
    /// # Errors
    /// More than KVM takes, or KVM refuses.
    pub fn create_vcpus(&self, topology: Topology, present: u8) -> Result<Vec<Vcpu>, KvmError> {
        if usize::from(topology.vcpus) > self.max_vcpus {
            return Err(KvmError::TooManyVcpus { asked: topology.vcpus.into(), limit: self.max_vcpus });
        }
        (0..topology.vcpus).map(|index| self.create_vcpu(index, topology, index < present)).collect()
    }

    fn create_vcpu(&self, index: u8, topology: Topology, is_present: bool) -> Result<Vcpu, KvmError> {
        let fd = self.fd.create_vcpu(index.into()).map_err(call("create a vCPU"))?;
        let cpuid = cpuid::for_vcpu(&self.supported, index, topology)?;
        fd.set_cpuid2(&cpuid).map_err(call("set processor features"))?;
        super::registers::initialise(&fd)?;
        if self.has_baseline {
            msrs::go_with_cpuid(&fd)?;
        }
        for modifier in &self.msrs {
            super::registers::modify(&fd, modifier)?;
        }
        if !is_present {
            super::registers::set_apic(&fd, false)?;
        }
        Vcpu::new(fd, index, is_present, self.run_size, self.debug_flags)
    }
}
