//! A file of the guest's that becomes shorter ends the VM at once, by a thread that waits for nothing else.
//!
//! Not left to the guest's next access: before it gives up, KVM has a page that it does not find looked for in the
//! background, and some hosts (seen with Linux 6.1) look for ever. The guest's processor then stands still without a word.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use bedplate_api::vmm::ExitReason;
use bedplate_devices::threads;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::PmemFile;
use crate::machine::lifecycle::Lifecycle;
use crate::sandbox;

/// Files to be watched. Opened before the sandbox, in which they cannot be named.
pub struct Watch {
    events: OwnedFd,
}

/// The thread. Dropped, it ends.
pub struct Watching {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// None where there are no files.
    ///
    /// # Errors
    /// The host watches no more files for this user (`/proc/sys/fs/inotify`).
    pub fn open(files: &[PmemFile]) -> io::Result<Option<Self>> {
        if files.is_empty() {
            return Ok(None);
        }
        let events = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
        for file in files {
            // A change of length is a modification. Writes through a mapping, which are the guest's, are none.
            inotify::add_watch(&events, &file.config.path, inotify::WatchFlags::MODIFY)?;
        }
        Ok(Some(Self { events }))
    }

    /// Ends the machine of `life`, which knows the files, when one of them becomes shorter.
    ///
    /// # Errors
    /// The host has no threads or descriptors left.
    pub fn start(self, life: &Arc<Lifecycle>) -> io::Result<Watching> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let (life, their_stop) = (Arc::clone(life), stop.try_clone()?);
        let body = move || {
            sandbox::narrow(sandbox::Thread::Worker);
            watch(self.events.as_fd(), &their_stop, &life);
        };
        let thread = threads::named("pmem-watch").spawn(body)?;
        Ok(Watching { stop, thread: Some(thread) })
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        // Fails only if it is signalled already.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic of it has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

fn watch(events: BorrowedFd<'_>, stop: &EventFd, life: &Lifecycle) {
    // SAFETY: the borrow ends with this function, and `stop` lives longer.
    let stop = unsafe { BorrowedFd::borrow_raw(stop.as_raw_fd()) };
    loop {
        // First of all: a file may have become shorter since it was mapped.
        if let Some(words) = life.shrunk_file() {
            life.end(ExitReason::HostFault, words);
            return;
        }
        let mut fds = [PollFd::new(&events, PollFlags::IN), PollFd::new(&stop, PollFlags::IN)];
        let waited = poll(&mut fds, None);
        let [changed, stopped] = fds.map(|fd| !fd.revents().is_empty());
        if stopped || waited.is_err_and(|error| error != rustix::io::Errno::INTR) {
            return;
        }
        if changed {
            // What happened is of no interest, only that something did; the rest wakes again.
            let _ = rustix::io::read(events, &mut [0; 4096]);
        }
    }
}
