//! Seccomp: the system calls that the process needs once it is inside, and which of them each kind of thread needs.
//!
//! Filters add up, and threads inherit those of their maker. The process's list is the vCPUs': the vCPU that sets a device
//! going starts its worker, so that it needs what a worker needs; a list of its own would lack the removal of names, and
//! cost each exit. The other kinds of thread have shorter ones besides.
//!
//! The lists are what the lab's tests make the threads of VMMs call, as the kernel counts it (`BEDPLATE_TEST_CALLS`,
//! docs/lab.md); beyond that only what other versions of the C library call in the place of it (`fstat`, `getsockopt`,
//! `epoll_pwait`), what the kernel calls by itself (`restart_syscall`), and `sched_yield`. In the tests a call that is not
//! listed ends the VMM. `--log-system-calls` lets everything pass instead, and leaves it to the kernel to log it.
//! Calls whose arguments are not looked at cost nothing on a kernel from 5.11 on, which remembers them. `ioctl` is not one of
//! these, so that each guest exit pays for its thread's filters: a vCPU has one, and `KVM_RUN` is what that one asks first.

use libc::c_long;
use seccompiler::apply_filter;

use super::bpf::{self, Answer, Rule, Rules};
use super::{SandboxError, Unlisted};

/// Exit code of a process that made a system call that is not listed: 128 + `SIGSYS`.
const EXIT_CODE: i32 = 159;

/// A kind of thread that needs less than a vCPU's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// The one that serves the API.
    Control,
    /// Does a device's work.
    Worker,
    /// Carries the serial console's bytes.
    Console,
    /// Serves a debugger.
    Debugger,
}

/// What every thread needs: memory, locks, time, its own end.
const EVERY: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_futex,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    // The allocator counts processors.
    libc::SYS_sched_getaffinity,
    // The standard library looks, in builds for debugging, whether a descriptor that it closes is open.
    #[cfg(debug_assertions)]
    libc::SYS_fcntl,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// To start a thread, and to narrow it, as vCPUs do.
const STARTS_THREADS: &[c_long] =
    &[libc::SYS_clone3, libc::SYS_clone, libc::SYS_set_robust_list, libc::SYS_rseq, libc::SYS_prctl, libc::SYS_seccomp];

/// To wait for many things.
const WAITS: &[c_long] = &[
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
];

/// Files by name, within what is visible.
const OPENS_FILES: &[c_long] = &[
    libc::SYS_openat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_fcntl,
    libc::SYS_fsync,
];

/// Names themselves: the log that is moved, the exit file, sockets that go at the end.
const CHANGES_NAMES: &[c_long] = &[libc::SYS_unlink, libc::SYS_unlinkat, libc::SYS_rename];

/// The data of disks.
const DISKS: &[c_long] = &[
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_flock,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
];

/// A chunk that is found damaged is moved away. Where the store may only be read, the answer is an error; without this it
/// would be the end.
const SETS_ASIDE: &[c_long] = &[libc::SYS_rename];

/// A worker says how it behaves beside others; of itself only, which is a rule of its own.
const TAKES_TURNS: &[c_long] = &[libc::SYS_sched_getscheduler, libc::SYS_sched_setscheduler];

/// Sockets; which kind may be made is a rule of its own.
const SOCKETS: &[c_long] = &[
    libc::SYS_connect,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
];

/// Files of pmem devices that come and go.
const WATCHES_FILES: &[c_long] = &[libc::SYS_inotify_init1, libc::SYS_inotify_add_watch, libc::SYS_inotify_rm_watch];

const RANDOM: &[c_long] = &[libc::SYS_getrandom];

/// Calls of which an argument counts; [`process_rules`] has the rules.
const BY_ARGUMENT: &[c_long] = &[libc::SYS_ioctl, libc::SYS_socket, libc::SYS_tgkill];

/// Requests that are made of descriptors after the start. A guest's every exit is the first.
const IOCTLS: &[u32] = &[
    0xae80,      // KVM_RUN
    0x8004_ae98, // KVM_GET_MP_STATE
    0x4020_ae76, // KVM_IRQFD
    0x4040_ae79, // KVM_IOEVENTFD
    0x4008_ae6a, // KVM_SET_GSI_ROUTING
    0x4008_ae61, // KVM_IRQ_LINE
    0xaead,      // KVM_KVMCLOCK_CTRL
    0x4020_ae46, // KVM_SET_USER_MEMORY_REGION, by which a file in the guest's address space comes and goes
    0x8010_aa01, // UFFDIO_UNREGISTER, by which what was read of the kernel is there for the guest
    0x8090_ae81, // KVM_GET_REGS
    0x8138_ae83, // KVM_GET_SREGS
    0x4138_ae84, // KVM_SET_SREGS, by which a vCPU comes
    0x81a0_ae8c, // KVM_GET_FPU
    0x4004_54d0, // TUNSETOFFLOAD
    0x4004_54d8, // TUNSETVNETHDRSZ
    0x4004_54d9, // TUNSETQUEUE
    0xaf01,      // VHOST_SET_OWNER, and the others by which a vhost-net that was opened before is set going and stopped
    0x4008_af00, // VHOST_SET_FEATURES
    0x4008_af03, // VHOST_SET_MEM_TABLE
    0x4008_af10, // VHOST_SET_VRING_NUM
    0x4028_af11, // VHOST_SET_VRING_ADDR
    0x4008_af12, // VHOST_SET_VRING_BASE
    0xc008_af12, // VHOST_GET_VRING_BASE
    0x4008_af20, // VHOST_SET_VRING_KICK
    0x4008_af21, // VHOST_SET_VRING_CALL
    0x4008_af22, // VHOST_SET_VRING_ERR
    0x4008_af30, // VHOST_NET_SET_BACKEND
    0x5421,      // FIONBIO
    0x5413,      // TIOCGWINSZ, by which a terminal is known
    0x5401,      // TCGETS
    0x5402,      // TCSETS
    0x5403,      // TCSETSW
    0x802c_542a, // TCGETS2
    0x402c_542c, // TCSETSW2
    0x1277,      // BLKDISCARD
    0x127f,      // BLKZEROOUT
    0x8008_1272, // BLKGETSIZE64
];

/// Requests that a debugger has vCPUs make.
const DEBUGGER_IOCTLS: &[u32] = &[
    0x4090_ae82, // KVM_SET_REGS
    0x41a0_ae8d, // KVM_SET_FPU
    0xc018_ae85, // KVM_TRANSLATE
    0x4048_ae9b, // KVM_SET_GUEST_DEBUG
    0x8080_aea1, // KVM_GET_DEBUGREGS
    0x4080_aea2, // KVM_SET_DEBUGREGS
];

/// The lists of which a kind of thread's is made.
const fn lists(thread: Thread) -> &'static [&'static [c_long]] {
    match thread {
        Thread::Control => {
            &[EVERY, WAITS, OPENS_FILES, CHANGES_NAMES, DISKS, WATCHES_FILES, SOCKETS, RANDOM, BY_ARGUMENT]
        }
        Thread::Worker => &[EVERY, WAITS, OPENS_FILES, DISKS, SETS_ASIDE, TAKES_TURNS, SOCKETS, RANDOM, BY_ARGUMENT],
        Thread::Console => &[EVERY, WAITS, OPENS_FILES, CHANGES_NAMES, SOCKETS, BY_ARGUMENT],
        Thread::Debugger => &[EVERY, WAITS, SOCKETS, BY_ARGUMENT],
    }
}

/// Those of all kinds of thread, and what else vCPUs need.
const PROCESS: &[&[c_long]] = &[
    EVERY,
    STARTS_THREADS,
    WAITS,
    OPENS_FILES,
    CHANGES_NAMES,
    DISKS,
    SETS_ASIDE,
    TAKES_TURNS,
    SOCKETS,
    WATCHES_FILES,
    RANDOM,
    BY_ARGUMENT,
];

/// Restricts the process, by its only thread. With a `debugger`, its requests are on the list, too.
pub(super) fn restrict_process(unlisted: Unlisted, debugger: bool) -> Result<(), SandboxError> {
    let failed =
        |e: std::io::Error| SandboxError::new("seccomp refuses its list", e, "the kernel needs CONFIG_SECCOMP_FILTER");
    vmm_sys_util::signal::register_signal_handler(libc::SIGSYS, refused)
        .map_err(|e| failed(std::io::Error::from_raw_os_error(e.errno())))?;
    apply(&process_rules(debugger), unlisted).map_err(failed)
}

/// Restricts the calling thread further.
pub(super) fn restrict_thread(thread: Thread, unlisted: Unlisted) {
    #[allow(clippy::expect_used)]
    apply(&thread_rules(thread), unlisted)
        .expect("a thread of a sandboxed process cannot go on without its list of system calls");
}

fn thread_rules(thread: Thread) -> Rules {
    lists(thread).iter().flat_map(|list| list.iter()).map(|call| (*call, ALLOW)).collect()
}

const ALLOW: Rule = Rule::Always(Answer::ALLOW);

fn process_rules(debugger: bool) -> Rules {
    let mut rules: Rules = PROCESS.iter().flat_map(|list| list.iter()).map(|call| (*call, ALLOW)).collect();
    let ioctls = if debugger { [IOCTLS, DEBUGGER_IOCTLS].concat() } else { IOCTLS.to_vec() };
    rules.insert(libc::SYS_ioctl, Rule::Only(1, ioctls));
    // To programs on this machine, and only within what is visible.
    rules.insert(libc::SYS_socket, Rule::Only(0, vec![libc::AF_UNIX.unsigned_abs()]));
    // Of the thread that calls it.
    rules.insert(libc::SYS_sched_setscheduler, Rule::Only(0, vec![0]));
    // Kicks of our own threads.
    rules.insert(libc::SYS_tgkill, Rule::Only(0, vec![std::process::id()]));
    // Rings from before do what they were made for and nothing else; another one would do anything. Who wants one does
    // without, so that this is an answer and not the end.
    rules.insert(libc::SYS_io_uring_setup, Rule::Always(Answer::errno(libc::EPERM as u16)));
    rules
}

fn apply(rules: &Rules, unlisted: Unlisted) -> std::io::Result<()> {
    let otherwise = match unlisted {
        Unlisted::Ends => Answer::TRAP,
        Unlisted::Logged => Answer::LOG,
    };
    apply_filter(&bpf::program(rules, otherwise)?).map_err(std::io::Error::other)
}

/// Says which call it was, and ends the process: something is not as it should be, in the list or in the process.
extern "C" fn refused(_signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    /// Of `si_syscall` in `siginfo_t`, which libc does not name.
    const SYSCALL_AT: usize = 24;
    // SAFETY: the kernel passes a valid `siginfo_t`, which for SIGSYS has the call's number there.
    let number = unsafe { info.cast::<u8>().add(SYSCALL_AT).cast::<i32>().read() };
    // SAFETY: the kernel passes the interrupted thread's context, a valid `ucontext_t`; the second argument is in RSI.
    let argument = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RSI as usize] };
    // No formatting here: it might allocate, and the allocator's lock may be ours.
    let (number, argument) = (hex(number.into()), hex(argument));
    let parts: [&[u8]; 5] = [
        b"bedplate-vmm: sandbox: system call 0x",
        &number[12..],
        b" with the second argument 0x",
        &argument[8..],
        b" is not on the list and was refused\n",
    ];
    for part in parts {
        // SAFETY: the part is as long as said, and the call may be made in a signal handler.
        unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
    // SAFETY: as above.
    unsafe { libc::_exit(EXIT_CODE) };
}

fn hex(number: i64) -> [u8; 16] {
    let mut rest = number.cast_unsigned();
    let mut digits = [0; 16];
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(rest % 16) as usize];
        rest /= 16;
    }
    digits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processes_list_holds_every_threads() {
        let process = process_rules(false);
        for thread in [Thread::Control, Thread::Worker, Thread::Console, Thread::Debugger] {
            assert!(lists(thread).iter().flat_map(|list| list.iter()).all(|call| process.contains_key(call)));
        }
        for never in [libc::SYS_execve, libc::SYS_ptrace, libc::SYS_kill, libc::SYS_mount, libc::SYS_chdir] {
            assert!(!process.contains_key(&never));
        }
        for rules in [&process, &process_rules(true), &thread_rules(Thread::Worker)] {
            let program = bpf::program(rules, Answer::TRAP).unwrap();
            assert!(program.len() < 160, "{} instructions: the kernel takes its time for each", program.len());
        }
        assert_ne!(process_rules(true)[&libc::SYS_ioctl], process[&libc::SYS_ioctl]);
        assert_ne!((&process[&libc::SYS_ioctl], &process[&libc::SYS_socket]), (&ALLOW, &ALLOW));
    }
}
