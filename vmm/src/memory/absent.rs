//! Parts of RAM that are filled after the guest has begun (userfaultfd).
//!
//! Whoever touches an absent part waits until it is [`present`](Absent::present): the guest, and devices for it. It is filled through a
//! mapping of its own. We ask the kernel for both kinds of wait, for pages that the file lacks (which is also the kind whose
//! waiters it wakes when a part is given back) and for pages that only the mapping lacks: otherwise a part would be there for
//! the guest from the first byte that was written to it.
//!
//! A process that is killed closes this and its VM in any order. That nobody then waits for the other is due to the vCPUs' run
//! pages: mapped as they are, they keep the VM until all threads are gone.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use linux_raw_sys::general::{
    UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MISSING_SHMEM, UFFDIO_REGISTER_MODE_MINOR,
    UFFDIO_REGISTER_MODE_MISSING, uffdio_api, uffdio_range, uffdio_register,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl};
use rustix::mm::{Advice, UserfaultfdFlags, madvise, userfaultfd};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Length of the kernel's message, and where in it are its kind and the address (`struct uffd_msg`).
const MESSAGE_LEN: usize = 32;
const MESSAGE_ADDRESS: usize = 16;

/// What of RAM is not there yet. Dropped, all of it is, as far as it was filled.
pub struct Absent {
    userfault: OwnedFd,
    /// RAM from address 0 on, as nobody else has it mapped.
    view: GuestMemoryMmap,
    /// Where others have address 0.
    base: usize,
    /// Bytes of that mapping.
    len: usize,
}

impl Absent {
    /// Takes `parts` away from the mapping that begins at `base` with what `file` begins with, and has `len` bytes. Nobody has
    /// touched them, and whole pages they are.
    ///
    /// # Errors
    /// The kernel has no such thing for files in memory (Linux before 5.14), or not for us.
    pub(super) fn new(base: usize, file: &Arc<File>, len: usize, parts: &[Range<u64>]) -> io::Result<Self> {
        // SAFETY: what it does to memory is done by the requests below.
        let userfault = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) }?;
        let features = u64::from(UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM);
        let mut api = uffdio_api { api: UFFD_API.into(), features, ioctls: 0 };
        // SAFETY: the request takes this structure and changes nothing but it.
        unsafe { ioctl(&userfault, Updater::<{ UFFDIO_API as Opcode }, _>::new(&mut api)) }?;
        let view = MmapRegion::from_file(FileOffset::from_arc(Arc::clone(file), 0), len).map_err(super::why)?;
        let view = GuestRegionMmap::new(view, GuestAddress(0)).ok_or(Errno::INVAL)?;
        let view = GuestMemoryMmap::from_regions(vec![view]).map_err(io::Error::other)?;
        let absent = Self { userfault, view, base, len };
        for part in parts {
            let mode = u64::from(UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
            let mut register = uffdio_register { range: absent.range(part), mode, ioctls: 0 };
            // SAFETY: the request takes this structure. Who touches the pages waits until `present`, or the end of this value.
            unsafe { ioctl(&absent.userfault, Updater::<{ UFFDIO_REGISTER as Opcode }, _>::new(&mut register)) }?;
        }
        Ok(absent)
    }

    fn range(&self, part: &Range<u64>) -> uffdio_range {
        uffdio_range { start: self.base as u64 + part.start, len: part.end - part.start }
    }

    /// RAM below 4 GiB for who fills the absent parts.
    pub const fn view(&self) -> &GuestMemoryMmap {
        &self.view
    }

    /// One of the parts has been filled: everybody has it, and who waits goes on.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn present(&self, part: &Range<u64>) -> io::Result<()> {
        // SAFETY: the request takes this structure, and lets others have what they wait for.
        unsafe { ioctl(&self.userfault, Setter::<{ UFFDIO_UNREGISTER as Opcode }, _>::new(self.range(part))) }?;
        Ok(())
    }

    /// An address that somebody has begun to wait for since this was last asked.
    pub fn wanted(&self) -> Option<u64> {
        let mut message = [0; MESSAGE_LEN];
        while rustix::io::read(&self.userfault, &mut message).is_ok_and(|len| len == MESSAGE_LEN) {
            let address = message[MESSAGE_ADDRESS..].first_chunk().map(|bytes| u64::from_ne_bytes(*bytes));
            if u32::from(message[0]) == UFFD_EVENT_PAGEFAULT {
                return address?.checked_sub(self.base as u64);
            }
        }
        None
    }
}

impl Drop for Absent {
    fn drop(&mut self) {
        // Linux before 6.4 may leave the mapping in pieces. It puts them together when something is said of all of them; this
        // changes nothing for a process that has no children. Refused, they stay.
        // SAFETY: the mapping is as long as that, and its content stays as it is.
        let _ = unsafe { madvise(self.base as *mut _, self.len, Advice::LinuxDontFork) };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use vm_memory::Bytes;

    use crate::memory::{Pages, Ram, Sharing};

    use super::*;

    const PART: Range<u64> = 4 << 20..6 << 20;

    #[test]
    fn who_touches_an_absent_part_waits_until_it_is_whole() {
        for pages in [Pages::Normal, Pages::Transparent] {
            let ram = Ram::new(16, pages).unwrap();
            let next = PART.end..PART.end + (2 << 20);
            let absent = ram.without(&[PART, next.clone()]).unwrap();
            ram.memory.write_obj(7u8, GuestAddress(PART.start - 1)).unwrap();
            assert_eq!(absent.wanted(), None);
            let (sender, receiver) = mpsc::channel();
            let memory = Arc::clone(&ram.memory);
            let toucher = thread::spawn(move || sender.send(memory.read_obj::<u8>(GuestAddress(PART.end - 1))));
            let deadline = std::time::Instant::now() + Duration::from_secs(60);
            let wanted = loop {
                match absent.wanted() {
                    Some(address) => break address,
                    None => assert!(std::time::Instant::now() < deadline, "nobody waits"),
                }
                thread::yield_now();
            };
            assert_eq!(wanted, PART.end - 4096, "{pages:?}");
            // Half of it is in the file now, and it is there for nobody.
            absent.view().write_obj(1u8, GuestAddress(PART.start)).unwrap();
            absent.view().write_obj(9u8, GuestAddress(PART.end - 1)).unwrap();
            assert!(receiver.try_recv().is_err());
            absent.present(&PART).unwrap();
            assert_eq!(receiver.recv().unwrap().unwrap(), 9);
            toucher.join().unwrap().unwrap();
            assert_eq!(ram.memory.read_obj::<u8>(GuestAddress(PART.start)).unwrap(), 1);
            // What was not filled is zeros when nobody is going to.
            drop(absent);
            assert_eq!(ram.memory.read_obj::<u8>(GuestAddress(next.start)).unwrap(), 0);
        }
    }

    #[test]
    fn memory_that_others_have_is_all_there() {
        let ram = Ram::with_sharing(16, Pages::Normal, Sharing::Backends).unwrap();
        assert!(ram.without(&[PART]).is_err(), "others would see what is not there yet");
    }
}
