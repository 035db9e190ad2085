//! The control thread: one `poll` over signals, the API's socket and its connections, devices that the guest has
//! let go of, and the end of the machine.

mod balloon;
mod change;
mod commands;
mod configure;
mod console;
mod describe;
mod fault;
mod filesystem;
mod hotplug;
mod http;
mod log;
mod metrics;
mod plug;
mod pmem;
mod routes;
mod session;
mod signals;
mod startup;
mod vcpus;

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::time::Duration;

use bedplate_api::vmm::Exit;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::EventFd;

pub use http::{DEFAULT_MAX_BODY, ListenError, Server};
pub use session::{Session, Settings, StartError};
pub use signals::{Signal, Signals};
pub use startup::StartTimes;

/// Whether the API understands a request. For fuzzing, which has no VM to do it with.
pub fn understands(method: &str, path: &str, body: &[u8]) -> bool {
    method.parse().is_ok_and(|method| routes::parse(&method, path, body).is_ok())
}

/// Serves until the VM has ended; says how. Without a VM, until one was started and has ended, or a signal ends it all.
///
/// # Errors
/// The host refuses to wait for events.
pub fn run(mut session: Session, mut server: Option<Server>, signals: &Signals) -> io::Result<Exit> {
    let leave = session.leave().try_clone()?;
    let (ended, departed) = (session.ended().try_clone()?, session.departed().try_clone()?);
    session.note_startup();
    let session = Rc::new(RefCell::new(session));
    loop {
        {
            let mut fds = vec![
                PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(borrow(&ended), PollFlags::IN),
                PollFd::from_borrowed_fd(borrow(&leave), PollFlags::IN),
                PollFd::from_borrowed_fd(borrow(&departed), PollFlags::IN),
            ];
            if let Some(server) = &server {
                server.poll_fds(&mut fds);
            }
            let is_busy = server.as_ref().is_some_and(Server::is_busy);
            let due = if is_busy { Some(Duration::ZERO) } else { session.borrow().until_due() };
            let timeout = due.map(|until| Timespec {
                // At most a minute.
                tv_sec: until.as_secs() as i64,
                tv_nsec: until.subsec_nanos().into(),
            });
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        while let Some(signal) = signals.next() {
            session.borrow_mut().signal(signal);
        }
        // What ended is asked below; an attempt to start that failed has signalled it, too.
        let _signals = ended.read();
        if leave.read().is_ok() {
            session.borrow_mut().stop("left by Ctrl-A X");
        }
        if departed.read().is_ok() {
            session.borrow_mut().settle();
        }
        if let Some(server) = &mut server {
            server.serve(&session);
        }
        session.borrow_mut().work_in_time();
        let exit = session.borrow_mut().take_exit();
        if let Some(exit) = exit {
            return Ok(exit);
        }
    }
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the borrow lives no longer than the descriptor's owner.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
