//! The buffers of a descriptor chain, as the host's system calls take them.
//!
//! This module is where guest addresses become host pointers, so that reads and writes of files, taps and sockets go
//! straight to guest memory. The invariant that all `unsafe` here rests on: every `iovec` in a [`Buffers`] was made by
//! `push`, as its `region` was, from the memory that the same [`Buffers`] keeps alive, and mappings never change while that handle lives. The
//! guest may write to the bytes at any time, so they are only ever copied, by volatile access or by the kernel.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::iovec;
use vm_memory::{
    ByteValued, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, Permissions, VolatileMemory,
    VolatileSlice,
};

use crate::Memory;

/// How many pieces one system call takes (`UIO_MAXIOV`).
const MAX_IOVECS: usize = 1024;

/// Bytes of a page of the host.
const HOST_PAGE: usize = 4096;

/// A range that a descriptor names is not RAM.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a descriptor points outside of guest memory")]
pub struct OutsideRam;

/// A list of pieces of guest memory. Made once and filled again for every chain.
pub struct Buffers {
    memory: Memory,
    pieces: Vec<iovec>,
    len: usize,
    /// Where the region of RAM begins that the last buffer was in, and where it is: the next one mostly is there, too.
    region: Option<(u64, VolatileSlice<'static>)>,
}

// SAFETY: the raw pointers in `pieces` and `region` point into `memory`, which may be accessed from any thread.
unsafe impl Send for Buffers {}

impl Buffers {
    /// An empty list over `memory`.
    pub fn new(memory: Memory) -> Self {
        Self { memory, pieces: Vec::new(), len: 0, region: None }
    }

    /// An empty list over the same memory.
    pub fn another(&self) -> Self {
        Self::new(Memory::clone(&self.memory))
    }

    /// Empties the list, keeps its space.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.len = 0;
    }

    /// Appends a range of guest memory.
    ///
    /// # Errors
    /// Not all of it is RAM; nothing was appended.
    pub fn push(&mut self, address: GuestAddress, len: u32) -> Result<(), OutsideRam> {
        // Nearly every buffer lies in one region, and the iterator over regions costs several times as much.
        if len > 0
            && let Some(slice) = self.in_region(address, len as usize)
        {
            self.pieces.push(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
            self.len += len as usize;
            return Ok(());
        }
        let before = self.pieces.len();
        let slices = GuestMemory::get_slices(&*self.memory, address, len as usize, Permissions::ReadWrite);
        let slices = slices.map_err(|_| OutsideRam)?;
        for slice in slices {
            let Ok(slice) = slice else {
                self.pieces.truncate(before);
                return Err(OutsideRam);
            };
            self.pieces.push(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
        }
        self.len += len as usize;
        Ok(())
    }

    /// The range, if it lies in one region of RAM.
    fn in_region(&mut self, address: GuestAddress, len: usize) -> Option<VolatileSlice<'static>> {
        let find = |(start, region): (u64, VolatileSlice<'static>)| {
            region.subslice(usize::try_from(address.0.checked_sub(start)?).ok()?, len).ok()
        };
        if let Some(slice) = self.region.and_then(find) {
            return Some(slice);
        }
        let region = self.memory.find_region(address)?;
        let whole = region.as_volatile_slice().ok()?;
        // SAFETY: these are the bytes of the region, which are valid for as long as `memory` (module documentation).
        let whole = unsafe { VolatileSlice::new(whole.ptr_guard_mut().as_ptr(), whole.len()) };
        find(*self.region.insert((region.start_addr().0, whole)))
    }

    /// Moves the pieces of `other`, which must be over the same memory, to the end of this list.
    pub fn append(&mut self, other: &mut Buffers) {
        assert!(std::sync::Arc::ptr_eq(&self.memory, &other.memory), "buffers of two machines have no list in common");
        self.pieces.append(&mut other.pieces);
        self.len += std::mem::take(&mut other.len);
    }

    /// Forgets the first `pieces` pieces.
    pub fn drop_front(&mut self, pieces: usize) {
        self.len -= self.pieces.drain(..pieces).map(|piece| piece.iov_len).sum::<usize>();
    }

    /// Makes this the list of the pieces of `view`, which must be over the same memory.
    pub fn set(&mut self, view: View<'_>) {
        self.clear();
        self.pieces.extend(view.iovecs());
        self.len = view.len;
    }

    /// Forgets the first `bytes` bytes, or all if there are fewer.
    pub fn drop_bytes(&mut self, bytes: usize) {
        let mut left = bytes.min(self.len);
        self.len -= left;
        let whole = self.pieces.iter().take_while(|piece| {
            let fits = piece.iov_len <= left;
            left -= if fits { piece.iov_len } else { 0 };
            fits
        });
        let whole = whole.count();
        self.pieces.drain(..whole);
        if let Some(first) = self.pieces.first_mut() {
            first.iov_base = first.iov_base.wrapping_byte_add(left);
            first.iov_len -= left;
        }
    }

    /// The pieces as the kernel takes them, as many as it takes at once. They are valid guest memory, which the guest
    /// may write to at any time, for as long as this list is neither changed nor dropped.
    pub fn iovecs(&self) -> &[iovec] {
        &self.pieces[..self.pieces.len().min(MAX_IOVECS)]
    }

    /// How many pieces there are.
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Bytes in all pieces.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it.
    pub fn view(&self) -> View<'_> {
        View { pieces: &self.pieces, skip: 0, len: self.len }
    }
}

/// A stretch of the bytes of a [`Buffers`], however they are cut into pieces.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pieces: &'a [iovec],
    /// Bytes of the first piece that come before the stretch.
    skip: usize,
    len: usize,
}

impl<'a> View<'a> {
    /// Bytes in the stretch.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `at` bytes, and the rest; `None` if there are fewer.
    pub fn split_at(self, at: usize) -> Option<(View<'a>, View<'a>)> {
        let rest = self.len.checked_sub(at)?;
        let (mut pieces, mut skip) = (self.pieces, self.skip + at);
        while let Some((first, others)) = pieces.split_first()
            && skip >= first.iov_len
        {
            skip -= first.iov_len;
            pieces = others;
        }
        Some((View { len: at, ..self }, View { pieces, skip, len: rest }))
    }

    /// The pieces of the stretch.
    fn slices(self) -> impl Iterator<Item = VolatileSlice<'a>> {
        let (mut skip, mut left) = (self.skip, self.len);
        self.pieces.iter().map_while(move |piece| {
            let len = (piece.iov_len - skip).min(left);
            // SAFETY: `skip + len` bytes from the start of a piece are inside of it, and pieces are valid guest memory
            // while the `Buffers` that this borrows from lives (module documentation).
            let slice = (left > 0).then(|| unsafe { VolatileSlice::new(piece.iov_base.cast::<u8>().add(skip), len) });
            (skip, left) = (0, left - len);
            slice
        })
    }

    /// The pieces of the stretch as the kernel takes them.
    fn iovecs(self) -> impl Iterator<Item = iovec> {
        self.slices().map(|slice| iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() })
    }

    /// The stretch, if it is one piece: the kernel takes that with less ado than a list of one.
    fn single(self) -> Option<VolatileSlice<'a>> {
        self.slices().next().filter(|slice| slice.len() == self.len)
    }

    /// Copies guest bytes to `data`; returns how many there were.
    pub fn copy_to(self, data: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.slices() {
            done += slice.copy_to(&mut data[done..]);
            if done == data.len() {
                break;
            }
        }
        done
    }

    /// Copies `data` to the guest; returns how much of it fitted.
    pub fn copy_from(self, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.slices() {
            let part = &data[done..data.len().min(done + slice.len())];
            slice.copy_from(part);
            done += part.len();
            if done == data.len() {
                break;
            }
        }
        done
    }

    /// Gives the whole host pages in the stretch back to the host. They read as zeroes (in a private mapping of a file: as
    /// the file) until they are written again. Returns how many bytes that were.
    ///
    /// # Errors
    /// The host refuses; some pages may have been given back.
    pub fn release(self) -> io::Result<u64> {
        let mut released = 0;
        for slice in self.slices() {
            let start = slice.ptr_guard_mut().as_ptr();
            let skip = start.align_offset(HOST_PAGE);
            let len = slice.len().saturating_sub(skip) / HOST_PAGE * HOST_PAGE;
            if len == 0 {
                continue;
            }
            let start = start.wrapping_add(skip).cast();
            // Of a shared mapping, the file's pages; a private one knows only the second way.
            // SAFETY: the range is guest memory that is kept alive and stays mapped. Its bytes change, as they may at any
            // time by the guest's own hand.
            let mut result = unsafe { libc::madvise(start, len, libc::MADV_REMOVE) };
            if result != 0 {
                // SAFETY: as above.
                result = unsafe { libc::madvise(start, len, libc::MADV_DONTNEED) };
            }
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
            released += len as u64;
        }
        Ok(released)
    }

    /// Takes a value from the front; `None` if there are too few bytes.
    pub fn split_value<T: ByteValued + Default>(self) -> Option<(T, View<'a>)> {
        let (front, rest) = self.split_at(size_of::<T>())?;
        // Nearly always in one piece.
        if let Some(piece) = front.single()
            && let Ok(place) = piece.get_ref::<T>(0)
        {
            return Some((place.load(), rest));
        }
        let mut value = T::default();
        front.copy_to(value.as_mut_slice());
        Some((value, rest))
    }

    /// Writes `byte` to the start; nothing if there is no room.
    pub fn put_byte(self, byte: u8) {
        if let Some(piece) = self.slices().next()
            && let Ok(place) = piece.get_ref::<u8>(0)
        {
            place.store(byte);
        }
    }

    /// Hands the stretch, or as much of it as one system call takes, to `call`, followed by `extra` if all of it fitted.
    fn with_iovecs<R>(self, extra: Option<iovec>, call: impl FnOnce(&[iovec]) -> R) -> R {
        let mut iovecs = [const { MaybeUninit::<iovec>::uninit() }; MAX_IOVECS];
        let mut count = 0;
        for (place, piece) in iovecs.iter_mut().zip(self.iovecs().chain(extra)) {
            place.write(piece);
            count += 1;
        }
        // SAFETY: the first `count` elements were written just now, and `MaybeUninit<T>` has the layout of `T`.
        call(unsafe { std::slice::from_raw_parts(iovecs.as_ptr().cast(), count) })
    }

    /// One `readv` into the stretch, and what does not fit into `overflow`. Returns the bytes read.
    ///
    /// # Errors
    /// Of `readv`.
    pub fn read_once(self, fd: BorrowedFd<'_>, overflow: &mut [u8]) -> io::Result<usize> {
        let extra = iovec { iov_base: overflow.as_mut_ptr().cast(), iov_len: overflow.len() };
        let extra = (!overflow.is_empty()).then_some(extra);
        self.with_iovecs(extra, |iovecs| {
            // SAFETY: all iovecs are valid for writes: guest memory that is kept alive, and `overflow`.
            check(unsafe { libc::readv(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) })
        })
    }

    /// One `writev` of the stretch. Returns the bytes written.
    ///
    /// # Errors
    /// Of `writev`.
    pub fn write_once(self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.with_iovecs(None, |iovecs| {
            // SAFETY: all iovecs are guest memory that is kept alive.
            check(unsafe { libc::writev(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) })
        })
    }

    /// Fills the stretch with what the file has at `offset`.
    ///
    /// # Errors
    /// The read failed, or the file ends before.
    pub fn read_exact_at(self, fd: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.transfer(offset, io::ErrorKind::UnexpectedEof, |view, at| match view.single() {
            // SAFETY: the piece is guest memory that is kept alive, and valid for writes.
            Some(piece) => unsafe {
                libc::pread64(fd.as_raw_fd(), piece.ptr_guard_mut().as_ptr().cast(), piece.len(), at)
            },
            None => view.with_iovecs(None, |iovecs| {
                // SAFETY: all iovecs are guest memory that is kept alive, and valid for writes.
                unsafe { libc::preadv64(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, at) }
            }),
        })
    }

    /// Writes the stretch to the file at `offset`.
    ///
    /// # Errors
    /// The write failed.
    pub fn write_all_at(self, fd: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.transfer(offset, io::ErrorKind::WriteZero, |view, at| match view.single() {
            // SAFETY: the piece is guest memory that is kept alive.
            Some(piece) => unsafe {
                libc::pwrite64(fd.as_raw_fd(), piece.ptr_guard().as_ptr().cast(), piece.len(), at)
            },
            None => view.with_iovecs(None, |iovecs| {
                // SAFETY: all iovecs are guest memory that is kept alive.
                unsafe { libc::pwritev64(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, at) }
            }),
        })
    }

    /// Repeats `call` until all bytes are through.
    fn transfer(
        self,
        mut offset: u64,
        on_zero: io::ErrorKind,
        call: impl Fn(View<'_>, i64) -> isize,
    ) -> io::Result<()> {
        let mut rest = self;
        while !rest.is_empty() {
            let at = i64::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            match check(call(rest, at)) {
                Ok(0) => return Err(on_zero.into()),
                Ok(done) => {
                    offset += done as u64;
                    rest = rest.split_at(done).map_or(rest, |(_, rest)| rest);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Arc;

    use vm_memory::Bytes;

    use super::*;

    fn buffers() -> Buffers {
        // Two regions side by side, and nothing after.
        let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
        Buffers::new(Arc::new(vm_memory::GuestMemoryMmap::from_ranges(&ranges).unwrap()))
    }

    #[test]
    fn ranges_cross_regions_and_end_with_ram() {
        let mut buffers = buffers();
        buffers.push(GuestAddress(0xff0), 0x20).unwrap();
        assert_eq!((buffers.len(), buffers.pieces()), (0x20, 2));
        for (address, len) in [(0x1fff, 2), (0x2000, 1), (u64::MAX, 1), (u64::MAX - 1, u32::MAX), (0, u32::MAX)] {
            assert_eq!(buffers.push(GuestAddress(address), len), Err(OutsideRam), "{address:#x} {len:#x}");
        }
        assert_eq!((buffers.len(), buffers.pieces()), (0x20, 2));
        buffers.push(GuestAddress(0x2000), 0).unwrap_or(());
        assert_eq!(buffers.len(), 0x20);
    }

    #[test]
    fn copies_run_over_the_seams() {
        let mut buffers = buffers();
        for (address, len) in [(0x10, 3), (0xffe, 4), (0x100, 1)] {
            buffers.push(GuestAddress(address), len).unwrap();
        }
        let all = buffers.view();
        assert_eq!(all.copy_from(b"abcdefghij"), 8);
        let (front, back) = all.split_at(4).unwrap();
        let mut data = [0; 16];
        assert_eq!(front.copy_to(&mut data), 4);
        assert_eq!(&data[..4], b"abcd");
        assert_eq!(back.copy_to(&mut data[..2]), 2);
        assert_eq!(&data[..2], b"ef");
        let (value, rest) = back.split_value::<u16>().unwrap();
        assert_eq!((value.to_le_bytes(), rest.len()), (*b"ef", 2));
        assert!(rest.split_at(3).is_none());
        assert!(rest.split_value::<u32>().is_none());
        assert!(all.split_at(8).unwrap().1.is_empty());
        assert_eq!(buffers.memory.read_obj::<u8>(GuestAddress(0x100)).unwrap(), b'h');
        let mut others = Buffers::new(Arc::clone(&buffers.memory));
        others.set(back);
        assert_eq!((others.len(), others.iovecs().len()), (4, 3));
        others.drop_bytes(2);
        assert_eq!((others.len(), others.view().copy_to(&mut data), &data[..2]), (2, 2, &b"gh"[..]));
        others.drop_bytes(9);
        assert!(others.is_empty() && others.iovecs().is_empty());
        buffers.drop_front(1);
        assert_eq!((buffers.len(), buffers.view().copy_to(&mut data)), (5, 5));
    }

    #[test]
    fn whole_pages_are_given_back_and_others_stay() {
        let file = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 0x8000).unwrap();
        let held = |file: &std::os::fd::OwnedFd| rustix::fs::fstat(file).unwrap().st_blocks * 512;
        let offset = vm_memory::FileOffset::new(file.try_clone().unwrap().into(), 0);
        let ranges = [(GuestAddress(0), 0x8000, Some(offset))];
        let memory: Memory = Arc::new(vm_memory::GuestMemoryMmap::from_ranges_with_files(&ranges).unwrap());
        memory.write_slice(&[7; 0x8000], GuestAddress(0)).unwrap();
        assert_eq!(held(&file), 0x8000);
        let mut buffers = Buffers::new(Arc::clone(&memory));
        for (address, len) in [(0x800, 0x2000), (0x4000, 0x1000), (0x6001, 0x1ffe)] {
            buffers.push(GuestAddress(address), len).unwrap();
        }
        assert_eq!(buffers.view().release().unwrap(), 0x2000);
        assert_eq!(held(&file), 0x6000);
        for (address, byte) in
            [(0xfff, 7), (0x1000, 0), (0x1fff, 0), (0x2000, 7), (0x4fff, 0), (0x5000, 7), (0x7fff, 7)]
        {
            assert_eq!(memory.read_obj::<u8>(GuestAddress(address)).unwrap(), byte, "{address:#x}");
        }
    }

    #[test]
    fn files_go_straight_to_guest_memory() {
        let file = tempfile::tempfile().unwrap();
        let mut buffers = buffers();
        // More pieces than one system call takes.
        for i in 0..1500 {
            buffers.push(GuestAddress(i * 2), 1).unwrap();
        }
        let pattern: Vec<u8> = (0..1500).map(|i| i as u8).collect();
        buffers.view().copy_from(&pattern);
        buffers.view().write_all_at(file.as_fd(), 7).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 1507);
        buffers.view().copy_from(&[0; 1500]);
        buffers.view().read_exact_at(file.as_fd(), 7).unwrap();
        let mut back = vec![0; 1500];
        buffers.view().copy_to(&mut back);
        assert_eq!(back, pattern);
        let error = buffers.view().read_exact_at(file.as_fd(), 8).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
