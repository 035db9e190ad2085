//! Run, pause, end: what all threads of a machine agree on; and which vCPUs are there yet.
//!
//! A vCPU thread looks here only when it was kicked, so that a guest exit costs nothing for it.

use std::sync::{Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use bedplate_api::vmm::{Exit, ExitReason, Registers};
use vmm_sys_util::eventfd::EventFd;

use crate::kvm::{Kicker, Vcpu};
use crate::pmem::{self, Witness};

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
    /// The first so many vCPUs shall be there;
    wanted: usize,
    /// and this many are, which no longer change.
    present: usize,
    /// By vCPU: what control wants to see of it.
    looks: Vec<Look>,
}

/// A look at the registers of a vCPU, which only its own thread can take.
#[derive(Debug, Clone, Default)]
enum Look {
    #[default]
    Unwanted,
    Wanted,
    /// Empty where KVM gives none.
    Taken(Option<Box<Registers>>),
}

/// Shared by the vCPU threads, the devices that can end the machine, and control.
pub struct Lifecycle {
    /// Never held while a kicker is used or a device is called; a vCPU reads its registers under it.
    state: Mutex<State>,
    changed: Condvar,
    kickers: OnceLock<Vec<Kicker>>,
    files: OnceLock<Vec<Witness>>,
    exit: OnceLock<Exit>,
    ended: EventFd,
}

impl Lifecycle {
    /// Of a machine that runs as soon as it has vCPUs. `ended` is signalled when it has ended.
    pub fn new(ended: EventFd) -> Self {
        Self {
            state: Mutex::new(State {
                target: Target::Run,
                alive: 0,
                parked: 0,
                wanted: 0,
                present: 0,
                looks: Vec::new(),
            }),
            changed: Condvar::new(),
            kickers: OnceLock::new(),
            files: OnceLock::new(),
            exit: OnceLock::new(),
            ended,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Names the vCPUs, once, before the first of them runs. The first `present` are there.
    pub fn set_vcpus(&self, kickers: Vec<Kicker>, present: usize) {
        {
            let mut state = self.lock();
            state.alive = kickers.len();
            (state.wanted, state.present) = (present, present);
            state.looks.resize(kickers.len(), Look::Unwanted);
        }
        // A second call would be our bug and changes nothing.
        let _ = self.kickers.set(kickers);
        // Who wanted something before has kicked nobody.
        if self.lock().target != Target::Run {
            self.kick_all();
        }
    }

    /// Names the files in the guest's memory, once, before the first vCPU runs.
    pub fn set_files(&self, files: Vec<Witness>) {
        // A second call would be our bug and changes nothing.
        let _ = self.files.set(files);
    }

    /// Why a vCPU may have found nothing behind an address, for a person.
    pub fn why_unbacked(&self) -> String {
        pmem::explain(self.files.get().map_or(&[], Vec::as_slice))
    }

    /// Which of the files has become shorter, in words for a person.
    pub fn shrunk_file(&self) -> Option<String> {
        self.files.get()?.iter().find_map(Witness::has_shrunk)
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

    /// Has the first `count` vCPUs be there; returns when they are, and false if that takes longer than `patience` or the
    /// machine has ended.
    pub fn plug(&self, count: usize, patience: Duration) -> bool {
        let mut state = self.lock();
        state.wanted = state.wanted.max(count);
        self.changed.notify_all();
        let wait = |state: &mut State| state.target != Target::End && state.present < count;
        let (state, _) = self.changed.wait_timeout_while(state, patience, wait).unwrap_or_else(|e| e.into_inner());
        state.target != Target::End && state.present >= count
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
        self.kick_all();
    }

    fn kick_all(&self) {
        self.changed.notify_all();
        self.kickers.get().into_iter().flatten().for_each(Kicker::kick);
    }

    /// The registers of each vCPU, also while they stand still; none of one that does not leave the guest within
    /// `patience` or has ended.
    pub fn look(&self, patience: Duration) -> Vec<Option<Registers>> {
        self.lock().looks.fill(Look::Wanted);
        self.kick_all();
        let waiting = |state: &mut State| {
            let taken = state.looks.iter().filter(|look| matches!(look, Look::Taken(_))).count();
            taken < state.alive
        };
        let (mut state, _) =
            self.changed.wait_timeout_while(self.lock(), patience, waiting).unwrap_or_else(|e| e.into_inner());
        let taken = |look: &mut Look| match std::mem::take(look) {
            Look::Taken(registers) => registers.map(|registers| *registers),
            Look::Unwanted | Look::Wanted => None,
        };
        state.looks.iter_mut().map(taken).collect()
    }

    /// For the thread of a vCPU that begins or was kicked: lets itself be looked at, comes when it shall, and stands still as
    /// long as it must; true when it shall run.
    pub fn checkpoint(&self, vcpu: &mut Vcpu, kicker: &Kicker) -> bool {
        let index = usize::from(vcpu.index());
        // Before the look at what is wanted: what is wanted after it comes with a kick of its own.
        kicker.clear();
        let mut state = self.lock();
        let mut told = false;
        loop {
            if let Some(look @ Look::Wanted) = state.looks.get_mut(index) {
                *look = Look::Taken(vcpu.registers().ok().map(Box::new));
                self.changed.notify_all();
            }
            // Under the lock: whoever has it come tells the guest only afterwards, so that no message to it is lost.
            if !vcpu.is_present() && index < state.wanted {
                if let Err(error) = vcpu.come() {
                    drop(state);
                    self.end(ExitReason::HostFault, error.to_string());
                    return false;
                }
                state.present += 1;
                self.changed.notify_all();
            }
            let is_present = vcpu.is_present();
            let stands = move |state: &State| match state.target {
                Target::Run => !is_present,
                Target::Pause => true,
                Target::End => false,
            };
            if !stands(&state) {
                return state.target == Target::Run;
            }
            if state.target == Target::Pause && !told {
                vcpu.note_pause();
                told = true;
            }
            state.parked += 1;
            self.changed.notify_all();
            let idle = |state: &mut State| {
                let is_wanted = matches!(state.looks.get(index), Some(Look::Wanted));
                stands(state) && !is_wanted && (is_present || index >= state.wanted)
            };
            state = self.changed.wait_while(state, idle).unwrap_or_else(|e| e.into_inner());
            state.parked -= 1;
        }
    }

    /// For a vCPU thread that ends.
    pub fn leave(&self) {
        self.lock().alive -= 1;
        self.changed.notify_all();
    }
}
