//! File systems on a disk, read-only, for finding what boots it and what belongs to one machine.
//!
//! The file system was made by who knows whom. `ext4-view` is safe Rust, and what it trusts is checked or limited here: the
//! superblock's sizes before it is opened, the bytes read in all, the length of every file and link before it is read.

use std::path::Path;

use ext4_view::{DirEntry, Ext4, Ext4Error, Ext4Read, FileType, Metadata, PathBuf};

use super::Shared;
use super::layout::Extent;
use crate::import::ImportError;

/// Bytes that may be read of one file system; more than the largest kernel and initial RAM disk with all that leads there.
const READ_BUDGET: u64 = 4 << 30;

/// Names that are looked at in one directory.
const MAX_NAMES: usize = 10_000;

/// Links followed on the way to one file; Linux follows as many.
const MAX_LINKS: usize = 40;

/// Longest link that Linux makes.
const MAX_LINK_LEN: u64 = 4096;

/// Block groups of the largest disk that is imported number 32768; small test file systems have smaller groups.
const MAX_GROUPS: u64 = 1 << 20;

/// An ext2, ext3 or ext4 file system.
pub(crate) struct Volume {
    fs: Ext4,
    pub(crate) extent: Extent,
}

/// What a directory has under one name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A regular file of so many bytes.
    File(u64),
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A device, a pipe or a socket.
    Other,
}

impl Kind {
    fn of(meta: &Metadata) -> Self {
        match meta.file_type() {
            FileType::Regular => Self::File(meta.len()),
            FileType::Directory => Self::Directory,
            FileType::Symlink => Self::Link,
            _ => Self::Other,
        }
    }
}

/// What is at an extent.
pub(crate) enum Content {
    /// Something that can be looked into.
    Volume(Volume),
    /// An ext2, ext3 or ext4 file system that is damaged, or has what the library does not know, in a few words.
    Unreadable(String),
    /// Swap space.
    Swap,
    /// Something else, in a few words.
    Other(String),
}

/// What swap space has at the end of its first page: as made, and with a system in it that hibernates.
const SWAP: [&[u8]; 5] = [b"SWAPSPACE2", b"S1SUSPEND\0", b"S2SUSPEND\0", b"ULSUSPEND\0", b"LINHIB0001"];

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

impl Volume {
    /// Looks at `extent` of the disk. A file system larger than its place means that the file `path` was cut off.
    pub(crate) fn probe(source: &Shared, extent: &Extent, path: &Path) -> Result<Content, ImportError> {
        let mut head = vec![0; 0x1_1000];
        // A short extent is followed by zeros here.
        let len = extent.len.min(head.len() as u64) as usize;
        source.borrow_mut().read_at(&mut head[..len], extent.start)?;
        if number(&head, 0x438, 2) != 0xef53 {
            let swap = SWAP.iter().any(|magic| head[0xff6..].starts_with(magic));
            return Ok(if swap { Content::Swap } else { Content::Other(other_content(&head).to_owned()) });
        }
        if let Some(end) = claimed_end(&head)
            && end > extent.len
        {
            let what = match extent.number {
                Some(number) => format!("the ext4 file system of partition {number}"),
                None => "its ext4 file system".to_owned(),
            };
            let (end, size) = (extent.start.saturating_add(end), extent.start + extent.len);
            return Err(ImportError::Truncated { path: path.to_owned(), what, end, size });
        }
        if !plausible_groups(&head) {
            return Ok(Content::Unreadable("a damaged ext4 file system".to_owned()));
        }
        let window = Window { source: source.clone(), start: extent.start, len: extent.len, budget: READ_BUDGET };
        Ok(match Ext4::load(Box::new(window)) {
            Ok(fs) => Content::Volume(Self { fs, extent: extent.clone() }),
            Err(e) => Content::Unreadable(format!("an ext4 file system that cannot be read ({e})")),
        })
    }

    /// The file system's UUID.
    pub(crate) fn uuid(&self) -> String {
        self.fs.uuid().to_string()
    }

    /// Follows links to the file or directory that `path` means. `None` when there is none.
    fn resolve(&self, path: &str) -> Result<Option<String>, Ext4Error> {
        let mut rest: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
        let mut done: Vec<String> = Vec::new();
        let mut links = 0;
        while let Some(name) = rest.pop() {
            match name.as_str() {
                "" | "." => continue,
                ".." => {
                    done.pop();
                    continue;
                }
                _ => {}
            }
            let here = format!("/{}{}{name}", done.join("/"), if done.is_empty() { "" } else { "/" });
            let meta = match self.fs.symlink_metadata(here.as_str()) {
                Ok(meta) => meta,
                Err(Ext4Error::NotFound | Ext4Error::NotADirectory) => return Ok(None),
                Err(e) => return Err(e),
            };
            if !meta.is_symlink() {
                done.push(name);
                continue;
            }
            links += 1;
            if links > MAX_LINKS || meta.len() > MAX_LINK_LEN {
                return Ok(None);
            }
            let target = self.fs.read_link(here.as_str())?;
            let Ok(target) = target.to_str() else { return Ok(None) };
            if target.starts_with('/') {
                done.clear();
            }
            rest.extend(target.split('/').rev().map(str::to_owned));
        }
        Ok(Some(format!("/{}", done.join("/"))))
    }

    /// The bytes of the file at `path`, links followed; `None` when there is none. An error, in words, when it is longer
    /// than `most`, or cannot be read.
    pub(crate) fn read(&self, path: &str, most: u64) -> Result<Option<Vec<u8>>, String> {
        let failed = |e: Ext4Error| format!("{path} cannot be read ({e})");
        let Some(real) = self.resolve(path).map_err(failed)? else { return Ok(None) };
        let mut file = match self.fs.open(real.as_str()) {
            Ok(file) => file,
            Err(Ext4Error::IsADirectory | Ext4Error::IsASpecialFile) => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        let len = file.metadata().len();
        if len > most {
            return Err(format!("{path} has {len} bytes, and at most {most} are taken"));
        }
        // Not larger than what the caller allows, which is in memory's reach.
        let mut bytes = vec![0; len as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            match file.read_bytes(&mut bytes[filled..]).map_err(failed)? {
                0 => return Err(format!("{path} ends before its length")),
                n => filled += n,
            }
        }
        Ok(Some(bytes))
    }

    /// A short text file; `None` when it is not there or no text.
    pub(crate) fn text(&self, path: &str) -> Option<String> {
        // The longest grub.cfg of a distribution has some tens of KiB.
        let bytes = self.read(path, 4 << 20).ok()??;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Names in the directory `path`; none when it is none.
    pub(crate) fn names(&self, path: &str) -> Vec<String> {
        let Ok(Some(real)) = self.resolve(path) else { return Vec::new() };
        let Ok(entries) = self.fs.read_dir(real.as_str()) else { return Vec::new() };
        entries
            .take(MAX_NAMES)
            .map_while(Result::ok)
            .filter_map(|entry| entry.file_name().as_str().ok().map(str::to_owned))
            .collect()
    }

    /// What is at `path`, an absolute path as bytes whose directories are no links; the last name is not followed either.
    pub(crate) fn kind(&self, path: &[u8]) -> Result<Option<Kind>, Ext4Error> {
        match self.fs.symlink_metadata(&PathBuf::try_from(path).map_err(|_| Ext4Error::MalformedPath)?) {
            Ok(meta) => Ok(Some(Kind::of(&meta))),
            Err(Ext4Error::NotFound | Ext4Error::NotADirectory) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Everything in the directory `path`, a path as for [`Self::kind`], but itself and its parent. It may be without end;
    /// who takes the entries says how many.
    pub(crate) fn entries(
        &self,
        path: &[u8],
    ) -> Result<impl Iterator<Item = Result<(Vec<u8>, Kind), Ext4Error>>, Ext4Error> {
        let dir = PathBuf::try_from(path).map_err(|_| Ext4Error::MalformedPath)?;
        let named = |entry: Result<DirEntry, Ext4Error>| {
            let entry = entry?;
            Ok((entry.file_name().as_ref().to_vec(), Kind::of(&entry.metadata()?)))
        };
        let itself = |name: &[u8]| matches!(name, b"." | b"..");
        Ok(self.fs.read_dir(&dir)?.map(named).filter(move |entry| !entry.as_ref().is_ok_and(|(name, _)| itself(name))))
    }

    /// Whether there is anything at `path`.
    pub(crate) fn has(&self, path: &str) -> bool {
        matches!(self.resolve(path), Ok(Some(_)))
    }
}

/// What the well-known file systems look like, for the report.
fn other_content(head: &[u8]) -> &'static str {
    let at = |at: usize, what: &[u8]| head[at..].starts_with(what);
    match () {
        () if at(0, b"XFSB") => "an XFS file system, which is not looked into",
        () if at(0x1_0040, b"_BHRfS_M") => "a Btrfs file system, which is not looked into",
        () if at(54, b"FAT") || at(82, b"FAT") => "a FAT file system",
        () if at(0, b"LUKS\xba\xbe") => "encrypted data",
        () if at(0, b"hsqs") => "a squashfs file system, which is not looked into",
        () if at(0x218, b"LVM2 001") => "an LVM volume, which is not looked into",
        () if at(0x8001, b"CD001") => "an ISO 9660 file system, which is not looked into",
        () => "nothing that is known here",
    }
}

/// Where the file system says that it ends, in bytes from its start; `None` when its numbers make no sense.
fn claimed_end(head: &[u8]) -> Option<u64> {
    const HAS_64BIT: u64 = 0x80;
    let block = 1024_u64.checked_shl(u32::try_from(number(head, 0x418, 4)).ok()?)?;
    let high = if number(head, 0x460, 4) & HAS_64BIT != 0 { number(head, 0x550, 4) } else { 0 };
    (high << 32 | number(head, 0x404, 4)).checked_mul(block)
}

/// The library makes room for as many groups as the superblock claims before it reads any.
fn plausible_groups(head: &[u8]) -> bool {
    let (blocks, per_group) = (claimed_end(head).map(|end| end / 1024), number(head, 0x420, 4));
    let block_kib = 1_u64.checked_shl(number(head, 0x418, 4).min(64) as u32).unwrap_or(0);
    match (blocks, per_group, block_kib) {
        (Some(kib), 1.., 1..=64) => kib / block_kib / per_group <= MAX_GROUPS,
        _ => false,
    }
}

/// An extent of the disk as the library wants it, with a limit to what it may read.
struct Window {
    source: Shared,
    start: u64,
    len: u64,
    budget: u64,
}

impl Ext4Read for Window {
    fn read(&mut self, at: u64, bytes: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let len = bytes.len() as u64;
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err("a block behind the end of the file system".into());
        }
        self.budget = self.budget.checked_sub(len).ok_or("more to read than any file system needs")?;
        // Inside the extent, which lies inside the disk.
        self.source.borrow_mut().read_at(bytes, self.start + at).map_err(|e| e.to_string().into())
    }
}
