//! A guest's memory and registers as an ELF core file, for `gdb`, `crash` and others that read them.
//!
//! Written by the control thread while the vCPUs stand still. Made aside and put into place by a rename, so that nobody
//! takes half of one for a whole; what the guest has never touched is a hole in it, as in its memory.

mod elf;

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bedplate_devices::files::kind;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::kvm::VcpuState;
use crate::machine::PauseError;
use crate::memory::Ram;
use elf::Segment;

/// Read and written at once.
const PIECE: usize = 1 << 20;
/// Zeros of this length are not written.
const BLOCK: usize = 4096;

/// Why there is no dump.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum CoreDumpError {
    #[error("core dump: {} is {found}; name a regular file, or one that does not exist yet", path.display())]
    InTheWay { path: PathBuf, found: &'static str },
    #[error("core dump {}: {source}; {}", path.display(), remedy(.source))]
    Write { path: PathBuf, source: io::Error },
    #[error("core dump: guest memory cannot be read: {0}")]
    Memory(io::Error),
    #[error(
        "core dump: vCPU {0} does not show its registers: the VM ends, or the host is short of processors; try again"
    )]
    Vcpu(usize),
    #[error("core dump: kernel and initial RAM disk are still being read, and the host's storage is slow; try again")]
    Loading,
    #[error("core dump: {0}")]
    Pause(#[from] PauseError),
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "make room: a dump is as large as what the guest has used of its memory"
        }
        ErrorKind::FileTooLarge => "name a file in a file system that takes files as large as the guest's memory",
        _ => "give a path in a directory that exists and that you may write",
    }
}

/// A file that is not there before it is whole.
struct Draft<'a> {
    path: &'a Path,
    aside: PathBuf,
    file: File,
    placed: bool,
}

impl<'a> Draft<'a> {
    fn create(path: &'a Path) -> Result<Self, CoreDumpError> {
        let mut aside = path.to_path_buf().into_os_string();
        aside.push(".tmp");
        let aside = PathBuf::from(aside);
        let cannot = |source| CoreDumpError::Write { path: path.into(), source };
        // It is the link itself, or whatever else it is, that a rename replaces.
        for place in [path, &aside] {
            match fs::symlink_metadata(place) {
                Ok(there) if !there.is_file() => {
                    return Err(CoreDumpError::InTheWay { path: place.into(), found: kind(there.file_type()) });
                }
                _ => {}
            }
        }
        // What an earlier dump left, or somebody put there: written into, it would stay theirs to read.
        match fs::remove_file(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(cannot(error)),
            _ => {}
        }
        // A new one, that nobody put there this moment either; and a guest's memory is its owner's only.
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside).map_err(cannot)?;
        Ok(Self { path, aside, file, placed: false })
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<(), CoreDumpError> {
        self.file.write_all_at(bytes, at).map_err(|source| self.cannot(source))
    }

    /// Makes it as long as it shall be, and puts it into place.
    fn finish(mut self, len: u64) -> Result<(), CoreDumpError> {
        let placed = self.file.set_len(len).and_then(|()| self.file.sync_data());
        let placed = placed.and_then(|()| fs::rename(&self.aside, self.path));
        placed.map_err(|source| self.cannot(source))?;
        self.placed = true;
        Ok(())
    }

    fn cannot(&self, source: io::Error) -> CoreDumpError {
        CoreDumpError::Write { path: self.path.into(), source }
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if !self.placed {
            // Somebody may have removed it.
            let _ = fs::remove_file(&self.aside);
        }
    }
}

/// Writes a dump to `path`, and replaces what is there when it is whole.
///
/// # Errors
/// The file cannot be written; then there is none.
pub fn write(path: &Path, vcpus: &[VcpuState], ram: &Ram) -> Result<(), CoreDumpError> {
    let regions: Vec<_> = ram.memory.iter().collect();
    let segment = |region: &&_| segment(*region);
    let segments: Vec<_> = regions.iter().map(segment).collect();
    let (head, offsets) = elf::head(vcpus, &segments);
    let draft = Draft::create(path)?;
    draft.write(&head, 0)?;
    let mut end = head.len() as u64;
    let mut buffer = vec![0; PIECE];
    for ((region, segment), at) in regions.iter().zip(&segments).zip(offsets) {
        let behind = region.file_offset().ok_or_else(|| CoreDumpError::Memory(ErrorKind::Unsupported.into()))?;
        copy(&draft, behind.file(), behind.start(), segment.len, at, &mut buffer)?;
        end = at + segment.len;
    }
    draft.finish(end)
}

fn segment(region: &impl GuestMemoryRegion) -> Segment {
    Segment { address: region.start_addr().raw_value(), len: region.len() }
}

/// Copies what there is of `len` bytes from `start` on.
fn copy(draft: &Draft<'_>, from: &File, start: u64, len: u64, to: u64, buffer: &mut [u8]) -> Result<(), CoreDumpError> {
    let end = start + len;
    let mut at = start;
    while at < end {
        let data = match seek(from, SeekFrom::Data(at)) {
            Ok(data) => data.min(end),
            // No more.
            Err(Errno::NXIO) => return Ok(()),
            // Huge pages do not tell.
            Err(Errno::INVAL) => at,
            Err(error) => return Err(CoreDumpError::Memory(error.into())),
        };
        let hole = match seek(from, SeekFrom::Hole(data)) {
            Ok(hole) => hole.min(end),
            Err(Errno::INVAL | Errno::NXIO) => end,
            Err(error) => return Err(CoreDumpError::Memory(error.into())),
        };
        at = data;
        while at < hole {
            // At most a piece.
            let piece = &mut buffer[..(hole - at).min(PIECE as u64) as usize];
            from.read_exact_at(piece, at).map_err(CoreDumpError::Memory)?;
            write_used(draft, piece, to + (at - start))?;
            at += piece.len() as u64;
        }
    }
    Ok(())
}

/// Leaves zeros away: as runs of blocks that are not.
fn write_used(draft: &Draft<'_>, bytes: &[u8], at: u64) -> Result<(), CoreDumpError> {
    let mut run = 0..0;
    for (number, block) in bytes.chunks(BLOCK).enumerate() {
        let start = number * BLOCK;
        if block.iter().any(|byte| *byte != 0) {
            if run.is_empty() {
                run = start..start;
            }
            run.end = start + block.len();
        } else if !run.is_empty() {
            draft.write(&bytes[run.clone()], at + run.start as u64)?;
            run = 0..0;
        }
    }
    if run.is_empty() { Ok(()) } else { draft.write(&bytes[run.clone()], at + run.start as u64) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::Pages;

    #[test]
    fn memory_is_in_it_and_holes_are_holes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("core");
        let ram = Ram::new(64, Pages::Normal).unwrap().with_hotplug(128).unwrap();
        let hotplug = ram.hotplug().unwrap().start;
        ram.memory.write_slice(b"first", GuestAddress(0)).unwrap();
        ram.memory.write_slice(b"last", GuestAddress((64 << 20) - 4)).unwrap();
        ram.memory.write_slice(&[0; 1 << 20], GuestAddress(16 << 20)).unwrap();
        ram.memory.write_slice(b"across pieces", GuestAddress((32 << 20) - 6)).unwrap();
        ram.memory.write_slice(b"added", GuestAddress(hotplug + 5000)).unwrap();
        fs::write(&path, "an older one").unwrap();
        write(&path, &[VcpuState::default()], &ram).unwrap();
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["core"]);
        let there = fs::metadata(&path).unwrap();
        assert_eq!((there.len(), there.mode() & 0o777), (4096 + (192 << 20), 0o600));
        assert!(there.blocks() * 512 < 1 << 20, "{} blocks: zeros were written", there.blocks());
        let file = File::open(&path).unwrap();
        let read = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, at).unwrap();
            bytes
        };
        let ram_at = 4096;
        assert_eq!(read(ram_at, 6), b"first\0");
        assert_eq!(read(ram_at + (64 << 20) - 4, 4), b"last");
        assert_eq!(read(ram_at + (32 << 20) - 6, 13), b"across pieces");
        assert_eq!(read(ram_at + (64 << 20) + 5000, 5), b"added");
    }

    #[test]
    fn who_prepared_the_draft_gets_nothing_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, aside, theirs) = (dir.path().join("core"), dir.path().join("core.tmp"), dir.path().join("theirs"));
        fs::write(&aside, "prepared").unwrap();
        fs::set_permissions(&aside, PermissionsExt::from_mode(0o666)).unwrap();
        fs::hard_link(&aside, &theirs).unwrap();
        write(&path, &[VcpuState::default()], &Ram::new(16, Pages::Normal).unwrap()).unwrap();
        assert_eq!(fs::read(&theirs).unwrap(), b"prepared");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_cannot_be_written_is_named_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let ram = Ram::new(16, Pages::Normal).unwrap();
        let refusal = |path: &Path| write(path, &[], &ram).unwrap_err().to_string();
        assert!(refusal(Path::new("/nowhere/core")).contains("/nowhere/core: No such file"));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        assert!(refusal(&link).contains("link is a symbolic link"));
        assert!(refusal(dir.path()).contains("is a directory"));
        // As where a disk is full.
        let path = dir.path().join("core");
        let draft = Draft::create(&path).unwrap();
        let full = draft.cannot(io::Error::from_raw_os_error(libc::ENOSPC)).to_string();
        assert!(full.contains("core: No space left") && full.contains("make room"), "{full}");
        assert!(dir.path().join("core.tmp").exists());
        drop(draft);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only the link");
    }
}
