//! What IMAGE means: a file, which is imported, or an image of the store; and the VM's disk made from it.

use std::path::{Path, PathBuf};

use bedplate_api::Digest;
use bedplate_api::image::{ImageKind, Manifest};
use bedplate_images::disk::{Disk, DiskError, Holder, Mode};
use bedplate_images::import::format::Format;
use bedplate_images::import::{self, ImportError};
use bedplate_images::{Store, StoreError};

use super::{Args, Error};
use crate::image;
use crate::output::note;
use crate::rundir::{self, RunDir};

/// Longest label of a host name.
const MAX_NAME: usize = 63;

/// An image that a VM cannot be made from.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Neither a file nor a name.
    #[error("{image:?} is neither a file nor an image in {}; `bedplate image ls` shows those there are", store.display())]
    Unknown {
        /// As given.
        image: String,
        /// The store.
        store: PathBuf,
    },
    /// The file is no disk image.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// A hypervisor's image.
    #[error("{0:?} is a VMM image: it boots machines, not VMs")]
    NotADisk(String),
    /// A guest that stands still.
    #[error(
        "{0:?} is a suspended guest, which nothing here wakes yet; `bedplate image export --part` gives its files back"
    )]
    Suspended(String),
    /// The persistent disk has another origin.
    #[error(
        "the persistent disk of {name:?} was made from the image {found} and not from {wanted}: give the VM another name \
         with --name, or remove {}",
        dir.display()
    )]
    OtherImage {
        /// The VM.
        name: String,
        /// What it was made from.
        found: String,
        /// What was asked for now.
        wanted: String,
        /// The disk.
        dir: PathBuf,
    },
    /// Nothing keeps a second machine from it.
    #[error(
        "{dir} has a disk that is not shared: another machine could run it at the same time; give --shared another directory"
    )]
    NotShared {
        /// The directory.
        dir: PathBuf,
    },
    /// There is no disk.
    #[error("there is no disk in {dir} to take over: is the right file system mounted there?")]
    NothingToTake {
        /// The directory.
        dir: PathBuf,
    },
    /// Not a host name.
    #[error("{0:?} is no name for a VM: letters, digits and hyphens, {MAX_NAME} at most, not beginning with a hyphen")]
    Name(String),
}

/// The image of a VM.
#[derive(Debug)]
pub(super) struct Source {
    pub digest: Digest,
    pub manifest: Manifest,
    /// The file that it came from, and QEMU's name for its format, if QEMU reads it as it is.
    pub file: Option<(PathBuf, Option<&'static str>)>,
    image: String,
}

impl Source {
    /// Finds the image; a file is imported first, which is quick where its chunks are there already.
    pub fn open(store: &Store, image: &str) -> Result<Self, Error> {
        let path = Path::new(image);
        if path.is_file() || image.contains('/') {
            let imported = image::import::disk(store, path, None, &[]).map_err(SourceError::from)?;
            let qemu = match import::probe(path, &[]).map_err(SourceError::from)? {
                Format::Raw => Some("raw"),
                Format::Qcow2 => Some("qcow2"),
                Format::VmdkText => Some("vmdk"),
                _ => None,
            };
            let file = Some((path.to_owned(), qemu));
            return Ok(Self { digest: imported.digest, manifest: imported.manifest, file, image: image.to_owned() });
        }
        let digest = store.resolve(image).map_err(|error| match error {
            StoreError::TagMissing { .. } | StoreError::TagName(_) => {
                Error::Source(SourceError::Unknown { image: image.to_owned(), store: store.dir().to_owned() })
            }
            other => other.into(),
        })?;
        let manifest = store.manifest(&digest)?;
        match manifest.kind {
            ImageKind::Disk => {}
            ImageKind::Vmm => return Err(SourceError::NotADisk(image.to_owned()).into()),
            ImageKind::Suspended => return Err(SourceError::Suspended(image.to_owned()).into()),
        }
        Ok(Self { digest, manifest, file: None, image: image.to_owned() })
    }

    /// A name for the VM: that of the file without its ending, or that of the image, as a host name.
    pub fn name(&self) -> String {
        let stem = match &self.file {
            Some((path, _)) => path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            None if self.image.starts_with("blake3:") => format!("vm-{}", self.digest.short()),
            None => self.image.clone(),
        };
        host_name(&stem)
    }

    /// What the guest sees, in bytes.
    pub fn disk_size(&self) -> u64 {
        self.manifest.parts.get("disk").map_or(0, |disk| disk.size)
    }

    /// The directory of the VM's disk, which is made where it is not there.
    pub fn disk(&self, store: &Store, run: &RunDir, name: &str, args: &Args) -> Result<PathBuf, Error> {
        let persistent = args.persistent;
        let dir = match &args.shared {
            _ if !persistent => run.path().join(rundir::DISK),
            None => rundir::persistent_disk(store.dir(), name)?,
            Some(shared) => rundir::shared_disk(store.dir(), name, shared)?,
        };
        if persistent && dir.join("disk.json").exists() {
            let spec = Disk::spec_of(&dir)?;
            if args.shared.is_some() && !spec.shared {
                return Err(SourceError::NotShared { dir }.into());
            }
            if spec.image != self.digest {
                let (found, wanted) = (spec.image.short(), self.digest.short());
                return Err(SourceError::OtherImage { name: name.to_owned(), found, wanted, dir }.into());
            }
            if args.take_over {
                note(&format!("Watching {} for {} s …", dir.display(), Holder::PERIOD.as_secs()));
                drop(Disk::take_over(&dir, &Holder::this_host().map_err(DiskError::from)?)?);
            } else {
                // That nobody else has it open is better said now than by the VMM.
                drop(Disk::open(&dir)?);
            }
            return Ok(dir);
        }
        if args.take_over {
            return Err(SourceError::NothingToTake { dir }.into());
        }
        if args.shared.is_some() {
            drop(Disk::create_shared(&dir, store, &self.digest, &Holder::this_host().map_err(DiskError::from)?)?);
            return Ok(dir);
        }
        let mode = if persistent { Mode::Persistent } else { Mode::NonPersistent };
        drop(Disk::create(&dir, store, &self.digest, mode)?);
        Ok(dir)
    }
}

/// Reads a name that is used as a host name, and as that of a directory.
pub(super) fn parse_name(text: &str) -> Result<String, SourceError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if text.is_empty() || text.len() > MAX_NAME || text.starts_with('-') || !text.chars().all(plain) {
        return Err(SourceError::Name(text.chars().take(80).collect()));
    }
    Ok(text.to_owned())
}

/// What of `text` can stand in a host name.
fn host_name(text: &str) -> String {
    let lower = text.to_ascii_lowercase();
    let plain: String = lower.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(MAX_NAME).collect();
    let name = plain.trim_matches('-');
    if name.is_empty() { "vm".to_owned() } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_file_name_makes_a_host_name() {
        assert_eq!(host_name("Debian_12.5 (cloud)"), "debian-12-5--cloud");
        assert_eq!(host_name("..."), "vm");
        assert!(parse_name(&host_name(&"x/".repeat(200))).is_ok());
    }

    #[test]
    fn a_name_cannot_leave_its_directory() {
        for bad in ["", "..", "a/b", "-a", "a b", &"a".repeat(64)] {
            assert!(parse_name(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_name("web-1").unwrap(), "web-1");
    }
}
