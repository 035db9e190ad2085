//! A disk image that consists of several files or layers, read through `imago`.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use imago::{FormatAccess, Mapping, Storage, StorageOpenOptions};

use super::source::{Source, open_file};
use super::{DISK_IMAGE, ImportError};

pub(super) type Access = FormatAccess<imago::file::File>;

/// An image and what is behind it, open for reading.
pub(super) struct Layered {
    access: Access,
    path: PathBuf,
}

impl Layered {
    pub(super) fn new(access: Access, path: &Path) -> Self {
        Self { access, path: path.to_owned() }
    }
}

pub(super) fn damaged(path: &Path, cause: impl ToString) -> ImportError {
    ImportError::Damaged { path: path.to_owned(), cause: cause.to_string() }
}

pub(super) fn storage(path: &Path) -> Result<imago::file::File, ImportError> {
    // `imago` opens whatever it is told to, and a data file was not looked at yet.
    drop(open_file(path, DISK_IMAGE)?);
    imago::file::File::open(StorageOpenOptions::new().filename(path)).map_err(ImportError::io("open", path))
}

/// The file that the image at `path` calls `name`: in the image's own folder, however it is reached, or allowed.
///
/// An image is data from anywhere. It must not make us read `/etc/shadow` into a disk that a guest then has.
pub(super) fn referred(path: &Path, name: &str, allow: &[PathBuf]) -> Result<PathBuf, ImportError> {
    let real = path.canonicalize().map_err(ImportError::io("examine", path))?;
    let folder = real.parent().unwrap_or(Path::new("/"));
    // QEMU writes plain names as they are, or with the protocol in front.
    let target = folder.join(name.strip_prefix("file:").unwrap_or(name));
    let outside = || ImportError::Outside { path: path.to_owned(), target: name.to_owned() };
    let target = match target.canonicalize() {
        Ok(target) => target,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            // Whether a file outside exists is nobody's business.
            return Err(if target.parent().and_then(|dir| dir.canonicalize().ok()).as_deref() == Some(folder) {
                ImportError::Io { what: "open", path: target, cause: e }
            } else {
                outside()
            });
        }
        Err(e) => return Err(ImportError::Io { what: "examine", path: target, cause: e }),
    };
    let allowed = allow.iter().any(|allowed| allowed.canonicalize().is_ok_and(|allowed| allowed == target));
    if target.parent() == Some(folder) || allowed { Ok(target) } else { Err(outside()) }
}

impl Source for Layered {
    fn size(&self) -> u64 {
        self.access.size()
    }

    fn next_data(&mut self, from: u64) -> Result<Option<Range<u64>>, ImportError> {
        let mut at = from;
        while at < self.size() {
            let (mapping, len) = self.access.get_mapping(at, self.size() - at).map_err(|e| damaged(&self.path, e))?;
            let end = at.saturating_add(len);
            match mapping {
                _ if len == 0 => return Err(damaged(&self.path, format!("it ends at byte {at} of its disk"))),
                Mapping::Zero { .. } => at = end,
                Mapping::Raw { storage, offset, .. } => {
                    // Behind the end of the file everything reads as zeros, and nobody would know.
                    let have = storage.size().map_err(ImportError::io("examine", &self.path))?;
                    let needs = offset.saturating_add(len);
                    if needs > have {
                        let (path, what) = (self.path.clone(), "its data".to_owned());
                        return Err(ImportError::Truncated { path, what, end: needs, size: have });
                    }
                    return Ok(Some(at..end));
                }
                _ => return Ok(Some(at..end)),
            }
        }
        Ok(None)
    }

    fn read_at(&mut self, bytes: &mut [u8], offset: u64) -> Result<(), ImportError> {
        self.access.read(bytes, offset).map_err(|e| damaged(&self.path, e))
    }
}
