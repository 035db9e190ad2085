//! The page that KVM and user space share for each vCPU.
//!
//! `kvm-ioctls` maps it too, but gives it out only together with the vCPU. This mapping is ours, so that a
//! [`super::Kicker`] on another thread can set `immediate_exit` for as long as it likes.

use std::io;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};

use kvm_bindings::kvm_run;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

pub(super) struct RunPage {
    page: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the page is shared memory; all access goes through the methods below, which read or write single fields with
// volatile operations and hand out no reference.
unsafe impl Send for RunPage {}
// SAFETY: as above; concurrent use touches `immediate_exit` only, one byte, which KVM itself reads concurrently.
unsafe impl Sync for RunPage {}

impl RunPage {
    pub fn map(vcpu: impl AsFd, len: usize) -> io::Result<Self> {
        if len < size_of::<kvm_run>() {
            return Err(io::Error::other("KVM's run area is smaller than its header"));
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing of ours.
        let page =
            unsafe { mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, vcpu, 0)? };
        let page = NonNull::new(page.cast()).ok_or_else(|| io::Error::other("mmap returned a null pointer"))?;
        Ok(Self { page, len })
    }

    pub fn set_immediate_exit(&self, on: bool) {
        // SAFETY: the mapping lives as long as self and is large enough for the header.
        unsafe { ptr::addr_of_mut!((*self.page.as_ptr()).immediate_exit).write_volatile(u8::from(on)) }
    }

    /// Width of one access of the port exit that the vCPU has just taken.
    pub fn port_width(&self) -> usize {
        // SAFETY: as above; every bit pattern is a valid u8.
        let width = unsafe { ptr::addr_of!((*self.page.as_ptr()).__bindgen_anon_1.io.size).read_volatile() };
        usize::from(width)
    }

    /// Sub-error and data of the internal error that the vCPU has just met.
    pub fn internal_error(&self) -> String {
        // SAFETY: as above; the struct is plain integers.
        let internal = unsafe { ptr::addr_of!((*self.page.as_ptr()).__bindgen_anon_1.internal).read_volatile() };
        let name = match internal.suberror {
            kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "emulation failure",
            kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "simultaneous exceptions",
            kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "event delivery",
            kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "unexpected exit reason",
            _ => "unknown",
        };
        let len = (internal.ndata as usize).min(internal.data.len());
        format!("{name} (sub-error {}), data {:x?}", internal.suberror, &internal.data[..len])
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length, and nobody holds a pointer into it: no method gives one out.
        // Failure would leave the mapping behind, which harms nobody.
        let _ = unsafe { munmap(self.page.as_ptr().cast(), self.len) };
    }
}
