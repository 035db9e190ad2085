//! What a block device reads from and writes to.

use std::io;
use std::os::fd::BorrowedFd;

use crate::virtio::View;

/// The contents of a disk. Called from the device's worker, one request at a time; the device has checked that requests
/// lie inside of what [`Backend::size`] said.
///
/// A backend that has [`Backend::progress`] may answer reads, writes, discards and zeroing with
/// [`io::ErrorKind::WouldBlock`]: what they need is not here yet. The device then puts the request aside, goes on with
/// others, and makes the same call again after [`Backend::proceed`] has said so. A call may therefore come twice, and the
/// device may be stopped in between.
pub trait Backend: Send {
    /// Bytes. Asked once, when the device is made.
    fn size(&self) -> u64;

    /// A descriptor that is readable when there is something for [`Backend::proceed`] to do, the same one always. Without
    /// it no call may answer `WouldBlock`.
    fn progress(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Does what there is to do without waiting. True if requests that were put aside may fare better now.
    fn proceed(&mut self) -> bool {
        false
    }

    /// Fills `data` with what is at `offset`.
    ///
    /// # Errors
    /// The host's; the guest sees a failed request.
    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Puts `data` to `offset`. Durable after the next [`Backend::flush`].
    ///
    /// # Errors
    /// The host's; the guest sees a failed request.
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes everything durable that was written.
    ///
    /// # Errors
    /// The host's; then nothing can be said about earlier writes.
    fn flush(&mut self) -> io::Result<()>;

    /// The guest does not need a range any more. A hint.
    ///
    /// # Errors
    /// The host's; a backend that cannot discard succeeds.
    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes a range read as zeroes; with `unmap`, its space may be given back.
    ///
    /// # Errors
    /// The host's.
    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// Reads into guest memory. For backends that can do so without a copy; the others go through `bounce`.
    ///
    /// # Errors
    /// As [`Backend::read_at`].
    fn read_to_guest(&mut self, mut offset: u64, into: View<'_>, bounce: &mut [u8]) -> io::Result<()> {
        let mut rest = into;
        while let Some((part, others)) = rest.split_at(rest.len().min(bounce.len()))
            && !part.is_empty()
        {
            let data = &mut bounce[..part.len()];
            self.read_at(offset, data)?;
            part.copy_from(data);
            offset += part.len() as u64;
            rest = others;
        }
        Ok(())
    }

    /// Writes out of guest memory, likewise.
    ///
    /// # Errors
    /// As [`Backend::write_at`].
    fn write_from_guest(&mut self, mut offset: u64, from: View<'_>, bounce: &mut [u8]) -> io::Result<()> {
        let mut rest = from;
        while let Some((part, others)) = rest.split_at(rest.len().min(bounce.len()))
            && !part.is_empty()
        {
            let data = &mut bounce[..part.len()];
            part.copy_to(data);
            self.write_at(offset, data)?;
            offset += part.len() as u64;
            rest = others;
        }
        Ok(())
    }
}

impl<B: Backend + ?Sized> Backend for Box<B> {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn progress(&self) -> Option<BorrowedFd<'_>> {
        (**self).progress()
    }

    fn proceed(&mut self) -> bool {
        (**self).proceed()
    }

    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        (**self).read_at(offset, data)
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        (**self).write_at(offset, data)
    }

    fn flush(&mut self) -> io::Result<()> {
        (**self).flush()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        (**self).discard(offset, len)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        (**self).write_zeroes(offset, len, unmap)
    }

    fn read_to_guest(&mut self, offset: u64, into: View<'_>, bounce: &mut [u8]) -> io::Result<()> {
        (**self).read_to_guest(offset, into, bounce)
    }

    fn write_from_guest(&mut self, offset: u64, from: View<'_>, bounce: &mut [u8]) -> io::Result<()> {
        (**self).write_from_guest(offset, from, bounce)
    }
}
