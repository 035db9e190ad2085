//! An initramfs: an archive in the kernel's `newc` cpio format.
//!
//! The kernel unpacks several archives that stand one after the other, each compressed or not, the later over the earlier.
//! So a compressed archive can be built once and a small plain one appended for each boot: see [`Archive::bytes`].

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::{Error, Result};

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;
/// Each header, name and content starts at a multiple of this; appended archives too.
const ALIGN: usize = 4;

/// An archive in the making. Parent directories come by themselves.
#[derive(Debug, Default, Clone)]
pub struct Archive {
    /// By path without a leading slash; the order puts each directory before what is in it.
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    mode: u32,
    device: (u32, u32),
    content: Vec<u8>,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an empty directory.
    pub fn dir(&mut self, path: &str) -> &mut Self {
        self.add(path, DIRECTORY | 0o755, (0, 0), Vec::new())
    }

    /// Adds a file with these bytes and permissions.
    pub fn file(&mut self, path: &str, permissions: u32, content: impl Into<Vec<u8>>) -> &mut Self {
        self.add(path, REGULAR | permissions, (0, 0), content.into())
    }

    /// Adds a copy of the file `from`, with these permissions.
    pub fn copy(&mut self, path: &str, permissions: u32, from: &Path) -> Result<&mut Self> {
        let content = fs::read(from).map_err(|source| Error::path("read", from, source))?;
        Ok(self.file(path, permissions, content))
    }

    /// Adds a symbolic link to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.add(path, SYMLINK | 0o777, (0, 0), target.as_bytes().to_vec())
    }

    /// Adds a character device, such as `/dev/console` (5, 1), without which the kernel gives init no standard streams.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) -> &mut Self {
        self.add(path, CHARACTER | 0o600, (major, minor), Vec::new())
    }

    fn add(&mut self, path: &str, mode: u32, device: (u32, u32), content: Vec<u8>) -> &mut Self {
        let path = path.trim_matches('/');
        let mut parent = path;
        while let Some((above, _)) = parent.rsplit_once('/') {
            parent = above;
            let made = || Entry { mode: DIRECTORY | 0o755, device: (0, 0), content: Vec::new() };
            self.entries.entry(parent.to_owned()).or_insert_with(made);
        }
        self.entries.insert(path.to_owned(), Entry { mode, device, content });
        self
    }

    /// The archive, uncompressed; its length is a multiple of 4, so that another may follow.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.entries.values().map(|e| e.content.len() + 256).sum());
        for (number, (path, entry)) in self.entries.iter().enumerate() {
            header(&mut out, number + 1, path, entry);
        }
        let end = Entry { mode: 0, device: (0, 0), content: Vec::new() };
        header(&mut out, 0, "TRAILER!!!", &end);
        out
    }

    /// The archive, compressed with zstd at `level`, padded so that another may follow. `zstd` is run for it: nothing
    /// else that uses this crate needs a compressor.
    pub fn zstd(&self, level: u8) -> Result<Vec<u8>> {
        let mut compressed =
            filter(Command::new("zstd").args(["-q", "-c", "-T0", &format!("-{level}")]), self.bytes())?;
        // The decompressor stops at the end of its frame; the kernel skips zeros between archives.
        compressed.resize(compressed.len().next_multiple_of(ALIGN), 0);
        Ok(compressed)
    }
}

fn header(out: &mut Vec<u8>, number: usize, path: &str, entry: &Entry) {
    let (major, minor) = entry.device;
    let links = if entry.mode & 0o170_000 == DIRECTORY { 2 } else { 1 };
    let fields = [
        number as u64,
        u64::from(entry.mode),
        0, // user
        0, // group
        links,
        0, // time: the same input gives the same bytes
        entry.content.len() as u64,
        0, // device of the file itself
        0,
        u64::from(major),
        u64::from(minor),
        path.len() as u64 + 1,
        0, // checksum: unused in this variant
    ];
    out.extend_from_slice(b"070701");
    for field in fields {
        out.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(ALIGN), 0);
    out.extend_from_slice(&entry.content);
    out.resize(out.len().next_multiple_of(ALIGN), 0);
}

/// Runs `command` over `input` and returns its output.
fn filter(command: &mut Command, input: Vec<u8>) -> Result<Vec<u8>> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |source| Error::io(format!("run {program}"), source);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
    let stdin = child.stdin.take();
    // A thread of its own feeds it: one that fills its output pipe stops reading its input.
    let feeder = std::thread::spawn(move || stdin.map_or(Ok(()), |mut pipe| pipe.write_all(&input)));
    let out = child.wait_with_output().map_err(failed)?;
    let fed = feeder.join().unwrap_or_else(|_| Err(std::io::Error::other("the feeding thread died")));
    if !out.status.success() {
        return Err(Error::Command { command: program, status: out.status.to_string(), stderr: String::new() });
    }
    fed.map_err(failed)?;
    Ok(out.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// GNU cpio is the judge of the format.
    #[test]
    fn cpio_reads_what_was_written() {
        let mut archive = Archive::new();
        archive.file("/etc/deep/name", 0o640, *b"hello").symlink("/sbin", "usr/sbin").dir("/proc");
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.cpio"), archive.bytes()).unwrap();
        let script = "cpio -idm --quiet < a.cpio && stat -c '%n %a %F' etc/deep/name sbin proc && cat etc/deep/name";
        let out = Command::new("sh").args(["-c", script]).current_dir(dir.path()).output().unwrap();
        let said = String::from_utf8(out.stdout).unwrap();
        assert_eq!(said, "etc/deep/name 640 regular file\nsbin 777 symbolic link\nproc 755 directory\nhello");
    }

    #[test]
    fn archives_can_stand_one_after_the_other() {
        let mut archive = Archive::new();
        archive.file("/a", 0o644, *b"x");
        assert_eq!(archive.bytes().len() % ALIGN, 0);
        assert_eq!(archive.zstd(1).unwrap().len() % ALIGN, 0);
    }

    #[test]
    fn equal_input_gives_equal_bytes() {
        let build = |first: &str, second: &str| {
            let mut archive = Archive::new();
            archive.file(first, 0o644, *b"x").file(second, 0o644, *b"x");
            archive.bytes()
        };
        assert_eq!(build("/a/b", "/c"), build("/c", "/a/b"));
    }
}
