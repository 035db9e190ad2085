//! The guest as the debugger's protocol sees it: a process whose threads are the vCPUs.

use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;

use bedplate_devices::Memory;
use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints as BreakpointsExt, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps,
    SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};

use super::breakpoints::Breakpoints;
use super::registers::{Registers, X86_64};
use crate::kvm::{Debug, HardwareBreakpoint, On, Trap, Vcpu};
use crate::machine::lifecycle::{Lifecycle, Stop};

/// A vCPU that stands still answers at once; its thread may have to wait for a processor.
const PATIENCE: Duration = Duration::from_secs(10);
const PAGE: u64 = 4096;
/// What a debugger is told of an address that is not there, and of a request that makes no sense.
const EFAULT: u8 = 14;
const EINVAL: u8 = 22;

/// What a vCPU shall do when the guest goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Run,
    Step,
    Stay,
}

/// A vCPU did not do what it was asked for: the machine ends.
#[derive(Debug, thiserror::Error)]
#[error("a vCPU does not answer")]
pub(super) struct Silent;

/// The guest, which stands still unless it was resumed.
pub(super) struct Guest {
    life: Arc<Lifecycle>,
    breakpoints: Breakpoints,
    /// By vCPU, where the debugger has said it.
    acts: Vec<Option<Act>>,
    /// Of the others.
    rest: Act,
    /// The one that stopped last; its page tables are those that a breakpoint's address is looked up in first.
    current: usize,
}

/// As the protocol numbers vCPUs: from 1 on.
fn tid(vcpu: usize) -> Tid {
    NonZero::new(vcpu + 1).unwrap_or(NonZero::<usize>::MIN)
}

impl Guest {
    pub fn new(life: Arc<Lifecycle>, memory: Memory, vcpus: usize) -> Self {
        let (acts, rest) = (vec![None; vcpus], Act::Run);
        Self { life, breakpoints: Breakpoints::new(memory), acts, rest, current: 0 }
    }

    fn ask<T: Send + 'static>(
        &self,
        vcpu: usize,
        question: impl FnOnce(&mut Vcpu) -> T + Send + 'static,
    ) -> Result<T, TargetError<Silent>> {
        self.life.ask(vcpu, question).recv_timeout(PATIENCE).map_err(|_| TargetError::Fatal(Silent))
    }

    fn vcpu(&self, tid: Tid) -> Result<usize, TargetError<Silent>> {
        Some(tid.get() - 1).filter(|vcpu| *vcpu < self.acts.len()).ok_or(TargetError::Errno(EINVAL))
    }

    /// Guest-physical pieces of a range of guest-virtual addresses, as far as it is mapped.
    fn pieces(&self, vcpu: usize, start: u64, len: usize) -> Result<Vec<(u64, usize)>, TargetError<Silent>> {
        let translate = move |vcpu: &mut Vcpu| {
            let mut pieces = Vec::new();
            let (mut at, mut left) = (start, len);
            while left > 0 {
                // At most a page.
                let piece = left.min((PAGE - at % PAGE) as usize);
                let Ok(Some(physical)) = vcpu.translate(at) else { break };
                pieces.push((physical, piece));
                left -= piece;
                let Some(next) = at.checked_add(piece as u64) else { break };
                at = next;
            }
            pieces
        };
        self.ask(vcpu, translate)
    }

    /// Where a breakpoint's address is: in some vCPU's page tables.
    fn physical(&self, address: u64) -> Result<Option<u64>, TargetError<Silent>> {
        let others = (0..self.acts.len()).filter(|vcpu| *vcpu != self.current);
        for vcpu in std::iter::once(self.current).chain(others) {
            if let Some((physical, _)) = self.pieces(vcpu, address, 1)?.first() {
                return Ok(Some(*physical));
            }
        }
        Ok(None)
    }

    fn act(&self, vcpu: usize) -> Act {
        self.acts.get(vcpu).copied().flatten().unwrap_or(self.rest)
    }

    /// Tells each vCPU what the debugger wants of it.
    fn arm(&self) -> Result<(), TargetError<Silent>> {
        for vcpu in 0..self.acts.len() {
            let step = self.act(vcpu) == Act::Step;
            let (software, hardware) = (self.breakpoints.software(), self.breakpoints.hardware());
            let debug = Debug { step, software, hardware };
            self.ask(vcpu, move |vcpu| vcpu.set_debug(debug))?
                .map_err(|error| TargetError::Io(std::io::Error::other(error)))?;
        }
        Ok(())
    }

    /// Why the guest has stopped by itself. All vCPUs stand still, or the machine has ended.
    pub fn stop_reason(&mut self) -> Option<MultiThreadStopReason<u64>> {
        let exited = |guest: &Self| Some(MultiThreadStopReason::Exited(guest.life.exit()?.reason.code()));
        // Without one, nothing has stopped, and nothing is to be.
        let Some(stop) = self.life.take_stop() else { return exited(self) };
        if !self.life.hold() {
            return exited(self);
        }
        self.current = stop.vcpu;
        let tid = tid(stop.vcpu);
        Some(match stop.trap {
            Trap::Step => MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGTRAP },
            Trap::Software => MultiThreadStopReason::SwBreak(tid),
            Trap::Hardware(HardwareBreakpoint { on: On::Execution, .. }) => MultiThreadStopReason::HwBreak(tid),
            Trap::Hardware(HardwareBreakpoint { on: On::Write, address, .. }) => {
                MultiThreadStopReason::Watch { tid, kind: WatchKind::Write, addr: address }
            }
            Trap::Hardware(HardwareBreakpoint { on: On::ReadOrWrite, address, .. }) => {
                MultiThreadStopReason::Watch { tid, kind: WatchKind::ReadWrite, addr: address }
            }
        })
    }

    /// Stops the guest because the debugger wants it; false where the machine has ended.
    pub fn hold(&self) -> bool {
        self.life.hold()
    }

    /// What is said after [`Guest::hold`].
    pub fn interrupted(&self) -> MultiThreadStopReason<u64> {
        MultiThreadStopReason::SignalWithThread { tid: tid(self.current), signal: Signal::SIGINT }
    }

    /// Lets the guest run as if there had never been a debugger.
    pub fn let_go(&mut self) {
        if !self.life.hold() {
            return;
        }
        self.breakpoints.clear();
        self.acts.fill(None);
        self.rest = Act::Run;
        // Refused or silent only where the machine ends.
        let _ = self.arm();
        self.life.forget_stops(|_| true);
        self.life.release(|_| false);
    }
}

fn is_watchpoint(stop: &Stop) -> bool {
    matches!(stop.trap, Trap::Hardware(breakpoint) if breakpoint.on != On::Execution)
}

impl Target for Guest {
    type Arch = X86_64;
    type Error = Silent;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    /// Removing one that is not there does no harm.
    fn guard_rail_implicit_sw_breakpoints(&self) -> bool {
        true
    }
}

impl MultiThreadBase for Guest {
    fn read_registers(&mut self, regs: &mut Registers, tid: Tid) -> TargetResult<(), Self> {
        let state = self.ask(self.vcpu(tid)?, |vcpu| vcpu.state())?;
        *regs = Registers::of(&state.map_err(std::io::Error::other)?);
        Ok(())
    }

    fn write_registers(&mut self, regs: &Registers, tid: Tid) -> TargetResult<(), Self> {
        let regs = regs.clone();
        let write = move |vcpu: &mut Vcpu| {
            let mut state = vcpu.state().ok()?;
            regs.put(&mut state).ok()?;
            vcpu.set_state(&state).ok()
        };
        self.ask(self.vcpu(tid)?, write)?.ok_or(TargetError::Errno(EINVAL))
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let mut done = 0;
        for (physical, len) in self.pieces(self.vcpu(tid)?, start, data.len())? {
            if !self.breakpoints.read(physical, &mut data[done..done + len]) {
                break;
            }
            done += len;
        }
        if done == 0 && !data.is_empty() { Err(TargetError::Errno(EFAULT)) } else { Ok(done) }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let mut left = data;
        for (physical, len) in self.pieces(self.vcpu(tid)?, start, data.len())? {
            let (piece, rest) = left.split_at(len);
            if !self.breakpoints.write(physical, piece) {
                break;
            }
            left = rest;
        }
        if left.is_empty() { Ok(()) } else { Err(TargetError::Errno(EFAULT)) }
    }

    fn list_active_threads(&mut self, each: &mut dyn FnMut(Tid)) -> Result<(), Self::Error> {
        (0..self.acts.len()).map(tid).for_each(each);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl ThreadExtraInfo for Guest {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, Self::Error> {
        let name = format!("vCPU {}", tid.get() - 1);
        let len = name.len().min(buf.len());
        buf[..len].copy_from_slice(&name.as_bytes()[..len]);
        Ok(len)
    }
}

impl MultiThreadResume for Guest {
    fn resume(&mut self) -> Result<(), Self::Error> {
        // Registers that KVM refuses end the conversation, and with it what was refused.
        self.arm().map_err(|_| Silent)?;
        // Another vCPU that came to a breakpoint at the same time comes to it again; to an access that it has made it does not.
        self.life.forget_stops(|stop| !is_watchpoint(stop));
        self.life.release(|vcpu| self.act(vcpu) == Act::Stay);
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Self::Error> {
        self.acts.fill(None);
        self.rest = Act::Run;
        Ok(())
    }

    /// A guest knows no signals.
    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Self::Error> {
        self.set_act(tid, Act::Run);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl Guest {
    /// Of a vCPU that is not there, nothing.
    fn set_act(&mut self, tid: Tid, act: Act) {
        if let Some(place) = self.acts.get_mut(tid.get() - 1) {
            *place = Some(act);
        }
    }
}

impl MultiThreadSingleStep for Guest {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Self::Error> {
        self.set_act(tid, Act::Step);
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Guest {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Self::Error> {
        self.rest = Act::Stay;
        Ok(())
    }
}

impl BreakpointsExt for Guest {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Guest {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let physical = self.physical(address)?.ok_or(TargetError::Errno(EFAULT))?;
        Ok(self.breakpoints.add_software(address, physical))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.remove_software(address))
    }
}

impl HwBreakpoint for Guest {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.add_hardware(HardwareBreakpoint { address, len: 1, on: On::Execution }))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.remove_hardware(HardwareBreakpoint { address, len: 1, on: On::Execution }))
    }
}

/// What a breakpoint register can watch; nothing, if it cannot.
fn watched(address: u64, len: u64, kind: WatchKind) -> Option<HardwareBreakpoint> {
    let on = match kind {
        WatchKind::Write => On::Write,
        WatchKind::ReadWrite => On::ReadOrWrite,
        WatchKind::Read => return None,
    };
    let fits = matches!(len, 1 | 2 | 4 | 8) && address.is_multiple_of(len);
    fits.then_some(HardwareBreakpoint { address, len, on })
}

impl HwWatchpoint for Guest {
    fn add_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        Ok(watched(address, len, kind).is_some_and(|watched| self.breakpoints.add_hardware(watched)))
    }

    fn remove_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        Ok(watched(address, len, kind).is_some_and(|watched| self.breakpoints.remove_hardware(watched)))
    }
}
