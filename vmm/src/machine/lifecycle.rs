//! Run, pause, end: what all threads of a machine agree on.
//!
//! A vCPU thread looks here only when it was kicked, so that a guest exit costs nothing for it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use bedplate_api::vmm::{Exit, ExitReason, Registers};
use vmm_sys_util::eventfd::EventFd;

use crate::kvm::{Kicker, Trap, Vcpu};
use crate::pmem::{self, Witness};

/// What the vCPUs shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Run,
    Pause,
    End,
}

/// Something that only a vCPU's own thread can do, between two runs.
type Errand = Box<dyn FnOnce(&mut Vcpu) + Send>;

/// What is known of a vCPU whose thread has not ended.
#[derive(Default)]
struct Member {
    /// In the order in which they came.
    errands: Vec<Errand>,
    /// A debugger has it stand still.
    held: bool,
}

struct State {
    target: Target,
    /// By vCPU; none of one whose thread has ended.
    members: Vec<Option<Member>>,
    /// vCPUs that stand still.
    parked: usize,
    /// What a debugger was not told yet.
    stops: VecDeque<Stop>,
}

impl State {
    fn alive(&self) -> usize {
        self.members.iter().flatten().count()
    }

    fn hold_all(&mut self) {
        self.members.iter_mut().flatten().for_each(|member| member.held = true);
    }
}

/// A vCPU has come to where the debugger wanted it to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stop {
    /// Its number.
    pub vcpu: usize,
    /// At what.
    pub trap: Trap,
}

/// The vCPUs do not stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PauseError {
    /// There are none any more.
    #[error("the VM has ended")]
    Ended,
    /// After so many seconds.
    #[error(
        "a vCPU has not stopped for {0} s: it or its device waits for the host's storage, or the host is short of processors; try again"
    )]
    Busy(u64),
}

/// Shared by the vCPU threads, the devices that can end the machine, and control.
pub struct Lifecycle {
    /// Never held while a kicker is used, a device is called, or a vCPU does something for others.
    state: Mutex<State>,
    changed: Condvar,
    kickers: OnceLock<Vec<Kicker>>,
    /// Held for a look at the files only, which are the host's.
    files: Mutex<Vec<Witness>>,
    exit: OnceLock<Exit>,
    ended: EventFd,
    /// Of a debugger: signalled when a vCPU has stopped for it, and at the end.
    debugger: OnceLock<EventFd>,
}

impl Lifecycle {
    /// Of a machine that runs as soon as it has vCPUs. `ended` is signalled when it has ended.
    pub fn new(ended: EventFd) -> Self {
        Self {
            state: Mutex::new(State { target: Target::Run, members: Vec::new(), parked: 0, stops: VecDeque::new() }),
            changed: Condvar::new(),
            kickers: OnceLock::new(),
            files: Mutex::default(),
            exit: OnceLock::new(),
            ended,
            debugger: OnceLock::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Names the vCPUs, once, before the first of them runs.
    pub fn set_vcpus(&self, kickers: Vec<Kicker>) {
        {
            let held = self.debugger.get().is_some();
            let member = || Some(Member { held, errands: Vec::new() });
            self.lock().members.resize_with(kickers.len(), member);
        }
        // A second call would be our bug and changes nothing.
        let _ = self.kickers.set(kickers);
        // Who wanted something before has kicked nobody.
        if self.lock().target != Target::Run || self.debugger.get().is_some() {
            self.kick_all();
        }
    }

    /// Names a file in the guest's memory.
    pub fn add_file(&self, file: Witness) {
        self.files().push(file);
    }

    /// The file of the pmem device `id` is not in the guest's memory any more.
    pub fn remove_file(&self, id: &str) {
        self.files().retain(|file| file.id() != id);
    }

    /// Why a vCPU may have found nothing behind an address, for a person.
    pub fn why_unbacked(&self) -> String {
        pmem::explain(&self.files())
    }

    /// Ends the machine if one of the files has become shorter; whether it has.
    pub fn check_files(&self) -> bool {
        let shrunk = self.files().iter().find_map(Witness::has_shrunk);
        let has_shrunk = shrunk.is_some();
        if let Some(words) = shrunk {
            self.end(ExitReason::HostFault, words);
        }
        has_shrunk
    }

    fn files(&self) -> MutexGuard<'_, Vec<Witness>> {
        self.files.lock().unwrap_or_else(|e| e.into_inner())
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
            self.wake_debugger();
        }
    }

    /// Stops all vCPUs; returns when none runs.
    ///
    /// # Errors
    /// The machine has ended; or one has not stopped within `patience`, and all go on if they ran.
    pub fn pause(&self, patience: Duration) -> Result<(), PauseError> {
        let ran = self.lock().target == Target::Run;
        self.aim(Target::Pause);
        let state = self.lock();
        let wait = |state: &mut State| state.target == Target::Pause && state.parked < state.alive();
        let (state, waited) = self.changed.wait_timeout_while(state, patience, wait).unwrap_or_else(|e| e.into_inner());
        let has_ended = state.target != Target::Pause;
        drop(state);
        if has_ended {
            return Err(PauseError::Ended);
        }
        if waited.timed_out() {
            if ran {
                self.resume();
            }
            return Err(PauseError::Busy(patience.as_secs()));
        }
        Ok(())
    }

    /// Has these vCPUs, which stand still since the start, be there; returns when they are, and false if that takes longer
    /// than `patience` or the machine has ended.
    pub fn plug(&self, vcpus: Range<usize>, patience: Duration) -> bool {
        let is_wanted = Arc::new(AtomicBool::new(true));
        let come = |vcpu| {
            let is_wanted = Arc::clone(&is_wanted);
            self.ask(vcpu, move |vcpu| if is_wanted.load(Ordering::SeqCst) { vcpu.come() } else { Ok(()) })
        };
        let answers: Vec<_> = vcpus.map(come).collect();
        let deadline = Instant::now() + patience;
        let all = answers.into_iter().all(|answer| {
            match answer.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Ok(())) => true,
                Ok(Err(error)) => {
                    self.end(ExitReason::HostFault, error.to_string());
                    false
                }
                Err(_) => false,
            }
        });
        // Who is late shall not come after this was refused.
        is_wanted.store(false, Ordering::SeqCst);
        all
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

    /// Has the thread of a vCPU do something between two runs, also while it stands still. The answer comes soon, or never
    /// from a vCPU whose thread ends.
    pub fn ask<T: Send + 'static>(
        &self,
        vcpu: usize,
        question: impl FnOnce(&mut Vcpu) -> T + Send + 'static,
    ) -> Receiver<T> {
        let (answer, receiver) = mpsc::sync_channel(1);
        let errand = move |vcpu: &mut Vcpu| {
            // Nobody waits for it any more: then nobody gets it.
            let _ = answer.send(question(vcpu));
        };
        if let Some(Some(member)) = self.lock().members.get_mut(vcpu) {
            member.errands.push(Box::new(errand));
        }
        self.changed.notify_all();
        if let Some(kicker) = self.kickers.get().and_then(|kickers| kickers.get(vcpu)) {
            kicker.kick();
        }
        receiver
    }

    /// Asks each vCPU the same; no answer of one that does not leave the guest within `patience` or has ended.
    pub fn ask_each<T: Send + 'static>(
        &self,
        patience: Duration,
        question: impl Fn(&mut Vcpu) -> T + Clone + Send + 'static,
    ) -> Vec<Option<T>> {
        let vcpus = self.kickers.get().map_or(0, Vec::len);
        let answers: Vec<_> = (0..vcpus).map(|vcpu| self.ask(vcpu, question.clone())).collect();
        let deadline = Instant::now() + patience;
        let left = || deadline.saturating_duration_since(Instant::now());
        answers.into_iter().map(|answer| answer.recv_timeout(left()).ok()).collect()
    }

    /// The registers of each vCPU.
    pub fn look(&self, patience: Duration) -> Vec<Option<Registers>> {
        self.ask_each(patience, |vcpu| vcpu.registers().ok()).into_iter().map(Option::flatten).collect()
    }

    /// From the first instruction on the guest stands still until a debugger lets it go. Called before there are vCPUs;
    /// `event` is signalled when one of them has stopped for the debugger, and at the end.
    pub fn wait_for_debugger(&self, event: EventFd) {
        // A second call would be our bug and changes nothing.
        let _ = self.debugger.set(event);
    }

    /// For a debugger: stops all vCPUs; false where the machine has ended.
    pub fn hold(&self) -> bool {
        self.lock().hold_all();
        self.kick_all();
        let wait = |state: &mut State| state.target != Target::End && state.parked < state.alive();
        let state = self.changed.wait_while(self.lock(), wait).unwrap_or_else(|e| e.into_inner());
        state.target != Target::End
    }

    /// Lets those go on that are not `held`. All of them stand still.
    pub fn release(&self, held: impl Fn(usize) -> bool) {
        for (vcpu, member) in self.lock().members.iter_mut().enumerate() {
            if let Some(member) = member {
                member.held = held(vcpu);
            }
        }
        self.changed.notify_all();
    }

    /// For a vCPU's thread: it has come to where the debugger wants it, so all stop.
    pub fn stopped(&self, stop: Stop) {
        {
            let mut state = self.lock();
            state.hold_all();
            state.stops.push_back(stop);
        }
        self.kick_all();
        self.wake_debugger();
    }

    /// The first stop that was not taken yet.
    pub fn take_stop(&self) -> Option<Stop> {
        self.lock().stops.pop_front()
    }

    /// Forgets the stops that `stale` says are not worth a word; the debugger's event is signalled where others are left.
    pub fn forget_stops(&self, stale: impl Fn(&Stop) -> bool) {
        let left = {
            let mut state = self.lock();
            state.stops.retain(|stop| !stale(stop));
            !state.stops.is_empty()
        };
        if left {
            self.wake_debugger();
        }
    }

    fn wake_debugger(&self) {
        if let Some(event) = self.debugger.get() {
            // Fails only where 2^64 - 2 signals wait to be read.
            let _ = event.write(1);
        }
    }

    /// For the thread of a vCPU that begins or was kicked: does what it is asked for, and waits while the VM is paused, a
    /// debugger holds it, or the vCPU is one that the guest does not have yet. True when it shall run, false when its thread
    /// shall end.
    pub fn checkpoint(&self, vcpu: &mut Vcpu, kicker: &Kicker) -> bool {
        // Before the look at what is wanted: what is wanted after it comes with a kick of its own.
        kicker.clear();
        let index = usize::from(vcpu.index());
        let mut state = self.lock();
        let mut told = false;
        loop {
            let Some(Some(member)) = state.members.get_mut(index) else { return false };
            let errands = std::mem::take(&mut member.errands);
            let stops = member.held || state.target == Target::Pause;
            if !errands.is_empty() {
                drop(state);
                errands.into_iter().for_each(|errand| errand(vcpu));
                state = self.lock();
                continue;
            }
            let is_present = vcpu.is_present();
            if state.target == Target::End || (is_present && !stops) {
                return state.target != Target::End;
            }
            if stops && !told {
                vcpu.note_pause();
                told = true;
            }
            state.parked += 1;
            self.changed.notify_all();
            let idle = |state: &mut State| {
                let member = state.members.get(index).and_then(Option::as_ref);
                let (held, asked) = member.map_or((false, false), |member| (member.held, !member.errands.is_empty()));
                state.target != Target::End && (held || state.target == Target::Pause || !is_present) && !asked
            };
            state = self.changed.wait_while(state, idle).unwrap_or_else(|e| e.into_inner());
            state.parked -= 1;
        }
    }

    /// For the thread of this vCPU, which ends.
    pub fn leave(&self, vcpu: usize) {
        // What it was asked for is dropped, and that is the answer.
        let member = self.lock().members.get_mut(vcpu).and_then(Option::take);
        drop(member);
        self.changed.notify_all();
    }
}
