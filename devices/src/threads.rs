//! The threads of a VM's process.

use std::thread::Builder;

/// Bytes. As much as the standard library's 2 MiB would make each stack a huge page of its own where the host gives those
/// to everybody: memory, and the time to clear it at the start.
const STACK: usize = 512 << 10;

/// A thread that is to be started, with its name as the host shows it.
pub fn named(name: impl Into<String>) -> Builder {
    Builder::new().name(name.into()).stack_size(STACK)
}

/// Has the calling thread wait for its turn from now on (`SCHED_BATCH`): woken, it does not take the processor from who has
/// it. Its share stays the same. Whether it does so because of this call: a policy that somebody has chosen stays.
pub fn wait_for_turns() -> bool {
    change_policy(libc::SCHED_OTHER, libc::SCHED_BATCH)
}

/// Takes [`wait_for_turns`] back; whether that was done.
pub fn stop_waiting_for_turns() -> bool {
    change_policy(libc::SCHED_BATCH, libc::SCHED_OTHER)
}

fn change_policy(from: libc::c_int, to: libc::c_int) -> bool {
    // SAFETY: takes a number only; 0 is the calling thread.
    if unsafe { libc::sched_getscheduler(0) } != from {
        return false;
    }
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: reads the structure, which lives that long; 0 is the calling thread.
    unsafe { libc::sched_setscheduler(0, to, &raw const param) == 0 }
}
