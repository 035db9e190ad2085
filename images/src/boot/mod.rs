//! Looking inside a disk for what boots it without its boot loader.
//!
//! The way: partition table ([`layout`]) → file systems ([`volume`]) → configuration of boot loaders and well-known names
//! ([`search`]). The disk is data from anywhere: whatever is in it ends in "no boot data: why", not in a failed import, with
//! one exception: a disk whose own tables say that it was cut off is refused.

pub mod bls;
pub mod grub;
pub(crate) mod layout;
pub mod mbr;
pub(crate) mod search;
mod version;
pub(crate) mod volume;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::rc::Rc;

use bedplate_api::image::Firmware;

use crate::import::{ImportError, Source};
use volume::{Content, Volume};

/// Largest kernel that is taken. The largest that distributions ship have some 20 MiB.
pub const MAX_KERNEL_LEN: u64 = 256 << 20;
/// Largest initial RAM disk that is taken; with all firmware of a desktop in it, one has 200 MiB.
pub const MAX_INITRD_LEN: u64 = 1 << 30;

/// File systems that are looked into.
const MAX_VOLUMES: usize = 64;

/// A disk that is being looked at and will be read later.
pub(crate) type Shared = Rc<RefCell<Box<dyn Source>>>;

/// What boots a disk.
pub(crate) struct Boot {
    pub(crate) kernel: Vec<u8>,
    pub(crate) initrd: Option<Vec<u8>>,
    pub(crate) cmdline: String,
}

/// What was found on a disk.
#[derive(Default)]
pub(crate) struct Found {
    pub(crate) boot: Option<Boot>,
    /// Where nothing of the kind was found: the firmware that starts the disk's boot loader.
    pub(crate) firmware: Option<Firmware>,
    /// For the manifest.
    pub(crate) labels: BTreeMap<String, String>,
    /// For people.
    pub(crate) report: Vec<String>,
}

/// Looks into the disk `source`, which was opened from the file `path`.
pub(crate) fn inspect(source: &Shared, path: &Path) -> Result<Found, ImportError> {
    // The libraries that read partition tables and file systems were not written for hostile ones in every corner. A
    // panic there is a disk without boot data, and nothing of theirs is used after it.
    catch_unwind(AssertUnwindSafe(|| look(source, path))).unwrap_or_else(|_| {
        Ok(Found {
            report: vec!["no boot data: the disk's tables or file systems are damaged".to_owned()],
            ..Found::default()
        })
    })
}

fn look(source: &Shared, path: &Path) -> Result<Found, ImportError> {
    let mut found = Found::default();
    let layout = layout::read(source, path)?;
    found.report.push(match layout.extents.as_slice() {
        [whole] if whole.number.is_none() => layout.name.to_owned(),
        extents => format!("{} with {} partitions", layout.name, extents.len()),
    });
    let mut volumes = Vec::new();
    for extent in layout.extents.iter().take(MAX_VOLUMES) {
        let place = extent.number.map_or_else(|| "the disk".to_owned(), |number| format!("partition {number}"));
        match Volume::probe(source, extent, path)? {
            Content::Volume(volume) => {
                found.report.push(format!("{place} holds an ext4 file system"));
                volumes.push(volume);
            }
            Content::Swap => found.report.push(format!("{place} holds swap")),
            Content::Unreadable(what) | Content::Other(what) => found.report.push(format!("{place} holds {what}")),
        }
    }
    if let Some(name) = volumes.iter().find(|volume| search::is_root(volume)).and_then(system_name) {
        found.report.push(format!("the system is {name}"));
        found.labels.insert("os".to_owned(), name);
    }
    found.boot = search::find(&volumes, &mut found.report);
    if found.boot.is_none() {
        found.firmware = layout.firmware;
        found.report.push(match layout.firmware {
            Some(Firmware::Bios) => "it has a boot loader for BIOS firmware".to_owned(),
            Some(Firmware::Uefi) => "it has an EFI system partition, so UEFI firmware can start it".to_owned(),
            Some(Firmware::Either) => "it has boot loaders for BIOS and for UEFI firmware".to_owned(),
            None => "it has no boot loader either".to_owned(),
        });
    }
    Ok(found)
}

/// What the system calls itself in `os-release`.
fn system_name(volume: &Volume) -> Option<String> {
    let text = volume.text("/etc/os-release").or_else(|| volume.text("/usr/lib/os-release"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    let name: String = line.trim_matches('"').chars().filter(|c| !c.is_control()).take(100).collect();
    (!name.is_empty()).then_some(name)
}

/// Whether these bytes can be booted directly: a bzImage by its header's signature, or an ELF file for x86-64.
pub fn is_kernel(bytes: &[u8]) -> bool {
    let at = |at: usize, what: &[u8]| bytes.get(at..).is_some_and(|rest| rest.starts_with(what));
    at(0x202, b"HdrS") || at(0, b"\x7fELF\x02\x01") && at(18, &62_u16.to_le_bytes())
}
