//! Files in the guest's address space, and which device holds the guest's `/`. Faults about the latter are in Firecracker's
//! words.

use std::path::PathBuf;

use bedplate_api::vmm::{Drive, Pmem};
use bedplate_devices::virtio::limiter::LimiterConfig;

use super::{ConfigError, limits, name, path};
use crate::boot::RootDevice;

/// One such file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct PmemConfig {
    pub id: String,
    pub path: PathBuf,
    pub read_only: bool,
    pub limits: LimiterConfig,
}

/// What cannot be the guest's `/`.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum PmemError {
    #[error("Pmem config error: Attempt to add pmem as a root device while the root device defined as a block device")]
    RootBesideDrive,
    #[error("Pmem config error: A root pmem device already exist")]
    TwoRoots,
    #[error("Drive config error: Attempt to add block as a root device while the root device defined as a pmem device")]
    DriveBesideRoot,
}

/// Checks one such file.
///
/// # Errors
/// Its name or path cannot be.
pub fn pmem(pmem: &Pmem) -> Result<PmemConfig, ConfigError> {
    let id = name("pmem id", &pmem.id)?;
    let path = path(&format!("pmem {id:?}: path_on_host"), &pmem.path_on_host)?;
    Ok(PmemConfig { id, path, read_only: pmem.read_only, limits: limits(pmem.rate_limiter) })
}

/// What the guest mounts as `/`, if it is any of these.
///
/// # Errors
/// Two shall be that.
pub fn root_device(drives: &[Drive], pmems: &[Pmem]) -> Result<Option<RootDevice>, ConfigError> {
    let mut roots = drives.iter().filter(|drive| drive.is_root_device);
    let first = roots.next();
    if let (Some(first), Some(second)) = (first, roots.next()) {
        return Err(ConfigError::TwoRoots(first.drive_id.clone(), second.drive_id.clone()));
    }
    // Linux numbers them in the order in which it finds them.
    let mut roots = pmems.iter().enumerate().filter(|(_, pmem)| pmem.root_device);
    match (first, roots.next(), roots.next()) {
        (_, _, Some(_)) => Err(PmemError::TwoRoots.into()),
        (Some(_), Some(_), None) => Err(PmemError::RootBesideDrive.into()),
        (None, Some((index, pmem)), None) => {
            Ok(Some(RootDevice { name: format!("/dev/pmem{index}"), read_only: pmem.read_only }))
        }
        (Some(drive), None, None) => {
            // The root device becomes the first disk.
            let name = drive.partuuid.as_ref().map_or("/dev/vda".into(), |uuid| format!("PARTUUID={uuid}"));
            Ok(Some(RootDevice { name, read_only: drive.is_read_only.unwrap_or(false) }))
        }
        (None, None, None) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pmems(text: &str) -> Vec<Pmem> {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn one_device_is_the_root_and_has_its_number() {
        let drive = |root: bool| -> Vec<Drive> {
            let text =
                format!(r#"[{{"drive_id": "d", "path_on_host": "p", "is_root_device": {root}, "partuuid": "0-1"}}]"#);
            serde_json::from_str(&text).unwrap()
        };
        let two = r#"[{"id": "a", "path_on_host": "a"}, {"id": "b", "path_on_host": "b", "root_device": true}]"#;
        let root = |name: &str, read_only| Some(RootDevice { name: name.into(), read_only });
        assert_eq!(root_device(&drive(false), &pmems(two)).unwrap(), root("/dev/pmem1", false));
        let read_only = two.replace("true", r#"true, "read_only": true"#);
        assert_eq!(root_device(&[], &pmems(&read_only)).unwrap(), root("/dev/pmem1", true));
        assert_eq!(root_device(&drive(true), &[]).unwrap(), root("PARTUUID=0-1", false));
        assert_eq!(root_device(&drive(false), &[]).unwrap(), None);

        let error = |drives: &[Drive], pmems: &[Pmem]| root_device(drives, pmems).unwrap_err().to_string();
        assert!(error(&drive(true), &pmems(two)).contains("root device defined as a block device"));
        let both = two.replace(r#""a"}"#, r#""a", "root_device": true}"#);
        assert_eq!(error(&[], &pmems(&both)), "Pmem config error: A root pmem device already exist");
    }

    #[test]
    fn a_file_has_a_name_and_a_path() {
        let check = |id: &str, path: &str| {
            let text = format!(r#"[{{"id": {id:?}, "path_on_host": {path:?}}}]"#);
            pmem(&pmems(&text)[0]).map_err(|error| error.to_string())
        };
        let good = check("a", "p").unwrap();
        assert_eq!((good.path, good.read_only, good.limits), ("p".into(), false, LimiterConfig::NONE));
        assert!(check("a/b", "p").unwrap_err().contains(r#"pmem id "a/b" is not a name"#));
        assert!(check("a", "").unwrap_err().contains("path is empty"));
    }
}
