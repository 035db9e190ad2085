//! Signals as something to poll for.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// `SIGTERM`: press the power button.
    PowerButton,
    /// `SIGINT`, `SIGHUP`: end at once.
    Stop,
}

/// The signals that are for us.
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Takes the signals over. To be called before any thread is made: threads inherit which signals are blocked.
    ///
    /// # Errors
    /// The host refuses.
    pub fn take_over() -> io::Result<Self> {
        // A file that may not grow is an error of a write then, like a full disk, and not the end.
        // SAFETY: to ignore a signal takes no handler.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `sigemptyset` initialises the set, the others are given initialised ones; the signal numbers exist.
        let fd = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            libc::signalfd(-1, set.as_ptr(), libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and nobody else knows it.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// The next signal that waits.
    pub fn next(&self) -> Option<Signal> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let len = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer is as long as said.
        let read = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), len) };
        if usize::try_from(read) != Ok(len) {
            return None;
        }
        // SAFETY: the kernel has filled all of it.
        let number = unsafe { info.assume_init() }.ssi_signo;
        Some(if i32::try_from(number) == Ok(libc::SIGTERM) { Signal::PowerButton } else { Signal::Stop })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
