//! What can go wrong with a store. Every message is complete: it names the thing, the cause and what to do.

use std::io;
use std::path::{Path, PathBuf};

use bedplate_api::Digest;

use crate::frame::FrameError;
use crate::index::IndexError;
use crate::manifest::ManifestError;

/// A failed operation on a store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory holds no store.
    #[error("{dir} is not an image store: name another directory, or create one there")]
    NotAStore {
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// Somebody else's directory.
    #[error("{dir} is not an image store and holds other things ({found:?}): name another directory, or an empty one")]
    NotEmpty {
        /// Where the store should be.
        dir: PathBuf,
        /// One of the things.
        found: String,
    },
    /// There is no store, and none can be made.
    #[error("no image store can be made in {dir} ({cause}): make that directory writable, or name another one")]
    NotMade {
        /// Where the store should be.
        dir: PathBuf,
        /// Why not.
        cause: Box<StoreError>,
    },
    /// Written by a later version.
    #[error("the image store {dir} has format {found:?} and this program knows {known:?}: update Bedplate")]
    Version {
        /// The store.
        dir: PathBuf,
        /// Content of its version file.
        found: String,
        /// What this program writes.
        known: &'static str,
    },
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
    /// The file system is full.
    #[error("no space left on the file system of {path}: free some space, then try again")]
    Full {
        /// What was being written.
        path: PathBuf,
    },
    /// Known before the work began.
    #[error("{what} needs {needs} bytes in {path} and {has} are free: free some space, then try again")]
    NoRoom {
        /// What was to be done.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Bytes needed, at most.
        needs: u64,
        /// Bytes free.
        has: u64,
    },
    /// A manifest or index that is not there.
    #[error("{digest} is not in the image store {dir}: copy or import the image again")]
    BlobMissing {
        /// Its name.
        digest: Digest,
        /// The store.
        dir: PathBuf,
    },
    /// A manifest or index that rotted on disk.
    #[error("{path} is damaged (its content has the digest {found}); it was set aside: copy or import the image again")]
    BlobCorrupt {
        /// Its file.
        path: PathBuf,
        /// Digest of the content.
        found: Digest,
    },
    /// Bytes that are not what the sender said.
    #[error("these bytes have the digest {found} and not {wanted}: they were damaged on the way, send them again")]
    BlobRefused {
        /// As said.
        wanted: Digest,
        /// As computed.
        found: Digest,
    },
    /// A chunk that is not there.
    #[error("chunk {digest} is missing ({path}): copy or import the image again")]
    ChunkMissing {
        /// Its name.
        digest: Digest,
        /// Where its file would be.
        path: PathBuf,
    },
    /// A chunk that rotted on disk.
    #[error("chunk {digest} is damaged ({path}: {cause}); it was set aside: copy or import the image again")]
    ChunkCorrupt {
        /// Its name.
        digest: Digest,
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        cause: FrameError,
    },
    /// The index puts a chunk where one of another length belongs.
    #[error(
        "chunk {digest} has {found} bytes and its place in the part {wanted}: the image was made wrong, make it again"
    )]
    ChunkLength {
        /// Its name.
        digest: Digest,
        /// Its length.
        found: usize,
        /// What its place needs.
        wanted: usize,
    },
    /// Bytes that are not what the sender said.
    #[error("the frame sent for chunk {digest} was refused, because {cause}: it was damaged on the way, send it again")]
    FrameRefused {
        /// As said.
        digest: Digest,
        /// What is wrong.
        cause: FrameError,
    },
    /// Where in an image something went wrong.
    #[error("image {image}, part {part:?}, chunk {number}: {cause}")]
    InPart {
        /// Digest of the manifest.
        image: Digest,
        /// Name of the part.
        part: String,
        /// Number of the chunk.
        number: u64,
        /// What went wrong.
        cause: Box<StoreError>,
    },
    /// Not a name that a tag may have.
    #[error("{0:?} is not an image name: use 1 to 128 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit")]
    TagName(String),
    /// No such tag.
    #[error("there is no image {name:?} in {dir}: list the images to see which there are")]
    TagMissing {
        /// As asked.
        name: String,
        /// The store.
        dir: PathBuf,
    },
    /// A tag file with something else in it, or no file at all.
    #[error(
        "the tag {path} is damaged: remove it with `bedplate image rm {name} --store {dir}`, then copy or import the \
         image again"
    )]
    TagCorrupt {
        /// Its name.
        name: String,
        /// Its file.
        path: PathBuf,
        /// The store.
        dir: PathBuf,
    },
    /// The first digits of a digest, of which two images have the same.
    #[error(
        "{prefix:?} is the beginning of more than one digest in {dir} ({}): give more digits, or a name",
        list(images)
    )]
    Ambiguous {
        /// As asked.
        prefix: String,
        /// The store.
        dir: PathBuf,
        /// Some of the images that begin so.
        images: Vec<Digest>,
    },
    /// A tag may only name what is there.
    #[error("image {digest} is not complete in {dir}: {chunks} chunks are missing; copy or import it again")]
    Incomplete {
        /// Digest of the manifest.
        digest: Digest,
        /// The store.
        dir: PathBuf,
        /// How many are missing.
        chunks: u64,
    },
    /// An image's manifest is no manifest.
    #[error("image {digest}: {cause}")]
    Manifest {
        /// Its digest.
        digest: Digest,
        /// What is wrong.
        cause: ManifestError,
    },
    /// A part's index is no index, or one of another part.
    #[error("index {digest}: {cause}")]
    Index {
        /// Its digest.
        digest: Digest,
        /// What is wrong.
        cause: IndexError,
    },
    /// The index is of a part with another size.
    #[error(
        "index {digest} describes {found} bytes and the manifest {wanted}: the image was made wrong, make it again"
    )]
    IndexSize {
        /// Its digest.
        digest: Digest,
        /// Size in the index.
        found: u64,
        /// Size in the manifest.
        wanted: u64,
    },
    /// Somebody else holds the store's lock.
    #[error(
        "the image store {dir} is in use (an import, a copy or a clean-up is under way): try again when it is done"
    )]
    Busy {
        /// The store.
        dir: PathBuf,
    },
}

fn list(images: &[Digest]) -> String {
    images.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl StoreError {
    /// For `map_err`: `what` is a verb, `path` its object.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |cause| match cause.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { path: path.to_owned() },
            _ => Self::Io { what, path: path.to_owned(), cause },
        }
    }

    /// Says where in an image this happened.
    pub(crate) fn in_part(self, image: Digest, part: &str, number: u64) -> Self {
        Self::InPart { image, part: part.to_owned(), number, cause: Box::new(self) }
    }

    /// Content is absent, so fetching it may heal this: a chunk or blob that is missing, or was damaged and set aside.
    pub fn is_missing(&self) -> bool {
        match self {
            Self::BlobMissing { .. } | Self::BlobCorrupt { .. } => true,
            Self::ChunkMissing { .. } | Self::ChunkCorrupt { .. } | Self::Incomplete { .. } => true,
            Self::InPart { cause, .. } => cause.is_missing(),
            _ => false,
        }
    }

    /// Number, in its part, of the chunk that is absent or was found damaged, where this is about one.
    pub fn lacks_chunk(&self) -> Option<u64> {
        match self {
            Self::InPart { number, cause, .. }
                if matches!(**cause, Self::ChunkMissing { .. } | Self::ChunkCorrupt { .. }) =>
            {
                Some(*number)
            }
            _ => None,
        }
    }

    /// The file system is full, or would be.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::NoRoom { .. })
    }
}
