//! The way of requests through io_uring: to the kernel in batches, one system call for all that a drain has found, and
//! back whenever they are done.
//!
//! A request in flight has a slot, which keeps its chain and the list of its buffers. There are as many slots as the
//! submission queue has entries, and each slot has at most one entry, so that the queue cannot be full. The kernel has
//! the file in its own table (a registered file), which saves it the look-up for each request.
//!
//! The invariant that `unsafe` here rests on: the buffers of a slot are guest memory that its `Buffers` keeps alive, and
//! a slot is neither changed nor dropped while its request is in flight. [`Uring::drop`] waits for what is.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, types};

use crate::Memory;
use crate::virtio::{Buffers, Chain, View};

/// Requests in flight, of all queues of a disk together.
const SLOTS: u16 = 256;
/// In flight: no more is begun. They are waited for when the device stops.
const MOST_BYTES: usize = 256 << 20;
/// `IOSQE_FIXED_FILE`: the entry's file is a place in the kernel's table.
const FIXED_FILE: u8 = 1;
/// The file's place in the kernel's table.
const FILE: types::Fixed = types::Fixed(0);

/// What the kernel is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Job {
    /// From the file to the guest.
    Read,
    /// From the guest to the file.
    Write,
    /// Make durable what was written; with the number of changes that this will cover.
    Flush(u64),
    /// The same after a write, which it belongs to.
    Settle(u64),
}

/// A request in flight.
pub(super) struct Slot {
    pub(super) queue: u16,
    pub(super) job: Job,
    /// Its header and status are read and written here.
    pub(super) chain: Chain,
    /// What is left to be read or written.
    rest: Buffers,
    /// Where that goes on in the file.
    offset: u64,
    /// Bytes of data, in all.
    pub(super) len: usize,
}

/// All that the ring will ever do, and with the registered file only: what goes through a ring, no list of system calls
/// looks at, so that a guest that takes over its VMM must not find one that opens files or sockets.
fn restrictions() -> [Restriction; 6] {
    let codes =
        [opcode::Read::CODE, opcode::Write::CODE, opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE];
    let [read, write, readv, writev, fsync] = codes.map(Restriction::sqe_op);
    [read, write, readv, writev, fsync, Restriction::sqe_flags_required(FIXED_FILE)]
}

/// What became of a slot.
pub(super) enum Landed {
    /// Not all of it is through; the rest was queued again.
    Partly,
    /// It is done, well or not. The slot is the caller's until he frees it or gives it another job.
    Done(usize, io::Result<()>),
}

/// A ring and the requests in it. Belongs to the worker of one disk.
pub struct Uring {
    ring: IoUring,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Entries that the kernel has not been told of.
    queued: usize,
    /// Slots with the kernel, or queued for it.
    in_flight: usize,
    /// Bytes of data of those.
    bytes: usize,
}

impl Uring {
    /// A ring for requests to `file`, of which the kernel keeps hold.
    ///
    /// # Errors
    /// The host has no io_uring, forbids it, or is too old.
    pub fn open(file: BorrowedFd<'_>) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_cqsize(2 * u32::from(SLOTS)).setup_r_disabled();
        let ring = builder.build(SLOTS.into())?;
        if !ring.params().is_feature_nodrop() || !ring.params().is_feature_submit_stable() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel's io_uring is older than Linux 5.10"));
        }
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        submitter.register_restrictions(&mut restrictions())?;
        submitter.register_enable_rings()?;
        Ok(Self { ring, slots: Vec::new(), free: Vec::new(), queued: 0, in_flight: 0, bytes: 0 })
    }

    /// A session begins, with queues in `memory`. Nothing is in flight.
    pub(super) fn prepare(&mut self, memory: &Memory) {
        debug_assert_eq!(self.in_flight, 0);
        let slot = || Slot {
            queue: 0,
            job: Job::Read,
            chain: Chain::new(memory),
            rest: Buffers::new(memory.clone()),
            offset: 0,
            len: 0,
        };
        self.slots = (0..SLOTS).map(|_| slot()).collect();
        self.free = (0..self.slots.len()).collect();
    }

    /// Whether one more request can be taken.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty() && self.bytes < MOST_BYTES
    }

    /// Requests in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Queues a request of `data` at `offset`. The chain is taken over in exchange for an empty one by
    /// [`Uring::keep_chain`], which has to follow.
    pub(super) fn start(&mut self, queue: u16, job: Job, data: Option<View<'_>>, offset: u64) -> usize {
        let Some(index) = self.free.pop() else { unreachable!("the caller has asked whether there is room") };
        let slot = &mut self.slots[index];
        slot.rest.clear();
        if let Some(data) = data {
            slot.rest.set(data);
        }
        (slot.queue, slot.job, slot.offset, slot.len) = (queue, job, offset, slot.rest.len());
        self.in_flight += 1;
        self.bytes += slot.len;
        self.queue(index);
        index
    }

    /// See [`Uring::start`].
    pub(super) fn keep_chain(&mut self, slot: usize, chain: &mut Chain) {
        std::mem::swap(&mut self.slots[slot].chain, chain);
    }

    /// The slot of a request that is done.
    pub(super) fn slot(&mut self, index: usize) -> &mut Slot {
        &mut self.slots[index]
    }

    /// The request has been answered.
    pub(super) fn release(&mut self, index: usize) {
        self.in_flight -= 1;
        self.bytes -= self.slots[index].len;
        self.free.push(index);
    }

    /// Puts what a slot's job needs next into the submission queue.
    pub(super) fn queue(&mut self, index: usize) {
        let slot = &self.slots[index];
        let entry = match (slot.job, slot.rest.iovecs()) {
            (Job::Flush(_) | Job::Settle(_), _) => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
            // Cheaper for the kernel than a list of one. A length comes from descriptors, which have 32 bits.
            (Job::Read, [one]) => {
                opcode::Read::new(FILE, one.iov_base.cast(), one.iov_len as u32).offset(slot.offset).build()
            }
            (Job::Write, [one]) => {
                opcode::Write::new(FILE, one.iov_base.cast(), one.iov_len as u32).offset(slot.offset).build()
            }
            (Job::Read, list) => opcode::Readv::new(FILE, list.as_ptr(), list.len() as u32).offset(slot.offset).build(),
            (Job::Write, list) => {
                opcode::Writev::new(FILE, list.as_ptr(), list.len() as u32).offset(slot.offset).build()
            }
        };
        let entry = entry.user_data(index as u64);
        // SAFETY: the buffers and the list of them are valid and stay so until the request is done (module documentation).
        let pushed = unsafe { self.ring.submission().push(&entry) };
        debug_assert!(pushed.is_ok(), "there are as many entries as slots");
        self.queued += 1;
    }

    /// Hands over what is queued. What the kernel cannot take now stays queued.
    ///
    /// # Errors
    /// The kernel is short of memory, or of room for answers; it may be asked again.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        while self.queued > 0 {
            match self.ring.submit() {
                Ok(0) => return Err(io::ErrorKind::WouldBlock.into()),
                Ok(count) => self.queued -= count.min(self.queued),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Waits until something is done.
    ///
    /// # Errors
    /// As [`Uring::submit`].
    pub(super) fn wait(&mut self) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(count) => self.queued -= count.min(self.queued),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// The next request that the kernel is done with.
    pub(super) fn landed(&mut self) -> Option<Landed> {
        let entry = self.ring.completion().next()?;
        let index = entry.user_data() as usize;
        let slot = &mut self.slots[index];
        let result = entry.result();
        if matches!(-result, libc::EINTR | libc::EAGAIN) {
            self.queue(index);
            return Some(Landed::Partly);
        }
        let Ok(done) = usize::try_from(result) else {
            return Some(Landed::Done(index, Err(io::Error::from_raw_os_error(-result))));
        };
        slot.rest.drop_bytes(done);
        slot.offset += done as u64;
        if slot.rest.is_empty() {
            return Some(Landed::Done(index, Ok(())));
        }
        match (done, slot.job) {
            (0, Job::Read) => Some(Landed::Done(index, Err(io::ErrorKind::UnexpectedEof.into()))),
            (0, _) => Some(Landed::Done(index, Err(io::ErrorKind::WriteZero.into()))),
            _ => {
                self.queue(index);
                Some(Landed::Partly)
            }
        }
    }
}

impl AsRawFd for Uring {
    /// Readable while there is something done.
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl Drop for Uring {
    /// A worker that died may have left requests behind, and the kernel would go on writing to guest memory.
    fn drop(&mut self) {
        while self.in_flight > 0 && self.wait().is_ok() {
            while self.ring.completion().next().is_some() {
                self.in_flight = self.in_flight.saturating_sub(1);
            }
        }
    }
}
