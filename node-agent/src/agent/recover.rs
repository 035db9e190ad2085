//! What a restarted agent makes of one VM: from the journal, the processes that are there, and what was left behind.
//! Pure; the agent carries it out.

use bedplate_api::node::VmSpec;
use bedplate_api::vmm::{Exit, ExitReason};

use super::journal::StateV1;
use super::model::{Asked, End, Process, Step, Vm};
use crate::clock::Millis;
use crate::vm::end::{in_words, without_a_word};
use crate::vm::outcome::Outcome;

/// What was found of a VM beside its spec.
#[derive(Debug, Default)]
pub struct Found {
    /// The journal's last word.
    pub state: Option<StateV1>,
    /// A process that runs with this VM's configuration file, and when it started.
    pub process: Option<(Process, Millis)>,
    /// What the VMM wrote when it ended.
    pub exit: Option<Exit>,
    /// What process 1 wrote down of the journal's process.
    pub outcome: Option<Outcome>,
}

/// Where the VM stands now. `boot_id` is that of this boot of the machine.
pub fn recover(spec: VmSpec, found: Found, boot_id: &str, now: Millis) -> Vm {
    let Found { state, process, exit, outcome } = found;
    let Some(state) = state else {
        // The agent was killed while it accepted the VM: accept it again.
        let mut vm = Vm::new(spec);
        if let Some((process, since)) = process {
            vm.step = Step::Running { process, since };
        }
        return vm;
    };
    let rebooted = state.boot_id != boot_id;
    let mut vm = state.into_vm(spec);
    // A process that is there is there, whatever is known of boots; only the times of another one mean nothing.
    if let Some((process, since)) = process {
        adopt(&mut vm, process, since, rebooted);
    } else if rebooted {
        after_reboot(&mut vm);
    } else {
        without_process(&mut vm, exit, outcome, now);
    }
    vm
}

/// No process survived, and times of the last boot mean nothing now.
fn after_reboot(vm: &mut Vm) {
    vm.address_taken = false;
    vm.failures = 0;
    vm.step = match vm.step {
        Step::Starting | Step::Running { .. } | Step::BackOff { .. } | Step::Ready => {
            vm.detail = Some("the node was started again".to_owned());
            Step::Ready
        }
        Step::Stopping { .. } => Step::Off,
        ref other => other.clone(),
    };
}

/// The VM has a process, whatever the journal says: it is never started beside that.
fn adopt(vm: &mut Vm, process: Process, started: Millis, rebooted: bool) {
    vm.step = match vm.step {
        Step::Running { since, process: known } if known == process => Step::Running { process, since },
        Step::Stopping { asked, .. } if rebooted => Step::Stopping { process, asked, since: started },
        Step::Stopping { asked, since, .. } => Step::Stopping { process, asked, since },
        // Nothing has a process while it is removed. Should it be so all the same, end it first.
        Step::Removing => Step::Stopping { process, asked: Asked::Stop, since: started },
        _ => Step::Running { process, since: started },
    };
}

fn without_process(vm: &mut Vm, exit: Option<Exit>, outcome: Option<Outcome>, now: Millis) {
    match vm.step {
        Step::Running { since, .. } => {
            let end = match exit {
                Some(exit) => End { reason: exit.reason, detail: in_words(&exit) },
                None => End {
                    reason: ExitReason::HostFault,
                    detail: outcome.map_or_else(
                        || "the VMM ended while the agent was away, and left no reason".to_owned(),
                        |outcome| format!("{} while the agent was away", without_a_word(outcome)),
                    ),
                },
            };
            vm.ended(&end, now.since(since), now);
        }
        Step::Stopping { .. } => vm.step = Step::Off,
        // What an earlier run left was removed before the journal said so: this start had a process, and that has ended.
        Step::Starting => match exit {
            Some(exit) => vm.ended(&End { reason: exit.reason, detail: in_words(&exit) }, 0, now),
            // Killed on the way to a process: begin the start anew.
            None => vm.step = Step::Ready,
        },
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use bedplate_api::node::{DiskMode, Power, RestartPolicy};
    use bedplate_api::{Digest, VmId};

    use super::*;

    const NOW: Millis = Millis(900_000);
    const P: Process = Process { pid: 10, start_ticks: 20 };
    const Q: Process = Process { pid: 11, start_ticks: 30 };

    fn spec() -> VmSpec {
        VmSpec {
            id: VmId::from_uuid(uuid::Uuid::from_bytes([3; 16])),
            name: "a".into(),
            image: Digest::ZERO,
            cpus: 1,
            memory_mib: 64,
            disk: DiskMode::Persistent,
            power: Power::Running,
            restart: RestartPolicy::Always,
            cmdline: String::new(),
        }
    }

    fn running(process: Process) -> Step {
        Step::Running { process, since: Millis(100) }
    }

    fn stopping(process: Process) -> Step {
        Step::Stopping { process, asked: Asked::Button, since: Millis(100) }
    }

    fn found(step: Step, process: Option<Process>) -> Found {
        let state = StateV1::of(&Vm { step, ..Vm::new(spec()) }, "boot");
        Found { state: Some(state), process: process.map(|p| (p, Millis(100))), ..Found::default() }
    }

    #[test]
    fn killed_at_any_step_it_goes_on_from_there() {
        let table = [
            (Step::Ready, None, Step::Ready),
            (Step::Starting, None, Step::Ready),
            (Step::Starting, Some(P), running(P)),
            (running(P), Some(P), running(P)),
            (running(P), Some(Q), running(Q)),
            (stopping(P), Some(P), stopping(P)),
            (stopping(P), None, Step::Off),
            (Step::Off, None, Step::Off),
            (Step::Off, Some(P), running(P)),
            (Step::Ended, None, Step::Ended),
            (Step::Refused { generation: 3 }, None, Step::Refused { generation: 3 }),
            (Step::Removing, None, Step::Removing),
        ];
        for (before, process, after) in table {
            let vm = recover(spec(), found(before.clone(), process), "boot", NOW);
            assert_eq!(vm.step, after, "{before:?} {process:?}");
            assert_eq!(vm.restarts, 0);
        }
    }

    #[test]
    fn a_vm_that_ended_meanwhile_is_treated_as_if_it_had_ended_now() {
        let mut meanwhile = found(running(P), None);
        meanwhile.exit = Some(Exit { reason: ExitReason::GuestPowerOff, detail: "off".into() });
        let vm = recover(spec(), meanwhile, "boot", NOW);
        assert_eq!((vm.restarts, vm.detail.as_deref()), (1, Some("off")));
        assert!(matches!(vm.step, Step::BackOff { .. }));
        let vm = recover(spec(), found(running(P), None), "boot", NOW);
        assert!(vm.detail.unwrap().contains("while the agent was away, and left no reason"));
        let mut killed = found(running(P), None);
        killed.outcome = Some(Outcome::Signal(9));
        let vm = recover(spec(), killed, "boot", NOW);
        assert_eq!(vm.detail.unwrap(), "the VMM was killed by signal 9 (SIGKILL) while the agent was away");
    }

    #[test]
    fn a_start_whose_vm_has_ended_already_is_not_done_again() {
        let mut ended = found(Step::Starting, None);
        ended.exit = Some(Exit { reason: ExitReason::GuestPowerOff, detail: "off".into() });
        let once = VmSpec { restart: RestartPolicy::OnFailure, ..spec() };
        let vm = recover(once, ended, "boot", NOW);
        assert_eq!((vm.step, vm.detail.as_deref()), (Step::Ended, Some("off")));
    }

    #[test]
    fn a_reboot_ends_every_process_and_forgets_times() {
        let vm = recover(spec(), found(running(P), None), "another boot", NOW);
        assert_eq!(vm.step, Step::Ready);
        let there = recover(spec(), found(Step::Starting, Some(Q)), "another boot", NOW);
        assert_eq!(there.step, running(Q), "a process that is there is never started beside");
        let waits = Step::BackOff { until: Millis(u64::MAX) };
        assert_eq!(recover(spec(), found(waits, None), "another boot", NOW).step, Step::Ready);
        assert_eq!(recover(spec(), found(Step::Ended, None), "another boot", NOW).step, Step::Ended);
    }

    #[test]
    fn a_vm_without_a_journal_is_new() {
        assert_eq!(recover(spec(), Found::default(), "boot", NOW), Vm::new(spec()));
    }
}
