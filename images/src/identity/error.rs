//! Why the traces of a machine cannot be found in a disk, or not be removed.

use std::io;
use std::path::{Path, PathBuf};

use crate::import::ImportError;

/// What failed. The disk may be changed in part; whoever removes traces does it to a copy of his own.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The disk cannot be read, or was cut off.
    #[error(transparent)]
    Disk(#[from] ImportError),
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
    /// Nothing that can be changed.
    #[error(
        "nothing can be removed from {disk}: it has no {wanted} on an ext2, ext3 or ext4 file system ({there}); remove in \
         the VM what belongs to it alone, and capture it with --keep-identity"
    )]
    NotThere {
        /// The disk.
        disk: PathBuf,
        /// What was looked for.
        wanted: &'static str,
        /// What each partition holds.
        there: String,
    },
    /// An ext4 file system with something that is not known how to clear.
    #[error(
        "nothing can be removed from {place} of {disk}: its file system has {what}; remove in the VM what belongs to it \
         alone, and capture it with --keep-identity"
    )]
    Feature {
        /// The disk.
        disk: PathBuf,
        /// The partition.
        place: String,
        /// Why not.
        what: &'static str,
    },
    /// Tables or trees that make no sense.
    #[error(
        "the file system in {place} of {disk} is damaged ({cause}): check it in the VM (`e2fsck -f`), then capture again; \
         --keep-identity captures it as it is"
    )]
    Damaged {
        /// The disk.
        disk: PathBuf,
        /// The partition.
        place: String,
        /// What was found.
        cause: String,
    },
    /// More files than logs and leases ever are.
    #[error(
        "{place} of {disk} has more than {most} logs and other files that belong to one machine, or longer names and \
         deeper directories than those have: remove them in the VM, or capture it with --keep-identity"
    )]
    TooMany {
        /// The disk.
        disk: PathBuf,
        /// The partition.
        place: String,
        /// The limit.
        most: usize,
    },
    /// e2fsprogs is not installed.
    #[error("cannot run {program} ({cause}): install the package e2fsprogs, or capture with --keep-identity")]
    Program {
        /// What was started.
        program: &'static str,
        /// Why it does not run.
        cause: io::Error,
    },
    /// A program was ended, or did not do what it was asked.
    #[error("{program} failed on {place} of {disk}: {said}; capture with --keep-identity to do without it")]
    Failed {
        /// The disk.
        disk: PathBuf,
        /// The partition.
        place: String,
        /// What was run.
        program: &'static str,
        /// Its last words.
        said: String,
    },
}

impl IdentityError {
    /// For `map_err`: `what` is a verb, `path` its object.
    pub(super) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |cause| Self::Io { what, path: path.to_owned(), cause }
    }
}
