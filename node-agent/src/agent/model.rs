//! What the agent knows of each VM and image, and what that looks like from outside.

use std::net::Ipv4Addr;

use bedplate_api::node::{CopyProgress, RestartPolicy, VmPhase, VmSpec, VmStatus};
use bedplate_api::vmm::ExitReason;
use serde::{Deserialize, Serialize};

use crate::clock::Millis;

/// A VM process, named so that it cannot be taken for another one that got the same number later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Clock ticks from the start of the machine to its own, as in `/proc/{pid}/stat`.
    pub start_ticks: u64,
}

/// How hard a VM was asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Asked {
    /// Its guest was sent the power button.
    Button,
    /// Its VMM was told to end it.
    Stop,
    /// Its VMM was killed.
    Kill,
}

/// Where a VM stands. One step at most is under way at any time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "step", deny_unknown_fields)]
pub enum Step {
    /// No process, and nothing speaks against one.
    Ready,
    /// No process until `until`.
    BackOff {
        /// When to try again.
        until: Millis,
    },
    /// Off because that was asked for.
    Off,
    /// Ended by itself, and its policy says to leave it so.
    Ended,
    /// Cannot run here; tried again when the desired state has another generation.
    Refused {
        /// The generation that was refused.
        generation: u64,
    },
    /// Its process is being started; there may be one already.
    Starting,
    /// Its vCPUs run.
    Running {
        /// The VMM.
        process: Process,
        /// Since when.
        since: Millis,
    },
    /// It was asked to end.
    Stopping {
        /// The VMM.
        process: Process,
        /// How hard.
        asked: Asked,
        /// When it was asked that.
        since: Millis,
    },
    /// Its files are being removed; it has no process.
    Removing,
}

impl Step {
    /// Its process, if it has one that is known.
    pub const fn process(&self) -> Option<Process> {
        match *self {
            Self::Running { process, .. } | Self::Stopping { process, .. } => Some(process),
            _ => None,
        }
    }
}

/// One VM on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    /// As asked for.
    pub spec: VmSpec,
    /// Where it stands.
    pub step: Step,
    /// Why, for a person.
    pub detail: Option<String>,
    /// Its address, once it has had one.
    pub address: Option<Ipv4Addr>,
    /// Its guest has taken the address since it was started.
    pub address_taken: bool,
    /// How often it was started again after it ended by itself.
    pub restarts: u32,
    /// Short runs and failed starts in a row; sets the length of the next back-off.
    pub failures: u32,
}

/// An image on this node, as far as VMs ask for it. An image that no VM asks for has no state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageState {
    /// Being copied, or being prepared from what is here.
    Copying {
        /// How far; `None` until its manifest is here.
        progress: Option<CopyProgress>,
        /// What holds it up, where something does.
        trouble: Option<String>,
    },
    /// Everything that a start needs is here and verified; the rest is being copied, and guests that need it sooner wait.
    Partial {
        /// How far.
        progress: Option<CopyProgress>,
        /// What holds it up, where something does.
        trouble: Option<String>,
    },
    /// It is here whole.
    Ready,
    /// Cannot be had; tried again when the desired state has another generation.
    Failed {
        /// Why.
        detail: String,
        /// The generation that found out.
        generation: u64,
    },
}

impl ImageState {
    /// Whether VMs can be started from it.
    pub const fn is_bootable(&self) -> bool {
        matches!(self, Self::Partial { .. } | Self::Ready)
    }
}

/// How a VM's process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// What the VMM wrote, or our reading of its death.
    pub reason: ExitReason,
    /// For a person.
    pub detail: String,
}

/// A run at least this long clears the count of failures.
pub const GOOD_RUN_MILLIS: u64 = 60_000;
/// The first back-off, doubled with each failure.
pub const FIRST_BACK_OFF_MILLIS: u64 = 1_000;
/// The longest back-off.
pub const MAX_BACK_OFF_MILLIS: u64 = 60_000;

/// The back-off after `failures` failures in a row, 1 or more.
pub fn back_off(failures: u32) -> u64 {
    let doubled = FIRST_BACK_OFF_MILLIS.checked_shl(failures.saturating_sub(1)).unwrap_or(u64::MAX);
    // A shift past the width is caught above, one that loses bits is not: six doublings pass the maximum already.
    if failures > 6 { MAX_BACK_OFF_MILLIS } else { doubled.min(MAX_BACK_OFF_MILLIS) }
}

impl Vm {
    /// A VM that was just accepted.
    pub const fn new(spec: VmSpec) -> Self {
        Self { spec, step: Step::Ready, detail: None, address: None, address_taken: false, restarts: 0, failures: 0 }
    }

    /// Its process, if it has one that is known.
    pub const fn process(&self) -> Option<Process> {
        self.step.process()
    }

    /// Whether it takes memory now.
    pub const fn is_active(&self) -> bool {
        matches!(self.step, Step::Starting | Step::Running { .. } | Step::Stopping { .. })
    }

    /// Takes note that its process ended at `now` after it ran for `ran` milliseconds.
    pub fn ended(&mut self, end: &End, ran: u64, now: Millis) {
        self.address_taken = false;
        if matches!(self.step, Step::Stopping { .. }) {
            self.step = Step::Off;
            self.detail = Some(end.detail.clone());
            self.failures = 0;
            return;
        }
        self.detail = Some(end.detail.clone());
        if !starts_again(self.spec.restart, end.reason) {
            self.step = Step::Ended;
            return;
        }
        self.restarts = self.restarts.saturating_add(1);
        if ran >= GOOD_RUN_MILLIS {
            self.failures = 0;
        }
        // A guest that reboots is back at once. One that does nothing else is a failure like any other.
        if end.reason == ExitReason::GuestReset && self.failures == 0 {
            self.failures = 1;
            self.step = Step::Ready;
        } else {
            self.fail(now);
        }
    }

    /// Takes note that it could not be started.
    pub fn start_failed(&mut self, detail: String, now: Millis) {
        self.detail = Some(detail);
        match self.spec.restart {
            RestartPolicy::Never => self.step = Step::Ended,
            RestartPolicy::Always | RestartPolicy::OnFailure => self.fail(now),
        }
    }

    fn fail(&mut self, now: Millis) {
        self.failures = self.failures.saturating_add(1);
        self.step = Step::BackOff { until: now.plus(back_off(self.failures)) };
    }

    /// What the outside sees of it; `image` is the state of its image.
    pub fn status(&self, image: Option<&ImageState>) -> VmStatus {
        let (copy, trouble) = match (&self.step, image) {
            (Step::Ready, Some(ImageState::Copying { progress, trouble }))
            | (_, Some(ImageState::Partial { progress, trouble })) => (*progress, trouble.clone()),
            _ => (None, None),
        };
        let phase = match (&self.step, image) {
            (Step::Ready, Some(ImageState::Copying { .. })) => VmPhase::Copying,
            _ => self.phase(),
        };
        VmStatus {
            id: self.spec.id,
            name: self.spec.name.clone(),
            phase,
            detail: trouble.or_else(|| self.detail.clone()),
            address: self.address,
            address_taken: self.address_taken,
            pid: self.process().map(|p| p.pid),
            restarts: self.restarts,
            copy,
        }
    }

    const fn phase(&self) -> VmPhase {
        match self.step {
            Step::Ready => VmPhase::Pending,
            Step::BackOff { .. } => VmPhase::BackOff,
            Step::Off | Step::Ended => VmPhase::Stopped,
            Step::Refused { .. } => VmPhase::Failed,
            Step::Starting => VmPhase::Starting,
            Step::Running { .. } => VmPhase::Running,
            Step::Stopping { .. } | Step::Removing => VmPhase::Stopping,
        }
    }
}

/// Whether a VM with `policy` that ended by itself for `reason` is started again.
const fn starts_again(policy: RestartPolicy, reason: ExitReason) -> bool {
    match (policy, reason) {
        (RestartPolicy::Never, _) | (RestartPolicy::OnFailure, ExitReason::GuestPowerOff | ExitReason::Stopped) => {
            false
        }
        (RestartPolicy::Always | RestartPolicy::OnFailure, _) => true,
    }
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
