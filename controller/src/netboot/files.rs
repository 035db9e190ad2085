//! The kernel and initial RAM disk of the VMM image as plain files, written out once per image: machines that boot cannot
//! read a chunk store.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bedplate_api::Digest;
use bedplate_api::image::ImageKind;
use bedplate_images::StoreError;
use bedplate_images::trust::TrustError;

use crate::control::Control;

/// The image that this process has written out. Held while it does: two machines that ask at the same time must not write
/// the same file twice.
pub type Written = Mutex<Option<Digest>>;

/// Why there is nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// Nobody has put one there yet.
    #[error("the repository has no image {0:?} yet")]
    NoImage(String),
    /// A tag that points to something else.
    #[error("image {0:?} is not a VMM image with a kernel")]
    NotBootable(String),
    /// The repository failed.
    #[error("the VMM image cannot be read: {0}")]
    Store(#[from] StoreError),
    /// Its keys did not sign it.
    #[error("the VMM image is not booted: {0}")]
    Trust(#[from] TrustError),
    /// The files cannot be written.
    #[error("cannot write {path}: {source}")]
    Io {
        /// What.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
}

/// A VMM image that is ready to be fetched.
#[derive(Debug, Clone)]
pub struct Ready {
    /// Digest of its manifest.
    pub image: Digest,
    /// It has an initial RAM disk.
    pub initrd: bool,
    /// Command line that belongs to the image.
    pub cmdline: String,
}

/// Where the files of `image` are.
pub fn dir(control: &Control, image: &Digest) -> PathBuf {
    control.options.state.join("boot").join(image.hex())
}

/// Writes out the image that blank machines boot, unless this process has done that. What an earlier one wrote was verified
/// then, and may have been damaged since. Blocking.
pub fn prepare(control: &Control) -> Result<Ready, FilesError> {
    let (images, tag) = (&control.images, &control.options.vmm_image);
    let image = match images.resolve(tag) {
        Ok(image) => image,
        Err(StoreError::TagMissing { .. } | StoreError::BlobMissing { .. }) => {
            return Err(FilesError::NoImage(tag.clone()));
        }
        Err(error) => return Err(error.into()),
    };
    let manifest = images.manifest(&image)?;
    let boot = match manifest.boot {
        Some(boot) if manifest.kind == ImageKind::Vmm => boot,
        _ => return Err(FilesError::NotBootable(tag.clone())),
    };
    images.check_trust(&image)?;
    let dir = dir(control, &image);
    let mut written = control.boot_files.lock().unwrap_or_else(PoisonError::into_inner);
    let complete = dir.join("kernel").exists() && (boot.initrd.is_none() || dir.join("initrd").exists());
    if *written != Some(image) || !complete {
        fs::create_dir_all(&dir).map_err(|source| FilesError::Io { path: dir.clone(), source })?;
        images.materialise(&image, &boot.kernel, &dir.join("kernel"))?;
        if let Some(initrd) = &boot.initrd {
            images.materialise(&image, initrd, &dir.join("initrd"))?;
        }
        remove_others(&dir);
        *written = Some(image);
    }
    drop(written);
    Ok(Ready { image, initrd: boot.initrd.is_some(), cmdline: boot.cmdline })
}

/// Earlier images. A machine that is in the middle of one goes on reading an open file, or fails its next request and
/// fetches its script again.
fn remove_others(keep: &Path) {
    let entries = keep.parent().and_then(|dir| fs::read_dir(dir).ok());
    for other in entries.into_iter().flatten().flatten().map(|entry| entry.path()).filter(|path| path != keep) {
        if let Err(error) = fs::remove_dir_all(&other) {
            tracing::warn!("cannot remove {}: {error}", other.display());
        }
    }
}
