//! Run, pause, end: what all threads of a machine agree on.
//!
//! A vCPU thread looks here only when it was kicked, so that a guest exit costs nothing for it.

use std::sync::{Condvar, Mutex, MutexGuard, OnceLock};

use bedplate_api::vmm::{Exit, ExitReason};
use vmm_sys_util::eventfd::EventFd;

use crate::kvm::Kicker;

/// What the vCPUs shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Run,
    Pause,
    End,
}

#[derive(Debug)]
struct State {
    target: Target,
    /// vCPU threads that have not ended.
    alive: usize,
    /// Of these, those that stand still.
    parked: usize,
}

/// Shared by the vCPU threads, the devices that can end the machine, and control.
pub struct Lifecycle {
    /// Never held while a kicker is used or a device is called.
    state: Mutex<State>,
    changed: Condvar,
    kickers: OnceLock<Vec<Kicker>>,
    exit: OnceLock<Exit>,
    ended: EventFd,
}

impl Lifecycle {
    /// Of a machine that runs as soon as it has vCPUs. `ended` is signalled when it has ended.
    pub fn new(ended: EventFd) -> Self {
        Self {
            state: Mutex::new(State { target: Target::Run, alive: 0, parked: 0 }),
            changed: Condvar::new(),
            kickers: OnceLock::new(),
            exit: OnceLock::new(),
            ended,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Names the vCPUs, once, before the first of them runs.
    pub fn set_vcpus(&self, kickers: Vec<Kicker>) {
        self.lock().alive = kickers.len();
        // A second call would be our bug and changes nothing.
        let _ = self.kickers.set(kickers);
    }

    /// How it ended, once it has.
    pub fn exit(&self) -> Option<&Exit> {
        self.exit.get()
    }

    /// Ends the machine, from any thread. The first reason stays. vCPUs leave the guest soon after; they are not waited
    /// for.
    pub fn end(&self, reason: ExitReason, detail: impl Into<String>) {
        if self.exit.set(Exit { reason, detail: detail.into() }).is_ok() {
            self.aim(Target::End);
            // Fails only where 2^64 - 2 signals wait to be read.
            let _ = self.ended.write(1);
        }
    }

    /// Stops all vCPUs; returns when none runs. False where the machine has ended.
    pub fn pause(&self) -> bool {
        self.aim(Target::Pause);
        let state = self.lock();
        let wait = |state: &mut State| state.target == Target::Pause && state.parked < state.alive;
        let state = self.changed.wait_while(state, wait).unwrap_or_else(|e| e.into_inner());
        state.target == Target::Pause
    }

    /// Lets them go on.
    pub fn resume(&self) {
        self.aim(Target::Run);
    }

    fn aim(&self, target: Target) {
        {
            let mut state = self.lock();
            if state.target == Target::End {
                return;
            }
            state.target = target;
        }
        self.changed.notify_all();
        self.kickers.get().into_iter().flatten().for_each(Kicker::kick);
    }

    /// For a vCPU thread that was kicked: stands still as long as it must; true when it shall run again. `paused` is
    /// called first if it has to wait.
    pub fn checkpoint(&self, kicker: &Kicker, paused: impl FnOnce()) -> bool {
        // Before the look at the target: a target that is set after the look comes with a kick of its own.
        kicker.clear();
        let mut state = self.lock();
        if state.target == Target::Pause {
            paused();
            state.parked += 1;
            self.changed.notify_all();
            state = self.changed.wait_while(state, |s| s.target == Target::Pause).unwrap_or_else(|e| e.into_inner());
            state.parked -= 1;
        }
        state.target == Target::Run
    }

    /// For a vCPU thread that ends.
    pub fn leave(&self) {
        self.lock().alive -= 1;
        self.changed.notify_all();
    }
}
