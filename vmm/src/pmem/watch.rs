//! A file of the guest's that becomes shorter ends the VM at once, by a thread that waits for nothing else.
//!
//! Not left to the guest's next access: before it gives up, KVM has a page that it does not find looked for in the
//! background, and some hosts (seen with Linux 6.1) look for ever. The guest's processor then stands still without a word.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use bedplate_devices::threads;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::PmemFile;
use crate::machine::lifecycle::Lifecycle;
use crate::sandbox;

/// The files that are watched, and the thread that does it while there are any.
#[derive(Default)]
pub struct Watch {
    /// None while there are no files.
    events: Option<Arc<OwnedFd>>,
    /// What inotify calls them, by the id of the device. A file of several devices has one name.
    watches: BTreeMap<String, i32>,
    thread: Option<Watching>,
}

/// Starts the thread, from the thread that calls it.
pub type Start = Box<dyn FnOnce() -> io::Result<Watching> + Send>;

/// The thread. Dropped, it ends.
pub struct Watching {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Adds a file, by its path.
    ///
    /// # Errors
    /// The host watches no more files for this user (`/proc/sys/fs/inotify`).
    pub fn add(&mut self, file: &PmemFile) -> io::Result<()> {
        let events = match &self.events {
            Some(events) => Arc::clone(events),
            None => Arc::new(inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?),
        };
        // A change of length is a modification. Writes through a mapping, which are the guest's, are none.
        let watch = inotify::add_watch(&*events, &file.config.path, inotify::WatchFlags::MODIFY)?;
        self.watches.insert(file.config.id.clone(), watch);
        self.events = Some(events);
        Ok(())
    }

    /// Forgets the file of the device `id`. With the last one goes the thread.
    pub fn remove(&mut self, id: &str) {
        let Some(gone) = self.watches.remove(id) else { return };
        if self.watches.is_empty() {
            *self = Self::default();
        } else if let Some(events) = self.events.as_ref().filter(|_| !self.watches.values().any(|left| *left == gone)) {
            // Fails only for what is watched no more.
            let _ = inotify::remove_watch(&**events, gone);
        }
    }

    /// Has `run` start the thread, if there are files and it does not run. It ends the machine of `life`, which knows the
    /// files, when one of them becomes shorter.
    ///
    /// # Errors
    /// The host has no threads or descriptors left.
    pub fn start(&mut self, life: &Arc<Lifecycle>, run: impl FnOnce(Start) -> io::Result<Watching>) -> io::Result<()> {
        let Some(events) = self.events.as_ref().filter(|_| self.thread.is_none()) else { return Ok(()) };
        let (events, life) = (Arc::clone(events), Arc::clone(life));
        self.thread = Some(run(Box::new(move || Watching::start(events, life)))?);
        Ok(())
    }
}

impl Watching {
    fn start(events: Arc<OwnedFd>, life: Arc<Lifecycle>) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let their_stop = stop.try_clone()?;
        let body = move || {
            sandbox::narrow(sandbox::Thread::Worker);
            watch(events.as_fd(), &their_stop, &life);
        };
        let thread = threads::named("pmem-watch").spawn(body)?;
        Ok(Self { stop, thread: Some(thread) })
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
        if life.check_files() {
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

#[cfg(test)]
mod tests {
    use bedplate_devices::virtio::limiter::LimiterConfig;
    use tempfile::NamedTempFile;

    use super::*;
    use crate::config::PmemConfig;

    fn open(id: &str, path: &NamedTempFile) -> PmemFile {
        path.as_file().set_len(1 << 20).unwrap();
        let config =
            PmemConfig { id: id.into(), path: path.path().into(), read_only: true, limits: LimiterConfig::NONE };
        PmemFile::open(&config, |len| Ok(0..len)).unwrap()
    }

    #[test]
    fn a_file_of_two_devices_is_watched_until_both_are_gone() {
        let (path, other) = (NamedTempFile::new().unwrap(), NamedTempFile::new().unwrap());
        let life = Arc::new(Lifecycle::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        let mut watch = Watch::default();
        watch.start(&life, |_| unreachable!("there is nothing to watch")).unwrap();
        for file in [open("a", &path), open("b", &path), open("c", &other)] {
            watch.add(&file).unwrap();
        }
        let changes = |watch: &Watch| {
            path.as_file().set_len(2 << 20).unwrap();
            rustix::io::read(watch.events.as_ref().unwrap(), &mut [0; 4096]).is_ok()
        };
        assert!(changes(&watch));
        watch.remove("a");
        watch.remove("none");
        assert!(changes(&watch), "b is the same file");
        watch.remove("b");
        // That it is watched no more is an event, too.
        let _ = rustix::io::read(watch.events.as_ref().unwrap(), &mut [0; 4096]);
        assert!(!changes(&watch));
        assert!(watch.start(&life, |_| Err(io::Error::other("no thread"))).is_err());
        watch.start(&life, |start| start()).unwrap();
        watch.start(&life, |_| unreachable!("it runs")).unwrap();
        watch.remove("c");
        assert!(watch.events.is_none() && watch.thread.is_none());
    }

    #[test]
    fn a_file_that_comes_later_is_watched_by_the_thread_that_is_there() {
        let (path, other) = (NamedTempFile::new().unwrap(), NamedTempFile::new().unwrap());
        let ended = EventFd::new(EFD_CLOEXEC).unwrap();
        let life = Arc::new(Lifecycle::new(ended.try_clone().unwrap()));
        let mut watch = Watch::default();
        for file in [open("a", &path), open("b", &other)] {
            watch.add(&file).unwrap();
            life.add_file(file.witness());
            watch.start(&life, |start| start()).unwrap();
        }
        life.remove_file("a");
        path.as_file().set_len(1).unwrap();
        assert!(!life.check_files(), "that file is the guest's no more");
        other.as_file().set_len(1).unwrap();
        ended.read().unwrap();
        assert!(life.exit().unwrap().detail.contains("pmem b: "));
    }
}
