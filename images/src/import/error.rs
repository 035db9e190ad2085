//! Why a file cannot be imported. Every message is complete: it names the file, the cause and what to do.

use std::io;
use std::path::{Path, PathBuf};

use super::format::Format;
use super::qcow2::HeaderError;
use crate::StoreError;
use crate::manifest::ManifestError;

/// A failed import. What was stored before it failed is not named by anything, blocks nothing, and is used by the next try.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The operating system said no.
    #[error("cannot {what} {path}: {cause}")]
    Io {
        /// A verb.
        what: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// Neither a file nor a block device.
    #[error("{path} is {found}, not a file or block device: name the file of {wanted}")]
    NotAFile {
        /// What was named.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What should have been named.
        wanted: &'static str,
    },
    /// Nothing in it.
    #[error("{path} is empty: it was probably not downloaded or copied to its end, get it again")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A format that is not read here, or no disk at all.
    #[error("{path} is {format}, not a raw or qcow2 disk image: {}", format.remedy(path))]
    Format {
        /// The file.
        path: PathBuf,
        /// What it is.
        format: Format,
    },
    /// Part of a sector at the end.
    #[error(
        "{path} has {size} bytes, which is not a whole number of 512-byte sectors: it is cut off or not a disk image"
    )]
    Sectors {
        /// The file.
        path: PathBuf,
        /// Its length.
        size: u64,
    },
    /// A claim that no real disk makes.
    #[error(
        "{path} is a disk of {size} bytes, and at most {most} bytes ({} TiB) can be imported: shrink it with \
         `qemu-img resize --shrink`, or get the file again if its disk is not that large", most >> 40
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its disk's size.
        size: u64,
        /// The limit.
        most: u64,
    },
    /// Something in it lies behind its end.
    #[error("{path} is cut off: {what} ends at byte {end}, and there are {size}; download or copy it again")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What reaches too far.
        what: String,
        /// Where that ends.
        end: u64,
        /// Where the file or disk ends.
        size: u64,
    },
    /// A qcow2 file that cannot be read here.
    #[error("{path} is a qcow2 image that cannot be imported: {cause}{}", cause.remedy(path))]
    Qcow2 {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: HeaderError,
    },
    /// A qcow2 file whose metadata makes no sense.
    #[error("{path} is damaged ({cause}): run `qemu-img check {path}`, or get the file again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        cause: String,
    },
    /// A file that an image refers to lies elsewhere.
    #[error(
        "{path} refers to {target}, which is not in its own folder: copy it there, allow it by name, or flatten the image \
         with `qemu-img convert -O qcow2 {path} flat.qcow2`"
    )]
    Outside {
        /// The image.
        path: PathBuf,
        /// As written in it.
        target: String,
    },
    /// A chain that does not end.
    #[error("{path} has more than {most} backing files behind it: flatten it with `qemu-img convert -O qcow2`")]
    Chain {
        /// The image on top.
        path: PathBuf,
        /// The limit.
        most: usize,
    },
    /// Not something that boots.
    #[error(
        "{path} is not an x86 Linux kernel (neither a bzImage nor an ELF file): name the vmlinuz of a distribution"
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
    },
    /// A part that is larger than any of its kind.
    #[error("{path} has {size} bytes, and {what} may have at most {most} bytes: name the file of {what} alone")]
    PartTooLarge {
        /// The file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// Its length.
        size: u64,
        /// The limit.
        most: u64,
    },
    /// What would be stored is refused.
    #[error("{path} cannot be made an image: {cause}")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: ManifestError,
    },
    /// The caller asked to stop.
    #[error("the import of {path} was stopped; what is stored of it already is used when you import it again")]
    Stopped {
        /// The file.
        path: PathBuf,
    },
}

impl ImportError {
    /// For `map_err`: `what` is a verb, `path` its object.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |cause| Self::Io { what, path: path.to_owned(), cause }
    }
}
