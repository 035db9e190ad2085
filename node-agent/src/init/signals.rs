//! Signals and dead children: what PID 1 waits for.
//!
//! An unsafe corner: signals, and children whoever they are, can be waited for by libc only.

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal};

use super::console::say;
use crate::vm::outcome::{Outcome, Records};

/// How the network's thread says that it is up.
const NETWORK_UP: i32 = libc::SIGUSR1;
/// What takes the machine down: `kill 1`, Ctrl-Alt-Del, and the kernel's or a person's word that power fails.
const DOWN: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGPWR, libc::SIGUSR2];

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Woken {
    /// A child has ended.
    Child,
    /// The network is up.
    Network,
    /// The machine shall go down.
    Down,
    /// Nothing, in the given time.
    Nothing,
}

/// A process that has ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ended {
    /// Its number.
    pub pid: u32,
    /// How.
    pub outcome: Outcome,
}

/// The signals that are waited for, blocked in every thread from the first on.
pub(super) struct Signals(libc::sigset_t);

impl Signals {
    /// Blocks them. Called before there is a second thread. Threads inherit this, and so do programs; see [`unblocked`].
    pub fn block() -> Self {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `sigemptyset` initialises the set, which the calls after it then use; the numbers are valid signals,
        // and the old mask is not asked for.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in DOWN.into_iter().chain([NETWORK_UP, libc::SIGCHLD]) {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            set.assume_init()
        };
        Self(set)
    }

    /// Waits for the next, for at most `limit`.
    pub fn wait(&self, limit: Option<Duration>) -> Woken {
        let limit = limit.map(|limit| libc::timespec {
            tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        });
        let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the set is initialised; the limit is null or points to a value that outlives the call; what the signal
        // carries is not asked for.
        let signal = unsafe { libc::sigtimedwait(&raw const self.0, std::ptr::null_mut(), limit) };
        match signal {
            libc::SIGCHLD => Woken::Child,
            NETWORK_UP => Woken::Network,
            signal if DOWN.contains(&signal) => Woken::Down,
            _ => Woken::Nothing,
        }
    }
}

/// Lets the program that `command` starts get its signals: what we block for ourselves would stay blocked in it.
pub(super) fn unblocked(command: &mut Command) -> &mut Command {
    let unblock = || {
        let mut none = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `sigemptyset` initialises the set that the call after it uses; the old mask is not asked for.
        let failed = unsafe {
            libc::sigemptyset(none.as_mut_ptr());
            libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut())
        };
        if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: the closure runs between fork and exec and does one system call on memory of its own.
    unsafe { command.pre_exec(unblock) }
}

/// Tells the main thread that the network is up.
pub(super) fn network_is_up() {
    tell_main(Signal::USR1);
}

/// Tells the main thread that the machine shall go down.
pub(super) fn go_down() {
    tell_main(Signal::TERM);
}

/// Asks a process to end.
pub(super) fn terminate(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // It has ended at this very moment, or gets it.
        let _sent = rustix::process::kill_process(pid, Signal::TERM);
    }
}

fn tell_main(signal: Signal) {
    // To ourselves, which cannot fail.
    let _sent = rustix::process::kill_process(rustix::process::getpid(), signal);
}

/// Takes note of every child that has ended, also for the agent. One signal may stand for several.
pub(super) fn reap() -> Vec<Ended> {
    let records = Records::default();
    let mut all = Vec::new();
    while let Some((pid, (outcome, written))) = next_ended().and_then(|pid| Some((pid, records.bury(pid)?))) {
        if let Err(e) = written {
            say(&format!("how process {pid} ended is not written down: {e}"));
        }
        all.push(Ended { pid: pid.as_raw_pid().unsigned_abs(), outcome });
    }
    all
}

/// A child that has ended, left as it is.
fn next_ended() -> Option<Pid> {
    // SAFETY: all zeros is a valid `siginfo_t`.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is valid for writing during the call.
    let done = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) };
    if done != 0 {
        return None;
    }
    // SAFETY: `waitid` succeeded: it filled in a child's fields, or left zeros, which say that none has ended.
    Pid::from_raw(unsafe { info.si_pid() })
}
