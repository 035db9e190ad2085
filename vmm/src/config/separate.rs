//! No file is changed by two devices.

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

/// Checks that no device writes to what is another one, too: two caches in the guest would ruin it. It goes by what the paths
/// lead to now; what cannot be looked at, as a path that the sandbox does not show, is not known to be the same.
///
/// # Errors
/// The first two that are one file, by whatever paths.
pub fn separate(drives: &[DiskConfig], pmems: &[PmemConfig]) -> Result<(), ConfigError> {
    let files = drives.iter().filter_map(DiskConfig::file);
    let drives = files.map(|d| Holder { id: &d.id, path: &d.path, read_only: d.read_only, pmem: false });
    let pmems = pmems.iter().map(|p| Holder { id: &p.id, path: &p.path, read_only: p.read_only, pmem: true });
    let mut seen: Vec<((bool, u64, u64), Holder<'_>)> = Vec::new();
    for holder in drives.chain(pmems) {
        let Ok(there) = std::fs::metadata(holder.path) else { continue };
        let file = identity(&there);
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
    Ok(())
}

/// Of a block device there may be several nodes.
fn identity(there: &Metadata) -> (bool, u64, u64) {
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
            separate(&[drive("a", &disk, one), drive("b", &other, false), drive("c", &link, two)], &[])
        };
        assert!(check(true, true).is_ok());
        for (one, two) in [(false, false), (true, false), (false, true)] {
            let error = check(one, two).unwrap_err().to_string();
            assert!(error.contains(r#""a" and "c" are the same file"#), "{error}");
        }
        let nowhere = Path::new("/nowhere");
        assert!(separate(&[drive("a", nowhere, false), drive("b", nowhere, false)], &[]).is_ok());

        let pmem = |id: &str, read_only| PmemConfig {
            id: id.into(),
            path: link.clone(),
            read_only,
            limits: LimiterConfig::NONE,
        };
        let said = |drives: &[DiskConfig], pmems: &[PmemConfig]| {
            separate(drives, pmems).map_err(|error| error.to_string()).err().unwrap_or_default()
        };
        assert_eq!(said(&[drive("a", &disk, true)], &[pmem("p", true), pmem("q", true)]), "");
        let words = r#"drive and pmem device "a" and "p" are the same file"#;
        assert!(said(&[drive("a", &disk, false)], &[pmem("p", true)]).contains(words));
        assert!(said(&[drive("a", &disk, true)], &[pmem("p", false)]).contains(words));
        assert!(said(&[], &[pmem("p", false), pmem("q", true)]).contains(r#"pmem devices "p" and "q""#));
    }
}
