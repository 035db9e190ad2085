//! What the process holds of its own program.
//!
//! A start uses nearly all of it, and what comes after a small part; but what was once mapped stays mapped until the host is
//! short of memory. It is let go of a second after the start, and what is used from then on is mapped again from the page cache.
//! What a debugger of this process has written into code, to stop there, is lost with it.

use std::ffi::c_void;
use std::ptr;

use rustix::mm::{Advice, madvise};

/// Lets go of the program's pages that nothing has been written to: code and constants.
pub fn shed_program() {
    // SAFETY: the function keeps to the interface that is asked for, and lives as long as the program.
    unsafe { libc::dl_iterate_phdr(Some(shed), ptr::null_mut()) };
}

/// Called for the program; a shared library, if there were one, would come after it.
extern "C" fn shed(object: *mut libc::dl_phdr_info, _size: usize, _data: *mut c_void) -> libc::c_int {
    const STOP: libc::c_int = 1;
    const PAGE: usize = 4096;
    // SAFETY: the C library hands over a description that is valid during the call.
    let object = unsafe { &*object };
    // SAFETY: and so is its table, of as many entries.
    let segments = unsafe { std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()) };
    for segment in segments {
        // Relocations went to segments that may be written, if only until then.
        if segment.p_type != libc::PT_LOAD || segment.p_flags & libc::PF_W != 0 {
            continue;
        }
        let start = object.dlpi_addr + segment.p_vaddr;
        let before = start as usize % PAGE;
        let start = (start as usize - before) as *mut c_void;
        // SAFETY: a private mapping of a file, which has what was in it: nothing was written there.
        // Refused, the pages stay.
        let _ = unsafe { madvise(start, segment.p_memsz as usize + before, Advice::LinuxDontNeed) };
    }
    STOP
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_program_goes_on() {
        super::shed_program();
        assert_eq!(format!("{:?}", [1, 2]), "[1, 2]");
    }
}
