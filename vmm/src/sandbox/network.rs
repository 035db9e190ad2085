//! The end of the network namespace.
//!
//! KVM's end of a VM and the end of a network namespace both wait until all that was freed before is gone from the kernel
//! (`rcu_barrier`), one after the other: together they take some ten milliseconds longer, and whoever waits for the process
//! waits for them. So the namespace is to go after the VM. When a process ends, the kernel closes its descriptors from the
//! lowest number on, and lets go of what they were in the opposite order: that is how Linux is made, and nothing but time depends
//! on it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

/// A number lower than those of all descriptors that are opened after it, as long as none below it is closed.
#[derive(Debug, Clone)]
pub(super) struct Place(Arc<OwnedFd>);

impl Place {
    /// Takes the lowest number that is free.
    pub fn new() -> Option<Self> {
        let pipe = io::pipe().ok()?;
        Some(Self(Arc::new(pipe.0.into())))
    }

    /// Puts the calling thread's network namespace there, until the process ends; `/proc` has to be there. Where it cannot be
    /// had, the end is slower.
    pub fn keep_namespace(&self) {
        let Ok(namespace) = File::open("/proc/thread-self/ns/net") else { return };
        // SAFETY: both are open; what the number was before is a pipe's end that nobody uses.
        let kept = unsafe { libc::dup3(namespace.as_raw_fd(), self.0.as_raw_fd(), libc::O_CLOEXEC) };
        if kept >= 0 {
            std::mem::forget(Arc::clone(&self.0));
        }
    }
}
