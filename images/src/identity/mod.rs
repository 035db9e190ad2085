//! Removing from a disk what belongs to the one machine that ran from it, so that many can be made of it.
//!
//! The way: partition table and file systems ([`crate::boot`]) → files that the table of rules speaks of (`rules`, `walk`)
//! → removed or emptied by e2fsprogs, and the blocks that they had cleared (`ext`, `tool`) → looked at again. The disk is a
//! copy in a raw file of the caller's own. ext2, ext3 and ext4 can be changed; a system on another file system is refused.
//!
//! What stays:
//! - names of removed files, though no content, in the slack of directories that they were in;
//! - files that other machines need too, such as `authorized_keys`, users, host name and network settings, and copies of
//!   keys under other names; what is known to be one machine's and stays is in [`Report::notes`];
//! - swap files, `/tmp`, mail, databases, what agents and clusters call a machine, the random seed of systemd-boot in an
//!   EFI system partition, UUIDs of file systems and partitions;
//! - what is in file systems that no system, `/var`, `/var/log` or `/home` is on, and between partitions.

mod error;
mod ext;
mod rules;
#[cfg(test)]
mod tests;
mod tool;
mod walk;

use std::cell::RefCell;
use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::rc::Rc;

use bedplate_api::image::{Trace, TraceKind};

use crate::boot::layout::{self, Extent};
use crate::boot::volume::{Content, Volume};
use crate::boot::{Shared, search};
use crate::import::RawSource;
pub use error::IdentityError;
use ext::Ext;
use walk::{Targets, WalkError};

/// Partitions that are looked into.
const MAX_PARTITIONS: usize = 64;

/// Directories of a file system that are looked into for whether people live there.
const MAX_HOMES: usize = 100;

/// What came of a removal.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// What was in the disk and is no more.
    pub removed: Vec<Trace>,
    /// What is still in it.
    pub left: Vec<Left>,
    /// What else a person should know, one line each.
    pub notes: Vec<String>,
}

/// A trace that was not removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    /// Which.
    pub trace: Trace,
    /// Why not.
    pub why: String,
}

/// Looks for what belongs to one machine in the raw disk file `disk`, and changes nothing. The disk may be that of a VM
/// that was cut off: what its journal has is taken into account, or, where it has the form of older kernels, refused;
/// [`remove`] replays both.
///
/// # Errors
/// The file cannot be read or was cut off; there is no system on an ext2, ext3 or ext4 file system; what is there is
/// damaged, or has more logs than any.
pub fn find(disk: &Path) -> Result<Vec<Trace>, IdentityError> {
    let file = File::open(disk).map_err(IdentityError::io("open", disk))?;
    let systems = survey(&file, disk)?.systems;
    Ok(systems.into_iter().flat_map(|(_, targets)| targets.files).map(|target| target.trace).collect())
}

/// Removes what belongs to one machine from the raw disk file `disk`, in place, and clears all free space of the file
/// systems that it looks into, their journals and the swap partitions, so that nothing of what was removed, now or before,
/// is in the file. Again is harmless. It takes e2fsprogs.
///
/// The file is the caller's own, nobody else has it open, and it is in a directory that others cannot enter: of a process
/// of root's, it belongs to the user 65534 while programs change it. After an error it may be changed in part.
///
/// # Errors
/// As of [`find`]; the file cannot be written; e2fsprogs is not installed, or fails; a file system is damaged beyond what
/// can be corrected without losing anything, or has a feature that is not known how to clear.
pub fn remove(disk: &Path) -> Result<Report, IdentityError> {
    let file = File::options().read(true).write(true).open(disk).map_err(IdentityError::io("open", disk))?;
    let _lent = tool::Lent::new(&file, disk)?;
    // Journals are replayed first: they may have more to say, and the library does not read all of them.
    for (place, content) in guarded(disk, || partitions(&file, disk))? {
        if matches!(content, Content::Volume(_) | Content::Unreadable(_)) {
            place.open(&file, disk)?.check()?;
        }
    }
    let Survey { systems, swaps, mut notes } = survey(&file, disk)?;
    let mut complaints = Vec::new();
    for (place, targets) in &systems {
        let ext = place.open(&file, disk)?.clearable()?;
        complaints.push(ext.change(targets)?);
        ext.forget()?;
    }
    for place in &swaps {
        // The first page says that it is swap space, and its UUID.
        let content = place.extent.start + 4096..place.extent.start + place.extent.len;
        ext::clear(&file, content).map_err(IdentityError::io("clear", disk))?;
        // Should a system have hibernated into it, nothing is to wake up.
        file.write_all_at(b"SWAPSPACE2", place.extent.start + 0xff6).map_err(IdentityError::io("clear", disk))?;
        notes.push(format!("the swap space in {} was cleared", place.name));
    }
    let left = leftovers(&file, disk, &complaints)?;
    let stays: HashSet<&Trace> = left.iter().map(|left| &left.trace).collect();
    let found = systems.into_iter().flat_map(|(_, targets)| targets.files).map(|target| target.trace);
    let removed: Vec<Trace> = found.filter(|trace| !stays.contains(trace)).collect();
    if removed.iter().any(|trace| trace.kind == TraceKind::HostKey) {
        notes.push(
            "the SSH server has no host keys now and makes none itself: cloud-init does at its first start, and so does \
             `ssh-keygen -A`"
                .to_owned(),
        );
    }
    Ok(Report { removed, left, notes })
}

/// Looks again. What could not be removed is an answer; what should have been and was not, an error. The `complaints` are
/// those of debugfs about each file system.
fn leftovers(file: &File, disk: &Path, complaints: &[String]) -> Result<Vec<Left>, IdentityError> {
    let mut left = Vec::new();
    for ((place, targets), complaint) in survey(file, disk)?.systems.into_iter().zip(complaints) {
        for target in targets.files {
            if ext::is_safe(&target.path) {
                let said = format!("{} is still there ({complaint})", target.trace.path);
                return Err(place.open(file, disk)?.failed("debugfs", &said));
            }
            let why = "its name is too long, or has characters that debugfs might take for something else".to_owned();
            left.push(Left { trace: target.trace, why });
        }
    }
    Ok(left)
}

/// A part of the disk.
struct Place {
    extent: Extent,
    /// What people call it.
    name: String,
}

impl Place {
    fn open<'a>(&'a self, file: &'a File, disk: &'a Path) -> Result<Ext<'a>, IdentityError> {
        Ext::open(file, disk, &self.name, &self.extent)
    }
}

/// What a disk has that is of interest here.
struct Survey {
    /// File systems with what the rules found on each.
    systems: Vec<(Place, Targets)>,
    swaps: Vec<Place>,
    notes: Vec<String>,
}

/// Calls `look`. What the libraries that read partition tables and file systems stumble over is damage, as it is where a
/// disk is imported.
fn guarded<T>(disk: &Path, look: impl FnOnce() -> Result<T, IdentityError>) -> Result<T, IdentityError> {
    catch_unwind(AssertUnwindSafe(look)).unwrap_or_else(|_| {
        let cause = "its tables make no sense".to_owned();
        Err(IdentityError::Damaged { disk: disk.to_owned(), place: "a partition".to_owned(), cause })
    })
}

fn partitions(file: &File, disk: &Path) -> Result<Vec<(Place, Content)>, IdentityError> {
    let again = file.try_clone().map_err(IdentityError::io("open", disk))?;
    let source: Shared = Rc::new(RefCell::new(Box::new(RawSource::new(again, disk)?)));
    let mut found = Vec::new();
    for extent in layout::read(&source, disk)?.extents.into_iter().take(MAX_PARTITIONS) {
        let content = Volume::probe(&source, &extent, disk)?;
        let name = extent.number.map_or_else(|| "the disk".to_owned(), |number| format!("partition {number}"));
        found.push((Place { extent, name }, content));
    }
    Ok(found)
}

/// Looks at every partition.
fn survey(file: &File, disk: &Path) -> Result<Survey, IdentityError> {
    guarded(disk, || look(partitions(file, disk)?, disk))
}

fn look(partitions: Vec<(Place, Content)>, disk: &Path) -> Result<Survey, IdentityError> {
    let mut found = Survey { systems: Vec::new(), swaps: Vec::new(), notes: Vec::new() };
    let (mut root, mut var) = (false, false);
    let mut room = walk::MAX_PATH_BYTES;
    let mut there = Vec::new();
    for (place, content) in partitions {
        let what = match content {
            Content::Volume(volume) => {
                if let Some(mount) = mount_of(&volume) {
                    root |= mount.is_empty();
                    // Empty, it is where another file system goes.
                    var |= mount == "/var" || !volume.has("/var") || !volume.names("/var/lib").is_empty();
                    found.notes.extend(kept(&volume, mount));
                    let targets = walk::walk(&volume, mount, &mut room).map_err(|e| unwalkable(e, disk, &place))?;
                    found.systems.push((place, targets));
                    continue;
                }
                "another ext4 file system".to_owned()
            }
            Content::Swap => {
                found.swaps.push(place);
                continue;
            }
            Content::Unreadable(what) | Content::Other(what) => what,
        };
        there.push(format!("{} holds {what}", place.name));
    }
    let wanted = match (root, var) {
        (true, true) => {
            found.notes.extend(there.into_iter().map(|there| format!("{there}; nothing was removed from it")));
            return Ok(found);
        }
        (true, false) => "/var of its system",
        (false, _) => "Linux system",
    };
    let there = if there.is_empty() { "it holds nothing".to_owned() } else { there.join(", ") };
    Err(IdentityError::NotThere { disk: disk.to_owned(), wanted, there })
}

/// Where a system mounts this, by what is in it: empty for the root, `None` for what no rule speaks of.
fn mount_of(volume: &Volume) -> Option<&'static str> {
    let any = |paths: &[&str]| paths.iter().any(|path| volume.has(path));
    if search::is_root(volume) {
        Some("")
    } else if volume.has("/lib") && volume.has("/log") && any(&["/cache", "/spool"]) {
        Some("/var")
    } else if any(&["/wtmp", "/btmp", "/lastlog"]) {
        Some("/var/log")
    } else {
        let homes = volume.names("/");
        let lived_in = |name: &String| any(&[&format!("/{name}/.profile"), &format!("/{name}/.bashrc")]);
        homes.iter().take(MAX_HOMES).any(lived_in).then_some("/home")
    }
}

/// What is one machine's and stays all the same.
fn kept(volume: &Volume, mount: &str) -> Vec<String> {
    let there = rules::KEPT.iter().filter(|(path, _)| mount.is_empty() && volume.has(path));
    there.map(|(path, what)| format!("{path} stays as it is: {what}")).collect()
}

fn unwalkable(e: WalkError, disk: &Path, place: &Place) -> IdentityError {
    let (disk, place) = (disk.to_owned(), place.name.clone());
    match e {
        WalkError::Read(cause) => IdentityError::Damaged { disk, place, cause: cause.to_string() },
        WalkError::TooMany => IdentityError::TooMany { disk, place, most: walk::MAX_NAMES },
    }
}
