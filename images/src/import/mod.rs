//! Making images out of files.
//!
//! The way: what is this file ([`format`]) → open it as a [`Source`] → look inside for what boots it ([`crate::boot`]) → cut
//! it into chunks → write the manifest → set the tag. What comes as a stream ([`import_stream`]) is cut first and looked into
//! then. A chunk that is in the store is not written again, so an import that was interrupted goes on where it was, in
//! effect, when it is started again.

pub mod container;
mod cut;
mod error;
pub mod format;
mod layered;
pub mod qcow2;
mod source;
mod stream;
mod suspended;
#[cfg(test)]
mod tests;
mod unpack;
mod vmdk;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek};
use std::ops::ControlFlow;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bedplate_api::Digest;
use bedplate_api::image::{BootData, ImageKind, Manifest, Origin, Part};
use rustix::fs::{SeekFrom, seek};

use crate::boot::{self, MAX_INITRD_LEN, MAX_KERNEL_LEN};
use crate::index::index_len;
use crate::manifest::{DISK, INITRD, KERNEL, SCHEMA};
use crate::store::{Lease, is_tag_name};
use crate::{CHUNK_SIZE, MAX_FRAME_LEN, Store, StoreError};
use cut::{Holey, Kept, put_part};
pub use error::ImportError;
use format::{Format, HEAD_LEN, detect};
use source::{Bytes, open_file, read_ends};
pub(crate) use source::{RawSource, Source};
pub use stream::import_stream;
pub use suspended::{SuspendedFiles, import_suspended};

/// Largest disk that is imported: 4 TiB, whose index has 2 GiB. A qcow2 file of a few hundred bytes may claim any size.
pub const MAX_IMPORT_SIZE: u64 = 4 << 40;

/// What to name instead of something that is no file.
const DISK_IMAGE: &str = "a disk image in raw or qcow2 format";

/// Told the bytes done and the bytes in all (0 where nobody knows), from time to time; answers whether to go on. Of a
/// packed file the bytes as they are packed are counted.
pub type Progress<'a> = dyn FnMut(u64, u64) -> ControlFlow<()> + 'a;

/// What an import is to do beside storing the disk.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// Tag that shall point to the image.
    pub tag: Option<&'a str>,
    /// Where the disk comes from, if it was captured.
    pub origin: Option<&'a Origin>,
    /// Files outside the image's own folder that it may refer to as backing or data files.
    pub allow: &'a [PathBuf],
}

/// What came of an import.
#[derive(Debug, Clone)]
pub struct Imported {
    /// Digest of the manifest: the image's name.
    pub digest: Digest,
    /// What was written.
    pub manifest: Manifest,
    /// What was found inside the disk, and why it boots or does not, for people; one line each.
    pub report: Vec<String>,
    /// Distinct chunks that the disk, or each part of another image, have.
    pub chunks: u64,
    /// Those of them that were in the store before: of other images, or of an import that broke off.
    pub reused: u64,
}

/// What was opened.
enum Input {
    /// Something that can be read anywhere, and its format.
    Disk(Box<dyn Source>, Format),
    /// A file that has to be unpacked from its beginning.
    Packed(File, Format),
}

/// A disk that is in the store and waits for its manifest.
struct Disk {
    kept: Kept,
    found: boot::Found,
    format: Format,
}

/// Imports the disk image at `path`: raw, qcow2, or VMDK with flat files, or a raw or qcow2 image packed with gzip, xz or
/// zstd. It may be a block device.
pub fn import_disk(
    store: &Store,
    path: &Path,
    options: Options<'_>,
    progress: &mut Progress<'_>,
) -> Result<Imported, ImportError> {
    check_tag(options.tag)?;
    match open(path, options.allow)? {
        Input::Disk(source, format) => import_source(store, source, format, path, options, progress),
        Input::Packed(mut file, _) => {
            let examine = || ImportError::io("examine", path);
            // Its end was looked at.
            file.rewind().map_err(examine())?;
            let len = file.metadata().map_err(examine())?.len();
            import_stream(store, file, Some(len), path, options, progress)
        }
    }
}

/// Imports the file at `path` byte for byte, whatever it looks like: a disk whose guest decided what it begins with.
pub(crate) fn import_raw(
    store: &Store,
    path: &Path,
    options: Options<'_>,
    progress: &mut Progress<'_>,
) -> Result<Imported, ImportError> {
    check_tag(options.tag)?;
    let source = RawSource::new(open_file(path, DISK_IMAGE)?, path)?;
    import_source(store, Box::new(source), Format::Raw, path, options, progress)
}

fn import_source(
    store: &Store,
    source: Box<dyn Source>,
    format: Format,
    path: &Path,
    options: Options<'_>,
    progress: &mut Progress<'_>,
) -> Result<Imported, ImportError> {
    let size = source.size();
    if size > MAX_IMPORT_SIZE {
        return Err(ImportError::TooLarge { path: path.to_owned(), size, most: MAX_IMPORT_SIZE });
    }
    let source = Rc::new(RefCell::new(source));
    // A whole device counts as full, however empty it is; running out of space is noticed in time all the same.
    if !path.metadata().is_ok_and(|meta| meta.file_type().is_block_device()) {
        need_space(store, &mut **source.borrow_mut())?;
    }
    let lease = store.lease()?;
    let found = boot::inspect(&source, path)?;
    let stopped = || ImportError::Stopped { path: path.to_owned() };
    let kept = put_part(store, &mut Holey::new(&mut **source.borrow_mut()), progress, stopped)?;
    Disk { kept, found, format }.publish(store, &lease, options, path)
}

impl Disk {
    /// Keeps what boots it, and gives it its name. The lease is the one that its chunks were stored under.
    fn publish(self, store: &Store, _: &Lease, options: Options<'_>, path: &Path) -> Result<Imported, ImportError> {
        let Self { kept, found, format } = self;
        let stopped = || ImportError::Stopped { path: path.to_owned() };
        let mut parts = BTreeMap::from([(DISK.to_owned(), kept.part)]);
        let mut labels = found.labels;
        labels.insert("format".to_owned(), format.to_string());
        let boot = match found.boot {
            None => None,
            Some(boot) => {
                let put = put_boot(store, &mut parts, &boot.kernel, boot.initrd.as_deref(), boot.cmdline, stopped);
                Some(put?.0)
            }
        };
        // The file of a captured disk has a name that nobody gave it.
        if options.origin.is_none() {
            label_source(&mut labels, path);
        }
        let (kind, origin) = (ImageKind::Disk, options.origin.cloned());
        let manifest = Manifest { schema: SCHEMA, kind, parts, boot, firmware: found.firmware, origin, labels };
        let counts = (kept.chunks, kept.reused);
        publish(store, manifest, options.tag, found.report, counts, path)
    }
}

/// Makes a hypervisor image out of a kernel and an initial RAM disk.
pub fn import_files(
    store: &Store,
    kernel: &Path,
    initrd: &Path,
    cmdline: &str,
    tag: Option<&str>,
) -> Result<Imported, ImportError> {
    check_tag(tag)?;
    let kernel_bytes = read_limited(kernel, "a kernel", MAX_KERNEL_LEN)?;
    let initrd_bytes = read_limited(initrd, "an initial RAM disk", MAX_INITRD_LEN)?;
    if !boot::is_kernel(&kernel_bytes) {
        return Err(ImportError::NotAKernel { path: kernel.to_owned() });
    }
    store.need_space("the import", worst_case((kernel_bytes.len() + initrd_bytes.len()) as u64))?;
    let _lease = store.lease()?;
    let mut parts = BTreeMap::new();
    let stopped = || ImportError::Stopped { path: kernel.to_owned() };
    let (boot, counts) = put_boot(store, &mut parts, &kernel_bytes, Some(&initrd_bytes), cmdline.to_owned(), stopped)?;
    let mut labels = BTreeMap::new();
    label_source(&mut labels, kernel);
    let manifest = Manifest {
        schema: SCHEMA,
        kind: ImageKind::Vmm,
        parts,
        boot: Some(boot),
        firmware: None,
        origin: None,
        labels,
    };
    publish(store, manifest, tag, Vec::new(), counts, kernel)
}

/// The format of the image at `path`, and that it can be opened: for who wants to know before the work begins.
pub fn probe(path: &Path, allow: &[PathBuf]) -> Result<Format, ImportError> {
    Ok(match open(path, allow)? {
        Input::Disk(_, format) | Input::Packed(_, format) => format,
    })
}

fn open(path: &Path, allow: &[PathBuf]) -> Result<Input, ImportError> {
    let file = open_file(path, DISK_IMAGE)?;
    let (head, tail) = read_ends(&file, HEAD_LEN).map_err(ImportError::io("read", path))?;
    if head.is_empty() {
        return Err(ImportError::Empty { path: path.to_owned() });
    }
    let format = detect(&head, &tail);
    let source: Box<dyn Source> = match format {
        Format::Raw => Box::new(RawSource::new(file, path)?),
        Format::Qcow2 => Box::new(qcow2::open(path, allow)?),
        Format::VmdkText => Box::new(vmdk::open(path, allow)?),
        packing if packing.is_packed() => return Ok(Input::Packed(file, packing)),
        _ => return Err(ImportError::Format { path: path.to_owned(), format }),
    };
    match source.size() {
        0 => Err(ImportError::Empty { path: path.to_owned() }),
        size if !size.is_multiple_of(512) => Err(ImportError::Sectors { path: path.to_owned(), size }),
        _ => Ok(Input::Disk(source, format)),
    }
}

/// A name that cannot be a tag is better refused before the work than after it.
fn check_tag(tag: Option<&str>) -> Result<(), ImportError> {
    match tag {
        Some(name) if !is_tag_name(name) => Err(StoreError::TagName(name.chars().take(140).collect()).into()),
        _ => Ok(()),
    }
}

/// Refuses an import that could run out of space: nothing compresses and nothing is there yet.
fn need_space(store: &Store, source: &mut dyn Source) -> Result<(), ImportError> {
    let (mut content, mut at) = (0_u64, 0);
    // Holes take no space, so they are not counted; a walk over the allocation is quick beside the import.
    while let Some(range) = source.next_data(at)? {
        content = content.saturating_add(range.end - range.start).saturating_add(CHUNK_SIZE as u64);
        at = range.end;
    }
    let needs = worst_case(content.min(source.size())).saturating_add(index_len(source.size()));
    Ok(store.need_space("the import", needs)?)
}

/// Bytes that the chunks of `content` bytes take when nothing compresses.
fn worst_case(content: u64) -> u64 {
    content.div_ceil(CHUNK_SIZE as u64).saturating_mul(MAX_FRAME_LEN as u64)
}

fn read_limited(path: &Path, what: &'static str, most: u64) -> Result<Vec<u8>, ImportError> {
    let file = open_file(path, what)?;
    // A block device has a length only for who seeks.
    let end = seek(&file, SeekFrom::End(0)).and_then(|end| seek(&file, SeekFrom::Start(0)).map(|_| end));
    let size = end.map_err(|e| ImportError::io("examine", path)(e.into()))?;
    match size {
        0 => return Err(ImportError::Empty { path: path.to_owned() }),
        _ if size > most => return Err(ImportError::PartTooLarge { path: path.to_owned(), what, size, most }),
        _ => {}
    }
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes).map_err(ImportError::io("read", path))?;
    Ok(bytes)
}

/// Keeps kernel and initial RAM disk; also how many chunks they have, and how many of these were there before.
fn put_boot(
    store: &Store,
    parts: &mut BTreeMap<String, Part>,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: String,
    stopped: impl Fn() -> ImportError,
) -> Result<(BootData, (u64, u64)), ImportError> {
    let mut counts = (0, 0);
    let mut put = |name: &str, bytes: &[u8]| {
        // Some tens of MiB, beside a disk whose progress was shown.
        let mut go_on = |_, _| ControlFlow::Continue(());
        let kept = put_part(store, &mut Holey::new(&mut Bytes(bytes)), &mut go_on, &stopped)?;
        parts.insert(name.to_owned(), kept.part);
        counts = (counts.0 + kept.chunks, counts.1 + kept.reused);
        Ok::<_, ImportError>(name.to_owned())
    };
    let boot =
        BootData { kernel: put(KERNEL, kernel)?, initrd: initrd.map(|bytes| put(INITRD, bytes)).transpose()?, cmdline };
    Ok((boot, counts))
}

/// The file's name is for people; its folder is nobody's business.
fn label_source(labels: &mut BTreeMap<String, String>, path: &Path) {
    if let Some(name) = path.file_name() {
        labels.insert("source".to_owned(), name.to_string_lossy().into_owned());
    }
}

fn publish(
    store: &Store,
    manifest: Manifest,
    tag: Option<&str>,
    report: Vec<String>,
    (chunks, reused): (u64, u64),
    path: &Path,
) -> Result<Imported, ImportError> {
    crate::manifest::validate(&manifest).map_err(|cause| ImportError::Manifest { path: path.to_owned(), cause })?;
    let digest = store.put_manifest(&manifest)?;
    if let Some(tag) = tag {
        store.set_tag(tag, &digest)?;
    }
    Ok(Imported { digest, manifest, report, chunks, reused })
}
