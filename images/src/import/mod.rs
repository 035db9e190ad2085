//! Making images out of files.
//!
//! The way: what is this file ([`format`]) → open it as a [`Source`] → look inside for what boots it ([`crate::boot`]) → cut
//! it into chunks → write the manifest → set the tag. A chunk that is in the store is not written again, so an import that
//! was interrupted goes on where it was, in effect, when it is started again.

mod cut;
mod error;
pub mod format;
pub mod qcow2;
mod source;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bedplate_api::Digest;
use bedplate_api::image::{BootData, ImageKind, Manifest, Part};
use rustix::fs::{SeekFrom, seek};

use crate::boot::{self, MAX_INITRD_LEN, MAX_KERNEL_LEN};
use crate::index::index_len;
use crate::manifest::{DISK, INITRD, KERNEL, SCHEMA};
use crate::store::is_tag_name;
use crate::{CHUNK_SIZE, MAX_FRAME_LEN, Store, StoreError};
pub use error::ImportError;
use format::{Format, HEAD_LEN, detect};
pub(crate) use source::Source;
use source::{Bytes, RawSource, open_file, read_ends};

/// Largest disk that is imported: 4 TiB, whose index has 2 GiB. A qcow2 file of a few hundred bytes may claim any size.
pub const MAX_IMPORT_SIZE: u64 = 4 << 40;

/// What to name instead of something that is no file.
const DISK_IMAGE: &str = "a disk image in raw or qcow2 format";

/// Told the bytes done and the bytes in all, from time to time; answers whether to go on.
pub type Progress<'a> = dyn FnMut(u64, u64) -> ControlFlow<()> + 'a;

/// What an import is to do beside storing the disk.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// Tag that shall point to the image.
    pub tag: Option<&'a str>,
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
}

/// Imports the raw or qcow2 disk image at `path`.
pub fn import_disk(
    store: &Store,
    path: &Path,
    options: Options<'_>,
    progress: &mut Progress<'_>,
) -> Result<Imported, ImportError> {
    check_tag(options.tag)?;
    let (source, format) = open(path, options.allow)?;
    let size = source.size();
    if size > MAX_IMPORT_SIZE {
        return Err(ImportError::TooLarge { path: path.to_owned(), size, most: MAX_IMPORT_SIZE });
    }
    let source = Rc::new(RefCell::new(source));
    need_space(store, &mut **source.borrow_mut())?;
    let _lease = store.lease()?;
    let found = boot::inspect(&source, path)?;
    let stopped = || ImportError::Stopped { path: path.to_owned() };

    let disk = cut::put_part(store, &mut **source.borrow_mut(), progress, stopped)?;
    let mut parts = BTreeMap::from([(DISK.to_owned(), disk)]);
    let mut labels = found.labels;
    labels.insert("format".to_owned(), format.to_string());
    let boot = match found.boot {
        None => None,
        Some(boot) => Some(put_boot(store, &mut parts, &boot.kernel, boot.initrd.as_deref(), boot.cmdline, stopped)?),
    };
    label_source(&mut labels, path);
    let manifest = Manifest { schema: SCHEMA, kind: ImageKind::Disk, parts, boot, labels };
    publish(store, manifest, options.tag, found.report, path)
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
    let boot = put_boot(store, &mut parts, &kernel_bytes, Some(&initrd_bytes), cmdline.to_owned(), stopped)?;
    let mut labels = BTreeMap::new();
    label_source(&mut labels, kernel);
    let manifest = Manifest { schema: SCHEMA, kind: ImageKind::Vmm, parts, boot: Some(boot), labels };
    publish(store, manifest, tag, Vec::new(), kernel)
}

/// The size of the disk in the image at `path`, and that it can be opened: for who wants to know before the work begins.
pub fn probe(path: &Path, allow: &[PathBuf]) -> Result<(u64, Format), ImportError> {
    open(path, allow).map(|(source, format)| (source.size(), format))
}

fn open(path: &Path, allow: &[PathBuf]) -> Result<(Box<dyn Source>, Format), ImportError> {
    let file = open_file(path, DISK_IMAGE)?;
    let (head, tail) = read_ends(&file, HEAD_LEN).map_err(ImportError::io("read", path))?;
    if head.is_empty() {
        return Err(ImportError::Empty { path: path.to_owned() });
    }
    let format = detect(&head, &tail);
    let source: Box<dyn Source> = match format {
        Format::Raw => Box::new(RawSource::new(file, path)?),
        Format::Qcow2 => Box::new(qcow2::Qcow2Source::open(path, allow)?),
        _ => return Err(ImportError::Format { path: path.to_owned(), format }),
    };
    match source.size() {
        0 => Err(ImportError::Empty { path: path.to_owned() }),
        size if !size.is_multiple_of(512) => Err(ImportError::Sectors { path: path.to_owned(), size }),
        _ => Ok((source, format)),
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

fn put_boot(
    store: &Store,
    parts: &mut BTreeMap<String, Part>,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: String,
    stopped: impl Fn() -> ImportError,
) -> Result<BootData, ImportError> {
    let mut put = |name: &str, bytes: &[u8]| {
        // Some tens of MiB, beside a disk whose progress was shown.
        let part = cut::put_part(store, &mut Bytes(bytes), &mut |_, _| ControlFlow::Continue(()), &stopped)?;
        parts.insert(name.to_owned(), part);
        Ok::<_, ImportError>(name.to_owned())
    };
    Ok(BootData { kernel: put(KERNEL, kernel)?, initrd: initrd.map(|bytes| put(INITRD, bytes)).transpose()?, cmdline })
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
    path: &Path,
) -> Result<Imported, ImportError> {
    crate::manifest::validate(&manifest).map_err(|cause| ImportError::Manifest { path: path.to_owned(), cause })?;
    let digest = store.put_manifest(&manifest)?;
    if let Some(tag) = tag {
        store.set_tag(tag, &digest)?;
    }
    Ok(Imported { digest, manifest, report })
}
