//! Files in the guest's address space: opened, mapped, and known to KVM as memory of the guest.
//!
//! Nobody in this process reads or writes through the mapping, because a file may become shorter at any time, and then an
//! access is a signal. A guest's access is none: KVM finds nothing there and gives up ([`explain`] says why), if the VM was
//! not ended before that ([`Watch`]). For the same reason the mapping is not part of the memory that devices reach: a buffer
//! in it is "outside of guest memory" for them.

mod watch;

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use bedplate_devices::files::kind;
use bedplate_devices::virtio::net::Seen;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

pub use self::watch::{Start, Watch, Watching};
use crate::config::PmemConfig;
use crate::memory::MemoryError;

/// Address and length of such memory are multiples of this (Virtio 1.2, 5.19.5): a huge page of x86.
const ALIGN: u64 = 2 << 20;
/// Of the host.
const PAGE: u64 = 4096;

/// Why a file cannot be the guest's memory.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum PmemFileError {
    #[error("pmem {id}: {path}: {source}; check the path and who may read it, or write it unless read_only is set")]
    Open { id: String, path: PathBuf, source: io::Error },
    #[error("pmem {id}: {path} is {found}; give a regular file")]
    Kind { id: String, path: PathBuf, found: &'static str },
    #[error("pmem {id}: {path} has 0 bytes; give the file a size")]
    Empty { id: String, path: PathBuf },
    #[error("pmem {id}: {path} cannot be mapped: {source}; free some address space, or put it on another file system")]
    Map { id: String, path: PathBuf, source: io::Error },
    #[error("pmem {id}: {source}")]
    Address { id: String, source: MemoryError },
}

/// One file, open and mapped, with its place in the guest's address space.
pub struct PmemFile {
    /// As configured.
    pub config: PmemConfig,
    /// Where the guest has it.
    pub region: Range<u64>,
    /// Where this process has it.
    pub mapping: Arc<FileMapping>,
    /// For flushes.
    pub file: Arc<File>,
    /// Bytes of the file.
    pub file_len: u64,
}

impl PmemFile {
    /// Opens and maps a file, and then takes a place for so many bytes.
    ///
    /// # Errors
    /// The file cannot be had in this way, is empty or no regular file, or there is no room for it. No place was taken.
    pub fn open(
        config: &PmemConfig,
        place: impl FnOnce(u64) -> Result<Range<u64>, MemoryError>,
    ) -> Result<Self, PmemFileError> {
        let PmemConfig { id, path, read_only, .. } = config;
        let (id, named) = (|| id.clone(), || path.clone());
        let cannot = |source| PmemFileError::Open { id: id(), path: named(), source };
        // Before it is opened: that waits at a FIFO, and does things to some devices.
        let file_type = fs::metadata(path).map_err(cannot)?.file_type();
        if !file_type.is_file() {
            return Err(PmemFileError::Kind { id: id(), path: named(), found: kind(file_type) });
        }
        let file = File::options().read(true).write(!read_only).open(path).map_err(cannot)?;
        let file_len = file.metadata().map_err(cannot)?.len();
        if file_len == 0 {
            return Err(PmemFileError::Empty { id: id(), path: named() });
        }
        // The guest is told of whole huge pages; those of Firecracker's guests end alike.
        let len = file_len.next_multiple_of(ALIGN);
        let mapping = FileMapping::new(&file, file_len, len, *read_only).map_err(|source| PmemFileError::Map {
            id: id(),
            path: named(),
            source,
        })?;
        let region = place(len).map_err(|source| PmemFileError::Address { id: id(), source })?;
        let (mapping, file) = (Arc::new(mapping), Arc::new(file));
        Ok(Self { config: config.clone(), region, mapping, file, file_len })
    }

    /// Where it is, for a kernel that works in the guest's memory.
    pub fn seen(&self) -> Seen {
        let (guest, len, host) = (self.region.start, self.mapping.len() as u64, self.mapping.address() as u64);
        Seen { guest, len, host, mapping: Arc::clone(&self.mapping) as _ }
    }

    /// What the file is like now.
    pub fn witness(&self) -> Witness {
        let PmemConfig { id, path, .. } = &self.config;
        Witness { id: id.clone(), path: path.clone(), file: Arc::clone(&self.file), len: self.file_len }
    }
}

/// A file as it was when it was mapped.
pub struct Witness {
    id: String,
    path: PathBuf,
    file: Arc<File>,
    len: u64,
}

impl Witness {
    /// Of the device.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// That the file has become shorter, in words for people, if it has.
    pub fn has_shrunk(&self) -> Option<String> {
        let now = self.file.metadata().ok()?.len();
        (now < self.len).then(|| {
            let (id, path, len) = (&self.id, self.path.display(), self.len);
            format!("pmem {id}: {path} has become shorter, from {len} to {now} bytes; leave the file of a VM as it is")
        })
    }
}

/// Why the guest may have found nothing behind an address of its memory, in words for people.
pub fn explain(files: &[Witness]) -> String {
    if let Some(words) = files.iter().find_map(Witness::has_shrunk) {
        return words;
    }
    match files {
        [] => "the host ran out of memory or of huge pages".into(),
        files => {
            let paths: Vec<_> = files.iter().map(|file| file.path.display().to_string()).collect();
            format!("the host ran out of memory, or a file system is full or fails ({})", paths.join(", "))
        }
    }
}

/// A mapping of a whole file, and of nothing from its end to the next huge page's: writes there are lost with the VM.
///
/// Only its addresses are given away, for KVM.
pub struct FileMapping {
    /// All that was mapped, so that the rest can begin at a huge page's boundary.
    reserved: Range<usize>,
    start: usize,
    len: usize,
    read_only: bool,
}

impl FileMapping {
    fn new(file: &File, file_len: u64, len: u64, read_only: bool) -> io::Result<Self> {
        let too_large = |_| io::Error::from(io::ErrorKind::OutOfMemory);
        let to_usize = |number: u64| usize::try_from(number).map_err(too_large);
        let (file_len, pages, len) = (to_usize(file_len)?, to_usize(file_len.next_multiple_of(PAGE))?, to_usize(len)?);
        let reserve = to_usize((len as u64).saturating_add(ALIGN))?;
        // SAFETY: the kernel chooses the place; nothing is there.
        let base = unsafe {
            mmap_anonymous(std::ptr::null_mut(), reserve, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE)
        }?;
        let base = base as usize;
        // Where guest and host agree on what a huge page is, KVM can use the file's.
        let start = base.next_multiple_of(ALIGN as usize);
        let mapping = Self { reserved: base..base + reserve, start, len, read_only };
        let prot = if read_only { ProtFlags::READ } else { ProtFlags::READ | ProtFlags::WRITE };
        let fixed = MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: `start + len` is at most `base + reserve`, and the file's pages are at most `len`: what is replaced was
        // reserved above, for this. Nobody has a reference into it, and nobody gets one.
        unsafe { mmap(start as *mut _, file_len, prot, fixed | MapFlags::SHARED, file, 0) }?;
        if pages < len {
            // SAFETY: as above; this begins where the file's last page ends.
            unsafe { mmap_anonymous((start + pages) as *mut _, len - pages, prot, fixed | MapFlags::PRIVATE) }?;
        }
        Ok(mapping)
    }

    /// Its first byte.
    pub const fn address(&self) -> usize {
        self.start
    }

    /// Bytes of it.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Never: a file of no bytes is not mapped.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether nothing can be written through it.
    pub const fn read_only(&self) -> bool {
        self.read_only
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and of no use to anybody without this value.
        // Fails only for what is no mapping.
        let _ = unsafe { munmap(self.reserved.start as *mut _, self.reserved.len()) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use bedplate_devices::virtio::limiter::LimiterConfig;

    use super::*;
    use crate::memory::{Pages, Ram, layout};

    fn config(path: &Path, read_only: bool) -> PmemConfig {
        PmemConfig { id: "p".into(), path: path.into(), read_only, limits: LimiterConfig::NONE }
    }

    /// What the mapping has at `at`.
    fn peek(mapping: &FileMapping, at: usize) -> u8 {
        assert!(at < mapping.len());
        // SAFETY: inside of a mapping that can be read, and its file stays as it is.
        unsafe { ((mapping.address() + at) as *const u8).read_volatile() }
    }

    fn poke(mapping: &FileMapping, at: usize, byte: u8) {
        assert!(at < mapping.len() && !mapping.read_only());
        // SAFETY: as above, and it can be written.
        unsafe { ((mapping.address() + at) as *mut u8).write_volatile(byte) };
    }

    #[test]
    fn the_mapping_is_the_file_and_ends_with_a_huge_page() {
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().write_all_at(b"hello", 4094).unwrap();
        let mut ram = Ram::new(16, Pages::Normal).unwrap();
        let one = PmemFile::open(&config(path.path(), false), |len| ram.reserve(len)).unwrap();
        assert_eq!((one.file_len, one.mapping.len(), one.mapping.address() % (2 << 20)), (4099, 2 << 20, 0));
        assert_eq!(one.region.end - one.region.start, 2 << 20);
        let bytes: Vec<_> = (4093..4100).map(|at| peek(&one.mapping, at)).collect();
        assert_eq!(bytes, b"\0hello\0");
        poke(&one.mapping, 4094, b'H');
        poke(&one.mapping, 8192, 7);
        poke(&one.mapping, (2 << 20) - 1, 7);
        let mut bytes = [0; 8];
        assert_eq!(path.as_file().read_at(&mut bytes, 4094).unwrap(), 5, "what is beyond the end is not in the file");
        assert_eq!(&bytes[..5], b"Hello");

        path.as_file().set_len(4 << 20).unwrap();
        let two = PmemFile::open(&config(path.path(), true), |len| ram.reserve(len)).unwrap();
        assert!(two.region.start >= one.region.end && two.region.start.is_multiple_of(2 << 20));
        assert_eq!((two.mapping.len(), two.mapping.read_only()), (4 << 20, true));
        assert_eq!(peek(&two.mapping, 4094), b'H', "a page of the host is in both");
        assert!(ram.above(48, layout::MMIO64_LEN).unwrap().gap.start >= two.region.end);
        assert!(!vm_memory::GuestMemoryBackend::address_in_range(
            &*ram.memory,
            vm_memory::GuestAddress(one.region.start)
        ));
    }

    #[test]
    fn what_is_no_file_of_some_bytes_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut ram = Ram::new(16, Pages::Normal).unwrap();
        let mut said = |path: &Path| {
            PmemFile::open(&config(path, false), |len| ram.reserve(len)).map(|_| ()).unwrap_err().to_string()
        };
        assert!(said(&dir.path().join("none")).contains("none: No such file"));
        assert!(said(dir.path()).contains("is a directory; give a regular file"));
        assert!(said(Path::new("/dev/null")).contains("/dev/null is a character device"));
        std::fs::write(dir.path().join("empty"), "").unwrap();
        assert!(said(&dir.path().join("empty")).contains("has 0 bytes"));
    }

    #[test]
    fn a_file_that_has_become_shorter_is_found() {
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(1 << 20).unwrap();
        let mut ram = Ram::new(16, Pages::Normal).unwrap();
        let files = [PmemFile::open(&config(path.path(), false), |len| ram.reserve(len)).unwrap().witness()];
        assert!(explain(&[]).contains("huge pages"));
        assert!(explain(&files).contains("a file system is full"), "{}", explain(&files));
        path.as_file().set_len(7).unwrap();
        let words = explain(&files);
        assert!(words.contains(&*path.path().to_string_lossy()) && words.contains("from 1048576 to 7"), "{words}");
    }
}
