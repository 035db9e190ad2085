//! What the OCI registry keeps beside the image store. Registries name blobs by SHA-256 and know packs; the store names by
//! BLAKE3 and knows chunks. So of a pack only its table is kept, and the frames come from the store.
//!
//! ```text
//! oci/images/{blake3}   digest of the image's OCI manifest, as text
//! oci/blobs/{sha256}    OCI manifests, image manifests and indexes as they are; of packs the table
//! oci/uploads/{name}    blobs that are arriving
//! ```
//!
//! All of it but the uploads can be made again from the store, and is, at the first request for an image.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bedplate_api::Digest;
use bedplate_api::image::MAX_BLOB_LEN;
use bedplate_images::frame::chunk_buffer;
use bedplate_images::manifest::ManifestError;
use bedplate_images::pack::oci::{Artifact, Descriptor, OciError, is_sha256, sha256, sha256_of, unpack_index};
use bedplate_images::pack::offer::{OfferError, offer};
use bedplate_images::pack::{MAX_TABLE_LEN, PackError, Table};
use bedplate_images::trust::TrustError;
use bedplate_images::{Store, StoreError};

/// Blobs that nothing names are of a push under way, or of one that broke off and may be taken up again.
const KEEP_UNNAMED: Duration = Duration::from_secs(24 * 60 * 60);

/// Why the registry cannot do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum ShelfError {
    /// Nothing of that name.
    #[error("there is no blob {0} here: push it first")]
    Unknown(String),
    /// Not a digest.
    #[error("{0:?} is not a SHA-256 digest")]
    Digest(String),
    /// No upload of that name.
    #[error("there is no such upload here: begin it again")]
    UnknownUpload,
    /// The bytes are others.
    #[error("the blob {wanted} has the digest {found}: it was damaged on the way, send it again")]
    Mismatch {
        /// As said.
        wanted: String,
        /// As computed.
        found: String,
    },
    /// More than any blob has.
    #[error("a blob of more than {MAX_BLOB_LEN} bytes is none of an image's")]
    TooLarge,
    /// Not what an image is made of.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// The image store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What came as a signature.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The operating system.
    #[error("cannot {what} {path}: {cause}")]
    Io {
        /// A verb.
        what: &'static str,
        /// Its object.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
}

impl ShelfError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |cause| Self::Io { what, path: path.to_owned(), cause }
    }
}

impl From<PackError> for ShelfError {
    fn from(error: PackError) -> Self {
        Self::Oci(error.into())
    }
}

impl From<OfferError> for ShelfError {
    fn from(error: OfferError) -> Self {
        match error {
            OfferError::Store(e) => Self::Store(e),
            OfferError::Oci(e) => Self::Oci(e),
            OfferError::Keep(cause) => Self::Io { what: "write to", path: "the registry's files".into(), cause },
        }
    }
}

/// A blob that can be sent.
#[derive(Debug)]
pub enum Blob {
    /// A file.
    File(PathBuf, u64),
    /// A pack.
    Pack(Table),
}

impl Blob {
    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::File(_, len) => *len,
            Self::Pack(table) => table.len(),
        }
    }
}

/// The registry's files.
#[derive(Debug, Clone)]
pub struct Shelf {
    dir: PathBuf,
    store: Store,
}

impl Shelf {
    /// With its files in `dir`, over `store`.
    pub const fn new(dir: PathBuf, store: Store) -> Self {
        Self { dir, store }
    }

    /// Digest and bytes of the OCI manifest of the image `image`; made at the first request for it.
    pub fn manifest_of(&self, image: &Digest) -> Result<(String, Vec<u8>), ShelfError> {
        let note = self.dir.join("images").join(image.hex());
        if let Ok(digest) = fs::read_to_string(&note)
            && let Ok(bytes) = self.whole(&digest)
            && let Ok(artifact) = Artifact::parse(&bytes)
            && self.has_all(&artifact)
            // It may have been signed, or signed anew, since.
            && artifact.signature == self.store.signature(image)?
        {
            return Ok((digest, bytes));
        }
        let artifact = offer(&self.store, image, |digest, bytes| {
            self.write(&self.path(digest), bytes).map_err(|e| io::Error::other(e.to_string()))
        })?;
        self.note(image, &artifact.encode(image)?)
    }

    /// Keeps an OCI manifest as that of `image`.
    fn note(&self, image: &Digest, bytes: &[u8]) -> Result<(String, Vec<u8>), ShelfError> {
        let digest = sha256(bytes);
        self.write(&self.path(&digest), bytes)?;
        self.write(&self.dir.join("images").join(image.hex()), digest.as_bytes())?;
        Ok((digest, bytes.to_vec()))
    }

    fn has_all(&self, artifact: &Artifact) -> bool {
        pieces(artifact).all(|piece| self.path(&piece.digest).exists())
    }

    /// Where the blob `digest`, which was checked to be a digest, is.
    fn path(&self, digest: &str) -> PathBuf {
        self.dir.join("blobs").join(digest.trim_start_matches("sha256:"))
    }

    /// The file appears whole: a reader never sees half of it.
    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), ShelfError> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(ShelfError::io("create", dir))?;
        }
        let draft = self.dir.join(format!("draft-{}", crate::control::random_token()));
        let written = fs::write(&draft, bytes).and_then(|()| fs::rename(&draft, path));
        written.map_err(ShelfError::io("write", path))
    }

    /// The bytes of a manifest.
    pub fn whole(&self, digest: &str) -> Result<Vec<u8>, ShelfError> {
        match self.blob(digest)? {
            Blob::File(path, len) if len <= MAX_BLOB_LEN as u64 => {
                let bytes = fs::read(&path).map_err(ShelfError::io("read", &path))?;
                let found = sha256(&bytes);
                if found == digest { Ok(bytes) } else { Err(ShelfError::Unknown(digest.to_owned())) }
            }
            _ => Err(ShelfError::Unknown(digest.to_owned())),
        }
    }

    /// The blob `digest`.
    pub fn blob(&self, digest: &str) -> Result<Blob, ShelfError> {
        if !is_sha256(digest) {
            return Err(ShelfError::Digest(digest.chars().take(100).collect()));
        }
        let path = self.path(digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(ShelfError::Unknown(digest.to_owned())),
            Err(e) => return Err(ShelfError::io("read", &path)(e)),
        };
        let len = file.metadata().map_err(ShelfError::io("examine", &path))?.len();
        let mut head = Vec::new();
        (&file).take(MAX_TABLE_LEN as u64).read_to_end(&mut head).map_err(ShelfError::io("read", &path))?;
        match Table::parse_alone(&head) {
            Ok(table) => Ok(Blob::Pack(table)),
            Err(_) => Ok(Blob::File(path, len)),
        }
    }

    /// The file of the upload `name`; `None` for what cannot be one.
    pub fn upload(&self, name: &str) -> Result<PathBuf, ShelfError> {
        let hex = |c: u8| c.is_ascii_digit() || matches!(c, b'a'..=b'f');
        if name.len() != 64 || !name.bytes().all(hex) {
            return Err(ShelfError::UnknownUpload);
        }
        Ok(self.dir.join("uploads").join(name))
    }

    /// Begins an upload and returns its name.
    pub fn begin(&self) -> Result<String, ShelfError> {
        self.store.need_space("receiving a blob", MAX_BLOB_LEN as u64 / 4)?;
        let name = crate::control::random_token();
        let path = self.upload(&name)?;
        let dir = self.dir.join("uploads");
        fs::create_dir_all(&dir).map_err(ShelfError::io("create", &dir))?;
        File::create_new(&path).map_err(ShelfError::io("create", &path))?;
        Ok(name)
    }

    /// Takes the upload `name` as the blob `digest`: of a pack, the chunks go into the store.
    pub fn finish(&self, name: &str, digest: &str) -> Result<(), ShelfError> {
        let path = self.upload(name)?;
        if !is_sha256(digest) {
            return Err(ShelfError::Digest(digest.chars().take(100).collect()));
        }
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(ShelfError::UnknownUpload),
            Err(e) => return Err(ShelfError::io("read", &path)(e)),
        };
        let (found, len) = sha256_of(&mut file).map_err(ShelfError::io("read", &path))?;
        let kept = if found == digest {
            self.keep(&path, len, digest)
        } else {
            Err(ShelfError::Mismatch { wanted: digest.to_owned(), found })
        };
        // Kept or refused, nobody needs the upload any more.
        let _ = fs::remove_file(&path);
        kept
    }

    fn keep(&self, upload: &Path, len: u64, digest: &str) -> Result<(), ShelfError> {
        let read = || ShelfError::io("read", upload);
        let mut file = io::BufReader::new(File::open(upload).map_err(read())?);
        let mut head = vec![0; len.min(MAX_TABLE_LEN as u64) as usize];
        file.read_exact(&mut head).map_err(read())?;
        let table = match Table::parse(&head, len) {
            Ok(table) => table,
            // What is no pack is kept as it is, and looked at when a manifest names it.
            Err(PackError::NotAPack) => {
                let target = self.path(digest);
                let dir = self.dir.join("blobs");
                fs::create_dir_all(&dir).map_err(ShelfError::io("create", &dir))?;
                return fs::rename(upload, &target).map_err(ShelfError::io("write", &target));
            }
            Err(e) => return Err(e.into()),
        };
        let head = table.encode();
        let mut file = io::BufReader::new(File::open(upload).map_err(read())?);
        io::copy(&mut file.by_ref().take(head.len() as u64), &mut io::sink()).map_err(read())?;
        let (mut frame, mut scratch) = (Vec::new(), chunk_buffer());
        for entry in table.entries() {
            frame.resize(entry.len as usize, 0);
            file.read_exact(&mut frame).map_err(read())?;
            self.store.put_frame_with(&entry.digest, &frame, &mut scratch)?;
        }
        self.write(&self.path(digest), &head)
    }

    /// Takes the OCI manifest `bytes`, whose blobs are here, and points `tag` at its image. Returns the image and the
    /// manifest's digest.
    pub fn accept(&self, tag: &str, bytes: &[u8]) -> Result<(Digest, String), ShelfError> {
        let _lease = self.store.lease()?;
        let artifact = Artifact::parse(bytes)?;
        for piece in pieces(&artifact) {
            let found = self.blob(&piece.digest)?.size();
            if found != piece.size {
                let (what, size) = ("a blob of another length", piece.size);
                return Err(OciError::Size { what, size, most: found }.into());
            }
        }
        let config = self.whole(&artifact.manifest.digest)?;
        let manifest = bedplate_images::manifest::parse(&config).map_err(OciError::from)?;
        artifact.check_parts(&manifest)?;
        for ((name, part), index) in manifest.parts.iter().zip(&artifact.indexes) {
            let plain = unpack_index(&self.whole(&index.digest)?, name, part.size)?;
            self.store.put_blob_as(&part.index, &plain)?;
        }
        let image = bedplate_images::digest_of(&config);
        self.store.sync()?;
        self.store.put_blob_as(&image, &config)?;
        if let Some(signature) = &artifact.signature {
            self.store.put_signature(&image, signature)?;
        }
        self.store.set_tag(tag, &image)?;
        let (digest, _) = self.note(&image, bytes)?;
        Ok((image, digest))
    }

    /// Removes what no tag needs, and what processes before this one left half done. For the start, when nobody pushes.
    pub fn tidy(&self) -> Result<(), ShelfError> {
        let live: BTreeSet<String> =
            self.store.each_tag()?.into_iter().filter_map(|(_, digest)| Some(digest.ok()?.hex())).collect();
        let mut needed = BTreeSet::new();
        for (path, _) in list(&self.dir.join("images"))? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let digest = fs::read_to_string(&path).unwrap_or_default();
            let artifact = self.whole(&digest).ok().and_then(|bytes| Artifact::parse(&bytes).ok());
            match artifact.filter(|_| live.contains(&name)) {
                Some(artifact) => {
                    needed.extend(pieces(&artifact).map(|piece| self.path(&piece.digest)));
                    needed.insert(self.path(&digest));
                }
                None => remove(&path)?,
            }
        }
        for (path, age) in list(&self.dir.join("blobs"))? {
            if age > KEEP_UNNAMED && !needed.contains(&path) {
                remove(&path)?;
            }
        }
        for (path, _) in list(&self.dir.join("uploads"))? {
            remove(&path)?;
        }
        for (path, _) in list(&self.dir)? {
            let draft = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("draft-"));
            if draft {
                remove(&path)?;
            }
        }
        Ok(())
    }

    /// Writes the bytes from `start` to `end` of a blob, piece by piece, to `out`.
    pub fn send(&self, blob: &Blob, start: u64, end: u64, out: &mut dyn Write) -> Result<(), ShelfError> {
        match blob {
            Blob::File(path, _) => {
                let mut file = File::open(path).map_err(ShelfError::io("read", path))?;
                io::Seek::seek(&mut file, io::SeekFrom::Start(start)).map_err(ShelfError::io("read", path))?;
                io::copy(&mut file.take(end - start), out).map_err(ShelfError::io("send", path)).map(drop)
            }
            Blob::Pack(table) => {
                let mut piece = |at: u64, bytes: &[u8]| {
                    let len = bytes.len() as u64;
                    // Both within the piece.
                    let (from, to) = (start.clamp(at, at + len) - at, end.clamp(at, at + len) - at);
                    let path = Path::new("a pack");
                    out.write_all(&bytes[from as usize..to as usize]).map_err(ShelfError::io("send", path))
                };
                piece(0, &table.encode())?;
                for entry in table.entries() {
                    if entry.offset < end && entry.offset + u64::from(entry.len) > start {
                        let frame = self.store.frame(&entry.digest)?;
                        if frame.len() != entry.len as usize {
                            let (digest, what) = (entry.digest.to_string(), "frame of another length");
                            return Err(ShelfError::Mismatch { wanted: digest, found: what.to_owned() });
                        }
                        piece(entry.offset, &frame)?;
                    }
                }
                Ok(())
            }
        }
    }
}

fn pieces(artifact: &Artifact) -> impl Iterator<Item = &Descriptor> {
    std::iter::once(&artifact.manifest).chain(&artifact.indexes).chain(&artifact.packs)
}

/// The files in `dir` and how old they are; none where there is no such directory.
fn list(dir: &Path) -> Result<Vec<(PathBuf, Duration)>, ShelfError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(ShelfError::io("list", dir)(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(ShelfError::io("list", dir))?;
        let meta = entry.metadata().map_err(ShelfError::io("examine", dir))?;
        if meta.is_file() {
            let age = meta.modified().ok().and_then(|time| time.elapsed().ok()).unwrap_or_default();
            found.push((entry.path(), age));
        }
    }
    Ok(found)
}

fn remove(path: &Path) -> Result<(), ShelfError> {
    fs::remove_file(path).map_err(ShelfError::io("remove", path))
}

impl From<ManifestError> for ShelfError {
    fn from(error: ManifestError) -> Self {
        Self::Oci(error.into())
    }
}
