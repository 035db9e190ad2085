//! No file is changed by two devices.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::{ConfigError, DiskConfig, PmemConfig};

/// What holds the bytes of a device.
struct Holder<'a> {
    id: &'a str,
    path: &'a Path,
    read_only: bool,
    pmem: bool,
}

/// Which file a device has. Of a block device there may be several nodes.
type Identity = (bool, u64, u64);

/// The files that devices have, whatever their paths lead to since.
#[derive(Debug, Clone, Default)]
pub struct Held(BTreeMap<(bool, String), Identity>);

impl Held {
    /// Forgets a device, which is to have another file: a drive, or a pmem device.
    pub fn forget(&mut self, pmem: bool, id: &str) {
        self.0.remove(&(pmem, id.to_owned()));
    }
}

/// Checks that no device writes to what is another one, too: two caches in the guest would ruin it. It goes by what devices are
/// known to have, and by what the paths of others lead to now; what cannot be looked at is not known to be the same. Returns what
/// all of them have.
///
/// # Errors
/// The first two that are one file, by whatever paths.
pub fn separate(drives: &[DiskConfig], pmems: &[PmemConfig], held: &Held) -> Result<Held, ConfigError> {
    let files = drives.iter().filter_map(DiskConfig::file);
    let drives = files.map(|d| Holder { id: &d.id, path: &d.path, read_only: d.read_only, pmem: false });
    let pmems = pmems.iter().map(|p| Holder { id: &p.id, path: &p.path, read_only: p.read_only, pmem: true });
    let mut seen: Vec<(Identity, Holder<'_>)> = Vec::new();
    for holder in drives.chain(pmems) {
        let known = held.0.get(&(holder.pmem, holder.id.to_owned())).copied();
        let now = || std::fs::metadata(holder.path).ok().map(|there| identity(&there));
        let Some(file) = known.or_else(now) else { continue };
        let clash = |(other, by): &&(_, Holder<'_>)| *other == file && !(by.read_only && holder.read_only);
        if let Some((_, first)) = seen.iter().find(clash) {
            let what = match (first.pmem, holder.pmem) {
                (false, false) => "drives",
                (true, true) => "pmem devices",
                _ => "drive and pmem device",
            };
            let (first, second) = (first.id.to_owned(), holder.id.to_owned());
            return Err(ConfigError::SharedFile { what, first, second, path: holder.path.to_owned() });
        }
        seen.push((file, holder));
    }
    Ok(Held(seen.into_iter().map(|(file, by)| ((by.pmem, by.id.to_owned()), file)).collect()))
}

fn identity(there: &Metadata) -> Identity {
    if there.file_type().is_block_device() { (true, there.rdev(), 0) } else { (false, there.dev(), there.ino()) }
}

#[cfg(test)]
mod tests {
    use bedplate_api::vmm::IoEngine;
    use bedplate_devices::virtio::block::Cache;
    use bedplate_devices::virtio::limiter::LimiterConfig;

    use super::*;
    use crate::config::DriveConfig;

    #[test]
    fn a_file_is_one_writable_drive_at_most_by_whatever_path() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, link, other) = (dir.path().join("disk"), dir.path().join("link"), dir.path().join("other"));
        std::fs::write(&disk, "").unwrap();
        std::fs::write(&other, "").unwrap();
        std::os::unix::fs::symlink("disk", &link).unwrap();
        let drive = |id: &str, path: &Path, read_only| {
            DiskConfig::File(DriveConfig {
                id: id.into(),
                path: path.into(),
                read_only,
                cache: Cache::Writeback,
                engine: IoEngine::Sync,
                limits: LimiterConfig::NONE,
                chunk_source: None,
            })
        };
        let check = |one: bool, two: bool| {
            separate(
                &[drive("a", &disk, one), drive("b", &other, false), drive("c", &link, two)],
                &[],
                &Held::default(),
            )
        };
        assert!(check(true, true).is_ok());
        for (one, two) in [(false, false), (true, false), (false, true)] {
            let error = check(one, two).unwrap_err().to_string();
            assert!(error.contains(r#""a" and "c" are the same file"#), "{error}");
        }
        let nowhere = Path::new("/nowhere");
        assert!(separate(&[drive("a", nowhere, false), drive("b", nowhere, false)], &[], &Held::default()).is_ok());

        // It had that file when it was opened, whatever is there now, until it gets another one.
        let mut held = separate(&[drive("a", &disk, false)], &[], &Held::default()).unwrap();
        let again = |held: &Held| separate(&[drive("a", nowhere, false), drive("b", &link, false)], &[], held);
        assert!(again(&held).unwrap_err().to_string().contains(r#""a" and "b""#));
        held.forget(false, "a");
        assert!(again(&held).is_ok());

        let pmem = |id: &str, read_only| PmemConfig {
            id: id.into(),
            path: link.clone(),
            read_only,
            limits: LimiterConfig::NONE,
        };
        let said = |drives: &[DiskConfig], pmems: &[PmemConfig]| {
            separate(drives, pmems, &Held::default()).map_err(|error| error.to_string()).err().unwrap_or_default()
        };
        assert_eq!(said(&[drive("a", &disk, true)], &[pmem("p", true), pmem("q", true)]), "");
        let words = r#"drive and pmem device "a" and "p" are the same file"#;
        assert!(said(&[drive("a", &disk, false)], &[pmem("p", true)]).contains(words));
        assert!(said(&[drive("a", &disk, true)], &[pmem("p", false)]).contains(words));
        assert!(said(&[], &[pmem("p", false), pmem("q", true)]).contains(r#"pmem devices "p" and "q""#));
    }
}
