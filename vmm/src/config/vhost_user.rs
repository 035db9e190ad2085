//! What vhost-user backends do: disks, file systems, and which sockets are theirs.

use std::path::PathBuf;

use bedplate_api::vmm::{CacheType, Drive, FileSystem, VmConfig};
use bedplate_devices::virtio::block::Cache;
use bedplate_devices::virtio::vhost_user::TAG_LEN;

use super::{ConfigError, DriveConfig, drive, name, path};

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskConfig {
    /// A file, or what is like one.
    File(DriveConfig),
    /// Another process has it.
    Backend(BackendDriveConfig),
}

impl DiskConfig {
    /// `drive_id`.
    pub fn id(&self) -> &str {
        match self {
            Self::File(drive) => &drive.id,
            Self::Backend(drive) => &drive.id,
        }
    }

    /// The file, if it is one.
    pub const fn file(&self) -> Option<&DriveConfig> {
        match self {
            Self::File(drive) => Some(drive),
            Self::Backend(_) => None,
        }
    }
}

/// A disk that another process has.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct BackendDriveConfig {
    pub id: String,
    pub socket: PathBuf,
    pub cache: Cache,
}

/// A directory that another process shares.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct FileSystemConfig {
    pub tag: String,
    pub socket: PathBuf,
}

/// What is asked of a backend that is not its to do.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum VhostUserConfigError {
    #[error("drive {0:?}: name a file (path_on_host) or the socket of a vhost-user backend, one of the two")]
    OneMedium(String),
    #[error(
        "drive {id:?}: {what} and socket exclude each other, because a vhost-user backend does it as it was told: leave \
         {what} out, and tell the backend"
    )]
    Excluded { id: String, what: &'static str },
    #[error("file system tag {0:?} is too long: give {TAG_LEN} characters at most")]
    Tag(String),
}

/// Checks one drive.
///
/// # Errors
/// Its name, place or partition cannot be.
pub fn disk(spec: &Drive) -> Result<DiskConfig, ConfigError> {
    let id = name("drive_id", &spec.drive_id)?;
    // Of other drives nobody looks at it.
    let is_bad = |uuid: &&String| uuid.is_empty() || !uuid.chars().all(|c| c.is_ascii_hexdigit() || c == '-');
    if let Some(partuuid) = spec.partuuid.as_ref().filter(|_| spec.is_root_device).filter(is_bad) {
        return Err(ConfigError::PartUuid { id, partuuid: partuuid.clone() });
    }
    let cache = match spec.cache_type {
        CacheType::Unsafe => Cache::Unsafe,
        CacheType::Writeback => Cache::Writeback,
    };
    let socket = match (&spec.path_on_host, &spec.socket) {
        (Some(path), None) => return drive(spec, path, cache).map(DiskConfig::File),
        (None, Some(socket)) => path(&format!("drive {id:?}: socket"), socket)?,
        _ => return Err(VhostUserConfigError::OneMedium(id).into()),
    };
    let excluded = [
        (spec.is_read_only.is_some(), "is_read_only"),
        (spec.io_engine.is_some(), "io_engine"),
        (spec.rate_limiter.is_some(), "rate_limiter"),
        (spec.chunk_source.is_some(), "chunk_source"),
    ];
    match excluded.into_iter().find(|(is_there, _)| *is_there) {
        Some((_, what)) => Err(VhostUserConfigError::Excluded { id, what }.into()),
        None => Ok(DiskConfig::Backend(BackendDriveConfig { id, socket, cache })),
    }
}

/// Checks one file system.
///
/// # Errors
/// Its tag or socket cannot be.
pub fn file_system(spec: &FileSystem) -> Result<FileSystemConfig, ConfigError> {
    let tag = name("file system tag", &spec.tag)?;
    let socket = path(&format!("file system {tag:?}: socket"), &spec.socket)?;
    if tag.len() > TAG_LEN { Err(VhostUserConfigError::Tag(tag).into()) } else { Ok(FileSystemConfig { tag, socket }) }
}

/// Sockets of all backends: each serves one device.
pub(super) fn sockets(spec: &VmConfig) -> impl Iterator<Item = &str> {
    let drives = spec.drives.iter().filter_map(|drive| drive.socket.as_deref());
    let nets = spec.network_interfaces.iter().filter_map(|net| net.socket.as_deref());
    drives.chain(nets).chain(spec.filesystems.iter().map(|file_system| file_system.socket.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::validate;

    fn said(drive: &str) -> String {
        let text = format!(r#"{{"drive_id": "a", "is_root_device": false {drive}}}"#);
        disk(&serde_json::from_str(&text).unwrap()).map_err(|error| error.to_string()).err().unwrap_or_default()
    }

    #[test]
    fn a_drive_is_a_file_or_a_backends() {
        assert_eq!(said(r#", "socket": "s", "cache_type": "Unsafe""#), "");
        for wrong in ["", r#", "socket": "s", "path_on_host": "p""#] {
            assert!(said(wrong).contains(r#"drive "a": name a file (path_on_host) or the socket"#), "{wrong}");
        }
        for (what, value) in [
            ("is_read_only", "false"),
            ("io_engine", r#""Sync""#),
            ("rate_limiter", "{}"),
            ("chunk_source", r#"{"socket": "c"}"#),
        ] {
            let error = said(&format!(r#", "socket": "s", "{what}": {value}"#));
            assert!(error.contains(&format!("{what} and socket exclude each other")), "{error}");
        }
        assert!(said(r#", "socket": """#).contains("socket: the path is empty"));
        assert!(
            said(r#", "partuuid": "0-1""#).contains("path_on_host"),
            "of a drive that is no root nobody looks at it"
        );
    }

    #[test]
    fn a_socket_is_one_device_s_and_a_tag_one_file_system_s() {
        let check = |text: &str| {
            let text = format!(r#"{{"boot-source": {{"kernel_image_path": "k"}}, {text}}}"#);
            validate(&serde_json::from_str(&text).unwrap()).map_err(|error| error.to_string())
        };
        let shared = r#""filesystems": [{"tag": "t", "socket": "f"}, {"tag": "u", "socket": "g"}],
                        "network-interfaces": [{"iface_id": "e", "socket": "n"}],
                        "drives": [{"drive_id": "d", "socket": "b", "is_root_device": true}]"#;
        let config = check(shared).unwrap();
        assert!(config.has_backends() && config.files().next().is_none());
        assert!(!check(r#""drives": []"#).unwrap().has_backends());
        for (from, to, word) in [
            (r#""g""#, r#""f""#, r#"vhost-user socket "f" exists twice"#),
            (r#""n""#, r#""f""#, r#"vhost-user socket "f" exists twice"#),
            (r#""b""#, r#""n""#, r#"vhost-user socket "n" exists twice"#),
            (r#""u""#, r#""t""#, r#"file system tag "t" exists twice"#),
            (r#""u""#, r#""a b""#, r#"file system tag "a b" is not a name"#),
            (r#""u""#, r#""a123456789012345678901234567890123456""#, "36 characters at most"),
        ] {
            let error = check(&shared.replace(from, to)).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
