//! Changing an ext2, ext3 or ext4 file system in a disk, with the programs of e2fsprogs.
//!
//! The names in it are anybody's, and debugfs reads a language in which a name could say anything: only names of
//! harmless characters get into a script. The numbers that the programs answer with are checked against the file
//! system's place, so that whatever they say, nothing outside of it is cleared. What is inside is its own maker's harm.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

use super::walk::{Change, Targets};
use super::{IdentityError, tool};
use crate::boot::layout::Extent;

/// Of what is only shown to people.
const SHOWN: u64 = 64 << 10;

/// Of lists of blocks. That of an empty disk of 4 TiB has 15 MiB.
const LISTS: u64 = 256 << 20;

/// Longest path that is written into a script: debugfs cuts lines at 8 KiB.
const MAX_PATH: usize = 4096;

/// Exit codes of e2fsck: errors were corrected, and the system should be rebooted if it had mounted this.
const CORRECTED: i32 = 1 | 2;
/// And when it found what it did not correct.
const UNCORRECTED: i32 = 4;

/// Where the superblock is, in bytes from the file system's start, and in it what says that it is one.
const SUPERBLOCK: u64 = 1024;
const MAGIC_AT: u64 = 0x38;
const MAGIC: u16 = 0xef53;

/// A file system that is being changed.
pub(super) struct Ext<'a> {
    disk: &'a File,
    path: &'a Path,
    place: &'a str,
    start: u64,
    len: u64,
    block: u64,
    journal: bool,
    /// Why what is removed would not be gone.
    unclearable: Option<&'static str>,
}

impl<'a> Ext<'a> {
    /// Looks at the superblock of the file system at `extent`, which is `place` for people, of the disk at `path`.
    pub(super) fn open(disk: &'a File, path: &'a Path, place: &'a str, extent: &Extent) -> Result<Self, IdentityError> {
        // Features, by the names that mke2fs has for them.
        const HAS_JOURNAL: u32 = 0x4;
        const BIGALLOC: u32 = 0x200;
        let mut head = [0; 1024];
        disk.read_exact_at(&mut head, extent.start + SUPERBLOCK).map_err(IdentityError::io("read", path))?;
        let at = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let journal = at(0x5c) & HAS_JOURNAL != 0;
        let unclearable = match () {
            () if journal && at(0xe0) != JOURNAL_INODE => Some("its journal elsewhere"),
            () if at(0x64) & BIGALLOC != 0 => Some("clusters of blocks (bigalloc), which cannot be cleared"),
            () => None,
        };
        let this = Self { disk, path, place, start: extent.start, len: extent.len, block: 0, journal, unclearable };
        let block = 1024_u64.checked_shl(at(0x18)).filter(|block| *block <= 64 << 10);
        Ok(Self { block: block.ok_or_else(|| this.damaged("it has blocks of no size"))?, ..this })
    }

    /// Refuses a file system in which not all can be cleared.
    pub(super) fn clearable(self) -> Result<Self, IdentityError> {
        match self.unclearable {
            None => Ok(self),
            Some(what) => Err(self.refused(what)),
        }
    }

    /// Replays the journal of a system that was running, and corrects what is safely corrected.
    pub(super) fn check(&self) -> Result<(), IdentityError> {
        let repair = || self.run("e2fsck", &["-f", "-p"], "", SHOWN);
        let dirty = self.start > 0 && self.has_to_recover()?;
        if dirty && self.half(SUPERBLOCK + MAGIC_AT)? == MAGIC {
            return Err(self.refused("a journal to replay, behind the remains of another file system"));
        }
        let mut checked = repair()?;
        // After it has replayed a journal, e2fsck (1.47) opens the file system again where the disk begins, and fails. So the
        // mark that there is something to replay stays, and is taken away here. Should the journal not have been replayed,
        // the second check finds one without a mark that has something in it, and refuses that.
        if dirty && !checked.is(CORRECTED) && self.has_to_recover()? {
            self.run("debugfs", &["-w", "-R", "feature -needs_recovery"], "", SHOWN)?;
            checked = repair()?;
        }
        match () {
            () if checked.is(CORRECTED) => Ok(()),
            () if checked.has(UNCORRECTED) => Err(self.damaged(&checked.said())),
            // It was ended, or does not know a feature: nothing is said about the file system by that.
            () => Err(self.failed("e2fsck", &checked.said())),
        }
    }

    /// Removes and empties `targets`, but what [`is_safe`] refuses. Answers what debugfs had to say; whether it did it
    /// all is found by looking again: its exit code does not tell.
    pub(super) fn change(&self, targets: &Targets) -> Result<String, IdentityError> {
        let script = script(targets);
        if script.is_empty() {
            return Ok(String::new());
        }
        let changed = self.run("debugfs", &["-w", "-f", "-"], &script, SHOWN)?;
        if !changed.is(0) {
            return Err(self.failed("debugfs", &changed.said()));
        }
        // It repeats each command, and says what went wrong below it.
        let wrong: Vec<&str> = changed.text.lines().filter(|line| line.contains(" while ")).take(3).collect();
        Ok(wrong.join("; "))
    }

    /// Clears what no file has: free blocks, and what the journal remembers of blocks that had something else in them.
    pub(super) fn forget(&self) -> Result<(), IdentityError> {
        // Counts and bitmaps are right after this, and the journal is empty.
        let checked = self.run("e2fsck", &["-f", "-y"], "", SHOWN)?;
        if !checked.is(CORRECTED) {
            return Err(self.failed("e2fsck", &checked.said()));
        }
        if self.journal {
            let stat = self.list("debugfs", &["-R", "stat <8>"])?;
            let blocks = journal_blocks(&stat).ok_or_else(|| self.damaged("its journal has no blocks"))?;
            self.clear_all(blocks)?;
        }
        let groups = self.list("dumpe2fs", &[])?;
        let blocks = free_blocks(&groups).ok_or_else(|| self.failed("dumpe2fs", "its list cannot be read"))?;
        self.clear_all(blocks)?;
        let checked = self.run("e2fsck", &["-f", "-n"], "", SHOWN)?;
        if checked.is(0) { Ok(()) } else { Err(self.failed("e2fsck", &checked.said())) }
    }

    fn clear_all(&self, blocks: Vec<Range<u64>>) -> Result<(), IdentityError> {
        for range in blocks {
            let bytes = |block: u64| block.checked_mul(self.block).filter(|at| *at <= self.len);
            let (Some(from), Some(to)) = (bytes(range.start), bytes(range.end)) else {
                return Err(self.damaged("it has blocks behind its end"));
            };
            // Within the extent, which lies inside the disk.
            clear(self.disk, self.start + from..self.start + to).map_err(IdentityError::io("clear", self.path))?;
        }
        Ok(())
    }

    /// All that `program` prints.
    fn list(&self, program: &'static str, args: &[&str]) -> Result<String, IdentityError> {
        let listed = self.run(program, args, "", LISTS)?;
        if listed.is(0) && !listed.cut { Ok(listed.text) } else { Err(self.failed(program, &listed.said())) }
    }

    fn run(
        &self,
        program: &'static str,
        args: &[&str],
        script: &str,
        most: u64,
    ) -> Result<tool::Output, IdentityError> {
        tool::run(self.disk, self.start, program, args, script, most)
    }

    /// The system was cut off, and what it did last is in the journal only.
    fn has_to_recover(&self) -> Result<bool, IdentityError> {
        const NEEDS_RECOVERY: u16 = 0x4;
        Ok(self.half(self.start + SUPERBLOCK + 0x60)? & NEEDS_RECOVERY != 0)
    }

    /// The number in two bytes of the disk.
    fn half(&self, at: u64) -> Result<u16, IdentityError> {
        let mut bytes = [0; 2];
        self.disk.read_exact_at(&mut bytes, at).map_err(IdentityError::io("read", self.path))?;
        Ok(u16::from_le_bytes(bytes))
    }

    fn refused(&self, what: &'static str) -> IdentityError {
        IdentityError::Feature { disk: self.path.to_owned(), place: self.place.to_owned(), what }
    }

    fn damaged(&self, cause: &str) -> IdentityError {
        let (disk, place) = (self.path.to_owned(), self.place.to_owned());
        IdentityError::Damaged { disk, place, cause: cause.to_owned() }
    }

    pub(super) fn failed(&self, program: &'static str, said: &str) -> IdentityError {
        let (disk, place) = (self.path.to_owned(), self.place.to_owned());
        IdentityError::Failed { disk, place, program, said: said.to_owned() }
    }
}

/// The journal's place in the table of inodes, wherever mke2fs made it.
const JOURNAL_INODE: u32 = 8;

/// Whether `path` may stand in a script of debugfs, as one word that means this path.
pub(super) fn is_safe(path: &[u8]) -> bool {
    let harmless = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._@:+-~=,%".contains(byte);
    let name = |name: &[u8]| !matches!(name, b"" | b"." | b"..");
    path.len() <= MAX_PATH
        && path.iter().all(harmless)
        && path.strip_prefix(b"/").is_some_and(|rest| rest.split(|byte| *byte == b'/').all(name))
}

/// What debugfs is told to do.
fn script(targets: &Targets) -> String {
    let text = |path: &[u8]| is_safe(path).then(|| String::from_utf8_lossy(path).into_owned());
    let mut script = String::new();
    for target in &targets.files {
        let Some(path) = text(&target.path) else { continue };
        script += &match target.change {
            Change::Remove => format!("rm {path}\n"),
            Change::Empty => format!("sif {path} size 0\npunch {path} 0\n"),
        };
    }
    // One that still has something in it stays.
    for path in targets.dirs.iter().filter_map(|path| text(path)) {
        script += &format!("rmdir {path}\n");
    }
    script
}

/// The free blocks of all groups as `dumpe2fs` lists them: `  Free blocks: 7, 10-20`.
fn free_blocks(text: &str) -> Option<Vec<Range<u64>>> {
    let lists = text.lines().filter_map(|line| line.strip_prefix("  Free blocks:"));
    lists.flat_map(|list| list.split(',').map(str::trim).filter(|item| !item.is_empty())).map(blocks).collect()
}

/// The blocks that hold the journal, but the first, which describes it, as debugfs's `stat` lists them:
/// `(0-4095):100-4195` for each piece, and `(IND):7` for blocks that say where others are.
fn journal_blocks(text: &str) -> Option<Vec<Range<u64>>> {
    let list = text.lines().skip_while(|line| !matches!(*line, "EXTENTS:" | "BLOCKS:")).nth(1)?;
    let mut found = Vec::new();
    for item in list.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let (logical, physical) = item.strip_prefix('(')?.split_once("):")?;
        if !logical.starts_with(|c: char| c.is_ascii_digit()) {
            continue;
        }
        let logical = blocks(&logical.replace("[u]", ""))?;
        let mut physical = blocks(physical)?;
        if logical.start == 0 {
            physical.start += 1;
        }
        found.push(physical);
    }
    Some(found)
}

/// `7` or `7-9`.
fn blocks(text: &str) -> Option<Range<u64>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last).then_some(first..last.checked_add(1)?)
}

/// Makes `range` of the file read as zeros: by a hole, or written where the host's file system knows no holes.
pub(super) fn clear(disk: &File, range: Range<u64>) -> io::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(disk, flags, range.start, range.end - range.start) {
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => overwrite(disk, range),
        done => Ok(done?),
    }
}

/// Writes zeros over what is no hole in `range`.
fn overwrite(disk: &File, range: Range<u64>) -> io::Result<()> {
    let zeros = vec![0; 1 << 20];
    let mut at = range.start;
    while at < range.end {
        match seek(disk, SeekFrom::Data(at)) {
            Ok(data) => at = data,
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            // Not a file system that knows holes.
            Err(_) => {}
        }
        let len = range.end.saturating_sub(at).min(zeros.len() as u64);
        // Below the buffer's length.
        disk.write_all_at(&zeros[..len as usize], at)?;
        at += len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_names_get_into_a_script() {
        for path in ["/var/log/journal/0a/system@0b-0c.journal~", "/etc/machine-id", "/a/b=c,d+e:f_g%h"] {
            assert!(is_safe(path.as_bytes()), "{path}");
        }
        let long = format!("/{}", "a".repeat(MAX_PATH));
        for path in [
            "", "/", "etc", "//a", "/a/", "/a/../b", "/./a", "/a b", "/a\nrm b", "/a\tb", "/a\"", "/a'", "/a;b", "/!a",
            "/<8>", "/a\\b", "/a\rb", "/a#", "/$(a)", "/`a`", "/a|b", "/a*", "/ä", "/a\0", &long,
        ] {
            assert!(!is_safe(path.as_bytes()), "{path:?}");
        }
        assert!(!is_safe(b"/\xff"));
    }

    #[test]
    fn lists_of_blocks_are_read() {
        let text = "x\n  Free blocks: 3, 5-7\n  Free inodes: 9\n  Free blocks: \n";
        assert_eq!(free_blocks(text), Some(vec![3..4, 5..8]));
        for wrong in ["7-3", "x", "1-", "18446744073709551615"] {
            assert_eq!(free_blocks(&format!("  Free blocks: {wrong}\n")), None, "{wrong}");
        }
        let text = "Size: 1\nBLOCKS:\n(0-11):100-111, (IND):112, (12-20):113-121, (21):7\nTOTAL: 23\n";
        assert_eq!(journal_blocks(text), Some(vec![101..112, 113..122, 7..8]));
        assert_eq!(journal_blocks("EXTENTS:\n(ETB0):9, (0[u]-3[u]):5-8, (4):2\n"), Some(vec![6..9, 2..3]));
        assert_eq!(journal_blocks("EXTENTS:\nwhat\n"), None);
        assert_eq!(journal_blocks("nothing"), None);
    }
}
