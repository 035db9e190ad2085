//! One vCPU: run it, kick it out of the guest from another thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use bedplate_api::vmm::Registers;
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::run_page::RunPage;
use super::{Debug, DebugExit, Exit, KvmError, call, msrs};
use crate::boot::Entry;

/// A vCPU. Run by one thread, from the first run to the last.
pub struct Vcpu {
    pub(super) fd: VcpuFd,
    page: Arc<RunPage>,
    thread: Arc<AtomicI32>,
    index: u8,
    is_present: bool,
    /// What a debugger wants.
    pub(super) debug: Debug,
    /// What of it this host's KVM can do beyond the usual, as flags of `KVM_SET_GUEST_DEBUG`.
    pub(super) debug_flags: u32,
}

/// Makes one vCPU leave the guest soon, from any thread, also after the vCPU is gone.
#[derive(Clone)]
pub struct Kicker {
    page: Arc<RunPage>,
    /// Kernel id of the vCPU's thread; 0 before its first run and after its last.
    thread: Arc<AtomicI32>,
}

impl Kicker {
    /// The vCPU's current run, or if it is between two, the next one, ends with [`Exit::Interrupted`].
    pub fn kick(&self) {
        self.page.set_immediate_exit(true);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: plain system call. A signal to a thread that has just ended is refused by the kernel, and the
            // handler does nothing. Its result has no meaning: a thread that is not there needs no kick.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
        }
    }

    /// The vCPU may run again. For its own thread, when it has seen the kick.
    pub fn clear(&self) {
        self.page.set_immediate_exit(false);
    }
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the handler, empty, of the signal that kicks vCPUs. Once per process; again does no harm.
///
/// # Errors
/// The kernel refuses to set a signal handler.
pub fn install_kick_signal() -> Result<(), KvmError> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(|e| KvmError::Call {
        what: "install the signal that kicks vCPUs",
        source: std::io::Error::from_raw_os_error(e.errno()),
    })
}

impl Vcpu {
    pub(super) fn new(
        fd: VcpuFd,
        index: u8,
        is_present: bool,
        run_size: usize,
        debug_flags: u32,
    ) -> Result<Self, KvmError> {
        use std::os::fd::{AsRawFd, BorrowedFd};
        // SAFETY: `fd` outlives this borrow, which ends with the call below.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        let page = RunPage::map(borrowed, run_size)
            .map_err(|source| KvmError::Call { what: "share the run page of a vCPU", source })?;
        let (thread, debug) = (Arc::default(), Debug::default());
        Ok(Self { fd, page: Arc::new(page), thread, index, is_present, debug, debug_flags })
    }

    /// Its number, which is its APIC id.
    pub const fn index(&self) -> u8 {
        self.index
    }

    /// Whether the guest can have it run.
    pub const fn is_present(&self) -> bool {
        self.is_present
    }

    /// From now on the guest can have it run: its interrupt controller takes messages.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn come(&mut self) -> Result<(), KvmError> {
        if !self.is_present {
            super::registers::set_apic(&self.fd, true)?;
            self.is_present = true;
        }
        Ok(())
    }

    /// A handle to make it leave the guest.
    pub fn kicker(&self) -> Kicker {
        Kicker { page: Arc::clone(&self.page), thread: Arc::clone(&self.thread) }
    }

    /// Puts the vCPU where the boot protocol wants it. For the first vCPU; the others wait to be woken by it.
    ///
    /// # Errors
    /// KVM refuses the state.
    pub fn enter_at(&self, entry: Entry) -> Result<(), KvmError> {
        super::registers::apply(&self.fd, entry)
    }

    /// Claims the vCPU for the calling thread until [`Vcpu::detach`]: kicks go to it.
    pub fn attach(&self) {
        // SAFETY: plain system call without arguments. Thread ids fit an i32 (the kernel's pid_t).
        let thread = unsafe { libc::syscall(libc::SYS_gettid) } as i32;
        self.thread.store(thread, Ordering::SeqCst);
    }

    /// The calling thread will run it no more.
    pub fn detach(&self) {
        self.thread.store(0, Ordering::SeqCst);
    }

    /// Tells the guest's clock that it stood still, so that its watchdogs do not bark.
    pub fn note_pause(&self) {
        // Refused where the guest does not use the paravirtual clock: then there is nobody to tell.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Where the guest stands, for messages; zeros where KVM does not say.
    pub fn describe(&self) -> String {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let (cr3, idt_limit) = self.fd.get_sregs().map_or((0, 0), |sregs| (sregs.cr3, sregs.idt.limit));
        format!("vCPU {} at rip {rip:#x}, cr3 {cr3:#x}, idt limit {idt_limit:#x}", self.index)
    }

    /// The guest's registers. For the vCPU's own thread, between two runs.
    ///
    /// # Errors
    /// KVM does not give them.
    pub fn registers(&self) -> Result<Registers, KvmError> {
        let regs = self.fd.get_regs().map_err(call("read the registers of a vCPU"))?;
        let sregs = self.fd.get_sregs().map_err(call("read the special registers of a vCPU"))?;
        Ok(Registers {
            rip: regs.rip,
            rflags: regs.rflags,
            rax: regs.rax,
            rbx: regs.rbx,
            rcx: regs.rcx,
            rdx: regs.rdx,
            rsi: regs.rsi,
            rdi: regs.rdi,
            rsp: regs.rsp,
            rbp: regs.rbp,
            r8: regs.r8,
            r9: regs.r9,
            r10: regs.r10,
            r11: regs.r11,
            r12: regs.r12,
            r13: regs.r13,
            r14: regs.r14,
            r15: regs.r15,
            cr0: sregs.cr0,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            cs: sregs.cs.selector,
            ss: sregs.ss.selector,
            fs_base: sregs.fs.base,
            gs_base: sregs.gs.base,
        })
    }

    /// Whether the guest threw away its interrupt table, which is how software resets a PC by a triple fault.
    pub fn has_no_idt(&self) -> bool {
        self.fd.get_sregs().is_ok_and(|sregs| sregs.idt.limit == 0)
    }

    /// Whether it does not wait for another vCPU to start it.
    pub fn is_started(&self) -> bool {
        self.fd.get_mp_state().is_ok_and(|state| state.mp_state == KVM_MP_STATE_RUNNABLE)
    }

    /// Runs the guest until it exits.
    ///
    /// # Errors
    /// KVM refuses to run it at all: a host fault.
    #[inline]
    pub fn run(&mut self) -> Result<Exit<'_>, KvmError> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(e) if e.errno() == libc::EINTR => return Ok(Exit::Interrupted),
            Err(e) if e.errno() == libc::EAGAIN => return Ok(Exit::NotRun),
            Err(e) if e.errno() == libc::EFAULT => return Err(KvmError::Unbacked),
            Err(e) => return Err(call("run a vCPU")(e)),
        };
        Ok(match exit {
            VcpuExit::IoIn(port, data) => Exit::PortRead { port, width: self.page.port_width(), data },
            VcpuExit::IoOut(port, data) => Exit::PortWrite { port, width: self.page.port_width(), data },
            VcpuExit::MmioRead(address, data) => Exit::MmioRead { address, data },
            VcpuExit::MmioWrite(address, data) => Exit::MmioWrite { address, data },
            VcpuExit::X86Rdmsr(read) => {
                let faults = !msrs::is_harmless(read.index);
                (*read.data, *read.error) = (0, faults.into());
                Exit::Msr { register: read.index, write: false, faults }
            }
            VcpuExit::X86Wrmsr(write) => {
                let faults = !msrs::is_harmless(write.index);
                *write.error = faults.into();
                Exit::Msr { register: write.index, write: true, faults }
            }
            VcpuExit::Debug(exit) => Exit::Debug(DebugExit { exception: exit.exception, pc: exit.pc, dr6: exit.dr6 }),
            VcpuExit::Intr => Exit::Interrupted,
            VcpuExit::Hlt => Exit::Halted,
            VcpuExit::Shutdown => Exit::Shutdown,
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Exit::Reset,
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Exit::PowerOff,
            VcpuExit::SystemEvent(kind, _) => Exit::SystemEvent(kind),
            VcpuExit::InternalError => Exit::InternalError(self.page.internal_error()),
            VcpuExit::FailEntry(reason, _) => Exit::FailedEntry { reason },
            VcpuExit::Unknown => Exit::Other("unknown"),
            VcpuExit::Hypercall(_) => Exit::Other("hypercall"),
            _ => Exit::Other("unexpected"),
        })
    }
}
