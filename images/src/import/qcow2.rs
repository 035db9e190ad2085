//! qcow2 files: the checks that come before anything is read through them, and reading.
//!
//! `imago` reads the format. What it would not refuse, or would only refuse in words that help nobody, is refused here from
//! the header: encryption, features that are not implemented, backing files and data files outside the image's own folder,
//! and tables behind the end of the file (whose entries would read as zeros, that is as holes). Specification: QEMU's
//! `docs/interop/qcow2.txt`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};

use super::format::{Format, HEAD_LEN, detect};
use super::layered::{Access, Layered, damaged, referred, storage};
use super::source::{open_file, read_ends};
use super::{DISK_IMAGE, ImportError};

/// Backing files behind one image. People who stack by hand have a few; a loop has no end.
const MAX_CHAIN: usize = 16;

/// Longest L1 table that QEMU makes, in bytes; that covers 2 EiB with its largest clusters.
const MAX_L1_LEN: u64 = 32 << 20;

/// Bytes of the header area that are looked at; extensions and the backing file's name lie within the first cluster.
const HEADER_AREA: usize = 64 << 10;

/// What the header of a qcow2 file says, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Name of the backing file, as written.
    pub backing: Option<String>,
    /// Format of the backing file, as written.
    pub backing_format: Option<String>,
    /// There is an external data file; its name, if that is written.
    pub data_file: Option<Option<String>>,
    cluster_bits: u32,
    l1_offset: u64,
    l1_entries: u32,
}

/// Why a qcow2 file cannot be imported, told from its header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not even a header.
    #[error("its header is cut off")]
    Short,
    /// Version 1, or of the future.
    #[error("it has version {0}")]
    Version(u32),
    /// Encrypted, by one of two methods.
    #[error("it is encrypted")]
    Encrypted,
    /// The image itself says so.
    #[error("it is marked as corrupt")]
    Corrupt,
    /// Compression other than deflate.
    #[error("its clusters are compressed with zstd")]
    Compression,
    /// Subclusters.
    #[error("it has extended L2 entries")]
    ExtendedL2,
    /// A feature bit that nobody knew when this was written.
    #[error("it needs features that are not known here (bits {0:#x})")]
    Features(u64),
    /// A value that cannot be.
    #[error("its header is damaged ({0})")]
    Nonsense(&'static str),
}

impl HeaderError {
    /// The rest of the sentence: what to do.
    pub(super) fn remedy(&self, path: &Path) -> String {
        let path = path.display();
        match self {
            Self::Short | Self::Nonsense(_) => ": get the file again".to_owned(),
            Self::Corrupt => format!(": repair it with `qemu-img check -r all {path}`"),
            Self::Encrypted => {
                format!(": decrypt it with `qemu-img convert -O raw` and its secret, then import {path}.raw")
            }
            Self::Version(_) | Self::Compression | Self::ExtendedL2 | Self::Features(_) => {
                format!(": convert it with `qemu-img convert -O raw {path} {path}.raw`, then import {path}.raw")
            }
        }
    }
}

/// Reads big-endian numbers out of a header that may end anywhere.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes(&self, at: u64, len: u64) -> Result<&[u8], HeaderError> {
        let range = usize::try_from(at).ok().zip(usize::try_from(len).ok());
        let range = range.and_then(|(at, len)| Some(at..at.checked_add(len)?));
        range.and_then(|range| self.0.get(range)).ok_or(HeaderError::Short)
    }

    fn u32(&self, at: u64) -> Result<u32, HeaderError> {
        Ok(self.bytes(at, 4)?.iter().fold(0, |n, byte| n << 8 | u32::from(*byte)))
    }

    fn u64(&self, at: u64) -> Result<u64, HeaderError> {
        Ok(u64::from(self.u32(at)?) << 32 | u64::from(self.u32(at + 4)?))
    }

    fn text(&self, at: u64, len: u64) -> Result<String, HeaderError> {
        let bytes = self.bytes(at, len)?.to_vec();
        String::from_utf8(bytes).map_err(|_| HeaderError::Nonsense("a name in it is not UTF-8"))
    }
}

impl Header {
    /// Reads and checks the header at the front of `bytes`, which are the file's first 64 KiB or all of it.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        let fields = Fields(bytes);
        let version = fields.u32(4)?;
        if fields.bytes(0, 4)? != b"QFI\xfb" || !matches!(version, 2 | 3) {
            return Err(HeaderError::Version(version));
        }
        if fields.u32(32)? != 0 {
            return Err(HeaderError::Encrypted);
        }
        let cluster_bits = fields.u32(20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(HeaderError::Nonsense("cluster size"));
        }
        let l1_entries = fields.u32(36)?;
        if u64::from(l1_entries) * 8 > MAX_L1_LEN {
            return Err(HeaderError::Nonsense("L1 table size"));
        }
        let mut this = Self {
            size: fields.u64(24)?,
            backing: Self::backing_name(&fields)?,
            backing_format: None,
            data_file: None,
            cluster_bits,
            l1_offset: fields.u64(40)?,
            l1_entries,
        };
        if version == 3 {
            this.parse_v3(&fields)?;
        }
        Ok(this)
    }

    fn backing_name(fields: &Fields<'_>) -> Result<Option<String>, HeaderError> {
        match (fields.u64(8)?, fields.u32(16)?) {
            (0, _) => Ok(None),
            (_, len) if len == 0 || len > 1023 => Err(HeaderError::Nonsense("length of the backing file's name")),
            (at, len) => fields.text(at, len.into()).map(Some),
        }
    }

    fn parse_v3(&mut self, fields: &Fields<'_>) -> Result<(), HeaderError> {
        // Bit 0 (refcounts may be off) does not matter to a reader.
        let features = fields.u64(72)?;
        let header_len = fields.u32(100)?;
        match features {
            bits if bits & 1 << 1 != 0 => return Err(HeaderError::Corrupt),
            bits if bits & 1 << 3 != 0 => return Err(HeaderError::Compression),
            bits if bits & 1 << 4 != 0 => return Err(HeaderError::ExtendedL2),
            bits if bits >> 5 != 0 => return Err(HeaderError::Features(bits & !0x1f)),
            _ => {}
        }
        let mut data_file = None;
        let mut at = u64::from(header_len);
        // Each extension is at least 8 bytes long, so this ends with the bytes.
        loop {
            let (kind, len) = (fields.u32(at)?, u64::from(fields.u32(at + 4)?));
            match kind {
                0 => break,
                0xe279_2aca => self.backing_format = Some(fields.text(at + 8, len)?),
                0x4441_5441 => data_file = Some(fields.text(at + 8, len)?),
                // Full disk encryption header pointer.
                0x0537_be77 => return Err(HeaderError::Encrypted),
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        if features & 1 << 2 != 0 {
            self.data_file = Some(data_file);
        }
        Ok(())
    }

    /// Refuses an image whose tables lie behind the end of the file: they would read as zeros, which mean holes.
    fn check_tables(&self, file: &File, path: &Path) -> Result<(), ImportError> {
        let size = file.metadata().map_err(ImportError::io("examine", path))?.len();
        let cut =
            |what: &str, end: u64| ImportError::Truncated { path: path.to_owned(), what: what.to_owned(), end, size };
        let l1_len = u64::from(self.l1_entries) * 8;
        let end = self.l1_offset.saturating_add(l1_len);
        if end > size {
            return Err(cut("its L1 table", end));
        }
        // Short enough to be read whole: see MAX_L1_LEN.
        let mut table = vec![0; l1_len as usize];
        file.read_exact_at(&mut table, self.l1_offset).map_err(ImportError::io("read", path))?;
        for entry in table.as_chunks::<8>().0 {
            let l2 = u64::from_be_bytes(*entry) & 0x00ff_ffff_ffff_fe00;
            let end = l2.saturating_add(1 << self.cluster_bits);
            if l2 != 0 && end > size {
                return Err(cut("an L2 table", end));
            }
        }
        Ok(())
    }
}

/// Opens the image at `path`; `allow` are files outside an image's folder that its chain may refer to.
pub(super) fn open(path: &Path, allow: &[PathBuf]) -> Result<Layered, ImportError> {
    let access = open_layer(path, Some(Format::Qcow2), allow, path, 0)?;
    Ok(Layered::new(access, path))
}

/// The file that the image at `path` refers to, if it does.
pub(super) fn reference(path: &Path) -> Result<Option<String>, ImportError> {
    let (head, _) = read_ends(&open_file(path, DISK_IMAGE)?, HEADER_AREA).map_err(ImportError::io("read", path))?;
    let header = Header::parse(&head).map_err(|cause| ImportError::Qcow2 { path: path.to_owned(), cause })?;
    let data_file = header.data_file.map(|name| name.unwrap_or_else(|| "a data file".to_owned()));
    Ok(header.backing.or(data_file))
}

/// Opens one image of a chain and, below it, the rest. `format` is what is written about it, if anything is.
fn open_layer(
    path: &Path,
    format: Option<Format>,
    allow: &[PathBuf],
    top: &Path,
    depth: usize,
) -> Result<Access, ImportError> {
    if depth > MAX_CHAIN {
        return Err(ImportError::Chain { path: top.to_owned(), most: MAX_CHAIN });
    }
    let file = open_file(path, DISK_IMAGE)?;
    let (head, tail) = read_ends(&file, HEAD_LEN).map_err(ImportError::io("read", path))?;
    let found = detect(&head, &tail);
    match format.unwrap_or(found) {
        // What is said to be raw is raw: a guest may have written a qcow2 header to its disk.
        Format::Raw => {
            let raw = Raw::open_image(storage(path)?, false).map_err(ImportError::io("open", path))?;
            Ok(FormatAccess::new(raw))
        }
        Format::Qcow2 if found == Format::Qcow2 => open_qcow2(path, &file, allow, top, depth),
        _ => Err(ImportError::Format { path: path.to_owned(), format: found }),
    }
}

fn open_qcow2(path: &Path, file: &File, allow: &[PathBuf], top: &Path, depth: usize) -> Result<Access, ImportError> {
    let (head, _) = read_ends(file, HEADER_AREA).map_err(ImportError::io("read", path))?;
    let header = Header::parse(&head).map_err(|cause| ImportError::Qcow2 { path: path.to_owned(), cause })?;
    header.check_tables(file, path)?;
    let backing = match &header.backing {
        None => None,
        Some(name) => {
            let format = match header.backing_format.as_deref() {
                Some("raw") => Some(Format::Raw),
                Some("qcow2") => Some(Format::Qcow2),
                // Files made by old versions of QEMU say nothing.
                _ => None,
            };
            let target = referred(path, name, allow)?;
            Some(open_layer(&target, format, allow, top, depth + 1)?)
        }
    };
    let data_file = match &header.data_file {
        None => None,
        Some(None) => return Err(damaged(path, "it needs a data file and does not name one")),
        Some(Some(name)) => Some(storage(&referred(path, name, allow)?)?),
    };
    let image: Qcow2<_, Access> = Qcow2::builder(storage(path)?)
        .backing(backing)
        .data_file(data_file)
        .open(DenyImplicitOpenGate::default())
        .map_err(|e| damaged(path, e))?;
    Ok(FormatAccess::new(image))
}
