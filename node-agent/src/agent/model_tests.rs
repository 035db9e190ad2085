use bedplate_api::node::{DiskMode, Power};
use bedplate_api::{Digest, VmId};

use super::*;

const NOW: Millis = Millis(500_000);

fn vm(restart: RestartPolicy) -> Vm {
    let spec = VmSpec {
        id: VmId::random(),
        name: "a".into(),
        image: Digest::ZERO,
        cpus: 1,
        memory_mib: 64,
        disk: DiskMode::Persistent,
        power: Power::Running,
        restart,
        cmdline: String::new(),
    };
    let process = Process { pid: 1, start_ticks: 1 };
    Vm { step: Step::Running { process, since: Millis(0) }, ..Vm::new(spec) }
}

fn end(reason: ExitReason) -> End {
    End { reason, detail: "why".into() }
}

#[test]
fn the_policy_decides_what_an_end_leads_to() {
    use ExitReason::{GuestFault, GuestPowerOff, GuestReset, HostFault, Stopped};
    use RestartPolicy::{Always, Never, OnFailure};
    let waits = Step::BackOff { until: NOW.plus(1_000) };
    let table = [
        (Always, GuestPowerOff, waits.clone()),
        (Always, GuestReset, Step::Ready),
        (Always, Stopped, waits.clone()),
        (Always, HostFault, waits.clone()),
        (OnFailure, GuestPowerOff, Step::Ended),
        (OnFailure, Stopped, Step::Ended),
        (OnFailure, GuestReset, Step::Ready),
        (OnFailure, GuestFault, waits),
        (Never, GuestReset, Step::Ended),
        (Never, HostFault, Step::Ended),
    ];
    for (policy, reason, step) in table {
        let mut vm = vm(policy);
        vm.ended(&end(reason), 5_000, NOW);
        assert_eq!(vm.step, step, "{policy:?} {reason:?}");
        assert_eq!(vm.restarts, u32::from(step != Step::Ended));
        assert_eq!(vm.detail.as_deref(), Some("why"));
    }
}

#[test]
fn a_vm_that_was_asked_to_stop_is_off_however_it_ended() {
    let mut vm = vm(RestartPolicy::Always);
    vm.step = Step::Stopping { process: Process { pid: 1, start_ticks: 1 }, asked: Asked::Kill, since: NOW };
    vm.ended(&end(ExitReason::HostFault), 5_000, NOW);
    assert_eq!((vm.step, vm.restarts), (Step::Off, 0));
}

#[test]
fn back_off_doubles_to_a_minute_and_a_good_run_clears_it() {
    let lengths: Vec<u64> = (1..=9).map(back_off).collect();
    assert_eq!(lengths, [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000, 60_000]);
    assert_eq!(back_off(u32::MAX), MAX_BACK_OFF_MILLIS);
    let mut vm = vm(RestartPolicy::Always);
    vm.failures = 5;
    vm.ended(&end(ExitReason::GuestFault), GOOD_RUN_MILLIS, NOW);
    assert_eq!(vm.step, Step::BackOff { until: NOW.plus(1_000) });
}

#[test]
fn a_guest_that_only_reboots_backs_off_from_the_second_time_on() {
    let mut vm = vm(RestartPolicy::Always);
    vm.ended(&end(ExitReason::GuestReset), 10, NOW);
    assert_eq!(vm.step, Step::Ready);
    vm.ended(&end(ExitReason::GuestReset), 10, NOW);
    assert_eq!(vm.step, Step::BackOff { until: NOW.plus(2_000) });
    vm.ended(&end(ExitReason::GuestReset), GOOD_RUN_MILLIS, NOW);
    assert_eq!(vm.step, Step::Ready);
}

#[test]
fn a_vm_that_waits_for_its_image_says_so() {
    let mut vm = vm(RestartPolicy::Always);
    vm.step = Step::Ready;
    let progress = Some(CopyProgress { done: 1, total: 2 });
    let image = ImageState::Copying { progress, trouble: Some("slow".into()) };
    let status = vm.status(Some(&image));
    assert_eq!((status.phase, status.copy, status.detail.as_deref()), (VmPhase::Copying, progress, Some("slow")));
    assert_eq!(vm.status(Some(&ImageState::Ready)).phase, VmPhase::Pending);
}
