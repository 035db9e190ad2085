//! The threads of a VM's process.

use std::io;
use std::sync::OnceLock;
use std::thread::{Builder, JoinHandle};

/// Bytes. As much as the standard library's 2 MiB would make each stack a huge page of its own where the host gives those
/// to everybody: memory, and the time to clear it at the start.
const STACK: usize = 512 << 10;

/// A thread that is to be started, with its name as the host shows it.
pub fn named(name: impl Into<String>) -> Builder {
    Builder::new().name(name.into()).stack_size(STACK)
}

static BEGIN: OnceLock<fn()> = OnceLock::new();

/// Has every thread that works for a device and starts from now on call `begin` first: there a VMM takes away from the thread
/// what it does not need. The first call of a process counts.
pub fn on_worker_start(begin: fn()) {
    let _later = BEGIN.set(begin);
}

/// Starts a thread that works for a device.
///
/// # Errors
/// The host has none left.
pub fn worker<T: Send + 'static>(
    name: impl Into<String>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    named(name).spawn(|| {
        if let Some(begin) = BEGIN.get() {
            begin();
        }
        work()
    })
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
