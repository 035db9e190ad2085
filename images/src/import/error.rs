//! Why a file cannot be imported. Every message is complete: it names the file, the cause and what to do.

use std::io;
use std::path::{Path, PathBuf};

use super::container::ContainerError;
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
    #[error("{path} is {format}, not a disk image that can be imported: {}", format.remedy(path))]
    Format {
        /// The file.
        path: PathBuf,
        /// What it is.
        format: Format,
    },
    /// A stream of something that is not read here.
    #[error("{path}, unpacked, is {format}: unpack it to a file, then {}", format.remedy(Path::new("that file")))]
    Inside {
        /// The stream.
        path: PathBuf,
        /// What is in it.
        format: Format,
    },
    /// A stream that cannot be unpacked.
    #[error("{path} is {packing} and cannot be unpacked ({cause}): it is damaged or cut off, get it again")]
    Packed {
        /// The stream.
        path: PathBuf,
        /// How it is packed.
        packing: Format,
        /// What is wrong.
        cause: io::Error,
    },
    /// A stream that unpacks without end.
    #[error(
        "{path} unpacks to more than a thousand times its length, and more than 256 GiB: it is no disk image; if it is, \
         unpack it to a sparse file and import that"
    )]
    Bomb {
        /// The stream.
        path: PathBuf,
    },
    /// An image that needs other files, in a stream, which has none beside it.
    #[error("{path} holds an image that refers to {target}: unpack it beside {target}, then import what that writes")]
    Streamed {
        /// The stream.
        path: PathBuf,
        /// As written in the image.
        target: String,
    },
    /// A container image without a disk, or none at all.
    #[error("the container image {path} cannot be imported: {cause}")]
    Container {
        /// What it is called.
        path: PathBuf,
        /// Why not.
        cause: ContainerError,
    },
    /// A VMDK of a kind that is not read.
    #[error(
        "{path} is a VMDK disk image that cannot be imported ({cause}): convert it with `qemu-img convert -O raw {path} \
         {path}.raw`, then import {path}.raw"
    )]
    Vmdk {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
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
    /// No guest has half a page.
    #[error("{path} has {size} bytes, which is no multiple of {page}: it is cut off or not the memory of a guest")]
    Pages {
        /// The file.
        path: PathBuf,
        /// Its length.
        size: u64,
        /// What it should be a multiple of.
        page: u64,
    },
    /// A disk beside something else, which is not unpacked on the way.
    #[error("{path} is {format}: unpack it first")]
    PackedPart {
        /// The file.
        path: PathBuf,
        /// How it is packed.
        format: super::format::Format,
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
    /// The same about `shown`, where it speaks of `hidden`: a file that only we know of.
    pub(super) fn about(mut self, hidden: &Path, shown: &Path) -> Self {
        match &mut self {
            Self::Io { path, .. }
            | Self::Empty { path }
            | Self::Format { path, .. }
            | Self::Sectors { path, .. }
            | Self::Truncated { path, .. }
            | Self::Qcow2 { path, .. }
            | Self::Damaged { path, .. }
                if path == hidden =>
            {
                shown.clone_into(path);
            }
            _ => {}
        }
        self
    }

    /// For `map_err`: `what` is a verb, `path` its object.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |cause| Self::Io { what, path: path.to_owned(), cause }
    }
}
