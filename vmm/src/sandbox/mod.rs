//! The walls around the process: what a guest that took over its VMM would find.
//!
//! Entered by the control thread after everything that the VM needs has been opened and before there is a second thread,
//! so before the first guest instruction. From then on, in the order in which they are put up ([`Sandbox::enter`]):
//!
//! 1. own mount, network, IPC and host-name namespaces; the root holds the directories of this VM and nothing else;
//! 2. another user, if one was named, an own user namespace, and no capabilities, for good;
//! 3. landlock: the same directories, also for descriptors from before;
//! 4. seccomp: a list of system calls for the process and its vCPUs, and a shorter one for each other kind of thread
//!    ([`narrow`]).
//!
//! Not here: a pid namespace, into which a process cannot go, only be born. The node's agent has VMMs born into one each. What it
//! takes away, to signal or trace others, seccomp does for all of them.

mod bpf;
mod files;
mod network;
mod root;
mod syscalls;
mod user;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread::yield_now;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::geteuid;
use rustix::thread::{UnshareFlags, unshare_unsafe};

pub use syscalls::Thread;
pub use user::User;

/// A thread that was joined is still counted by the kernel for a moment, and a user namespace is refused until then.
const PATIENCE: Duration = Duration::from_secs(1);

/// What happens on a system call that is not on the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unlisted {
    /// The process says which it was and ends.
    Ends,
    /// The kernel logs it and lets it pass: to find out what a list lacks.
    Logged,
}

/// A wall cannot be put up.
#[derive(Debug, thiserror::Error)]
#[error(
    "sandbox: {what}: {source}; {remedy}, or run with --no-sandbox, which lets a guest that takes over its VMM do what you can"
)]
pub struct SandboxError {
    what: String,
    source: io::Error,
    remedy: &'static str,
}

impl SandboxError {
    fn new(what: impl Into<String>, source: impl Into<io::Error>, remedy: &'static str) -> Self {
        Self { what: what.into(), source: source.into(), remedy }
    }
}

/// What a directory is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Files in it are read.
    Read,
    /// Files in it are made, changed, renamed and removed, as far as who the process is then may do that.
    Write,
    /// The same, and whoever the process is then has to be able to.
    MustWrite,
}

/// A directory that stays visible.
#[derive(Debug, Clone)]
struct Kept {
    /// Where it is, without links.
    dir: PathBuf,
    /// How it is going to be named: absolute, with whatever links are in it.
    names: Vec<PathBuf>,
    access: Access,
}

/// A sandbox that is being planned.
#[derive(Debug, Clone)]
pub struct Sandbox {
    unlisted: Unlisted,
    user: Option<User>,
    debugger: bool,
    dirs: Vec<Kept>,
    place: Option<network::Place>,
}

/// Set once the process is inside; threads that start later take their lists from it.
static INSIDE: OnceLock<Unlisted> = OnceLock::new();

impl Sandbox {
    /// Walls without a door. `user` is who the process shall be; only root can become somebody else. Best before KVM is opened:
    /// the VM's end is faster then.
    pub fn new(unlisted: Unlisted, user: Option<User>) -> Self {
        Self { unlisted, user, debugger: false, dirs: Vec::new(), place: network::Place::new() }
    }

    /// Leaves what a debugger does to vCPUs possible.
    pub const fn permit_debugger(&mut self) {
        self.debugger = true;
    }

    /// Leaves `dir` visible, if there is one: to complain is for whoever uses it.
    pub fn keep(&mut self, dir: &Path, access: Access) {
        let Ok(name) = std::path::absolute(dir) else { return };
        let Ok(dir) = name.canonicalize() else { return };
        match self.dirs.iter_mut().find(|kept| kept.dir == dir) {
            Some(kept) => {
                kept.access = access.max(kept.access);
                if !kept.names.contains(&name) {
                    kept.names.push(name);
                }
            }
            None => self.dirs.push(Kept { dir, names: vec![name], access }),
        }
    }

    /// Leaves the directory visible in which `file` is made, renamed or removed while the VM runs.
    pub fn keep_place_of(&mut self, file: &Path, access: Access) {
        if let Ok(file) = std::path::absolute(file)
            && let Some(dir) = file.parent()
        {
            self.keep(dir, access);
        }
    }

    /// Goes inside, for good. Must be called while the process has one thread.
    ///
    /// # Errors
    /// The host refuses a wall. Others stand already, so that the process is of no use any more.
    pub fn enter(&self) -> Result<(), SandboxError> {
        let uid = self.user.map_or(geteuid().as_raw(), |user| user.uid);
        root::leave_namespaces()?;
        if let Some(place) = &self.place {
            place.keep_namespace();
        }
        root::close(&self.dirs)?;
        user::drop_privileges(self.user)?;
        files::try_writing(&self.dirs, uid)?;
        files::restrict(&self.dirs)?;
        syscalls::restrict_process(self.unlisted, self.debugger)?;
        // A second call would be our bug; the walls stand either way.
        let _ = INSIDE.set(self.unlisted);
        bedplate_devices::threads::on_worker_start(|| narrow(Thread::Worker));
        Ok(())
    }
}

/// Whether the process is inside of its sandbox.
pub fn is_inside() -> bool {
    INSIDE.get().is_some()
}

/// Leaves the calling thread only what its kind needs. Called first thing by every thread but vCPUs'; does nothing outside
/// of a sandbox.
///
/// # Panics
/// The host refuses the list: a thread must not go on without.
pub fn narrow(thread: Thread) {
    if let Some(unlisted) = INSIDE.get() {
        syscalls::restrict_thread(thread, *unlisted);
    }
}

/// Leaves namespaces. The one of users refuses while the process has another thread.
fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // SAFETY: no flag among them shares or separates memory or descriptors.
        match unsafe { unshare_unsafe(flags) } {
            Err(Errno::INVAL) if flags.contains(UnshareFlags::NEWUSER) && Instant::now() < deadline => yield_now(),
            done => return done,
        }
    }
}
