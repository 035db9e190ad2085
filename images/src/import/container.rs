//! A disk inside a container image: what KubeVirt calls a containerDisk, a layer with one file in its folder `disk`.
//!
//! Nothing is unpacked to a path: the layer is read as a stream, and the bytes of that one file are the disk. Every blob
//! is verified before the image gets its name.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::format::{Format, HEAD_LEN, detect};
use super::unpack::{Counted, failed, peek, unpack};
use super::{ImportError, Imported, Options, Progress, check_tag, import_stream};
use crate::Store;
use crate::pack::oci::{Artifact, Descriptor, MAX_OCI_MANIFEST_LEN, OCI_MANIFEST, hex_of, is_sha256, sha256};

/// Layers and platforms that one image may have. Docker itself stops at 127 layers.
const MAX_ENTRIES: usize = 256;

/// Manifests on the way to the image: an index may name an index, but who needs a third?
const MAX_DEPTH: usize = 3;

/// Media types of what names images: OCI's and Docker's.
pub const MANIFESTS: [&str; 4] = [
    OCI_MANIFEST,
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// What is wrong with a container image.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// Not the JSON that it should be.
    #[error("its manifest cannot be read ({0})")]
    Syntax(#[from] serde_json::Error),
    /// It names nothing for this kind of machine.
    #[error("it has no image for linux/amd64")]
    Platform,
    /// Too deep, or too many.
    #[error("its manifests name more than any image needs")]
    TooMuch,
    /// A text that is no digest.
    #[error("{0:?} in its manifest is not a SHA-256 digest")]
    Digest(String),
    /// Other bytes than the manifest says.
    #[error("its blob {wanted} has the digest {found}: it was damaged, get it again")]
    Damaged {
        /// As said.
        wanted: String,
        /// As computed.
        found: String,
    },
    /// One of ours.
    #[error("it is a Bedplate image: fetch it with `bedplate image pull`")]
    Ours,
    /// No layer has a disk.
    #[error("no layer of it has a file in the folder `disk`, so it is no containerDisk")]
    NoDisk,
}

/// Where the pieces of a container image come from.
pub trait Blobs {
    /// The manifest or index called `digest`, verified; at most [`MAX_OCI_MANIFEST_LEN`] bytes.
    fn manifest(&mut self, digest: &str) -> Result<Vec<u8>, ImportError>;
    /// The bytes of a layer. The reader fails at its end, at the latest, when they are not what `layer` says.
    fn layer(&mut self, layer: &Descriptor) -> Result<Box<dyn Read + '_>, ImportError>;
}

#[derive(Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Named {
    digest: String,
    #[serde(default)]
    platform: Option<Platform>,
}

/// A manifest has layers, an index has manifests; other fields do not matter here.
#[derive(Deserialize)]
struct Either {
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default)]
    manifests: Vec<Named>,
}

/// Imports the disk in the container image whose manifest or index is `manifest`; `path` is what to call it.
pub fn import_container(
    store: &Store,
    blobs: &mut dyn Blobs,
    manifest: &[u8],
    path: &Path,
    options: Options<'_>,
    progress: &mut Progress<'_>,
) -> Result<Imported, ImportError> {
    check_tag(options.tag)?;
    let refused = |cause| ImportError::Container { path: path.to_owned(), cause };
    if Artifact::parse(manifest).is_ok() {
        return Err(refused(ContainerError::Ours));
    }
    let layers = layers(blobs, manifest, path)?;
    let lease = store.lease()?;
    // What a later layer has hides what an earlier one has.
    for layer in layers.iter().rev() {
        let mut reader = blobs.layer(layer)?;
        let untagged = Options { tag: None, ..options };
        let imported = import_layer(store, &mut reader, layer.size, path, untagged, progress)?;
        // The rest too: what was read is verified when it ends.
        io::copy(&mut reader, &mut io::sink()).map_err(failed(path, None))?;
        if let Some(imported) = imported {
            if let Some(tag) = options.tag {
                store.set_tag(tag, &imported.digest)?;
            }
            drop(lease);
            return Ok(imported);
        }
    }
    Err(refused(ContainerError::NoDisk))
}

/// The layers of the image for this kind of machine.
fn layers(blobs: &mut dyn Blobs, manifest: &[u8], path: &Path) -> Result<Vec<Descriptor>, ImportError> {
    let refused = |cause| ImportError::Container { path: path.to_owned(), cause };
    let mut bytes = manifest.to_vec();
    for _ in 0..MAX_DEPTH {
        let either: Either = serde_json::from_slice(&bytes).map_err(|e| refused(e.into()))?;
        if either.layers.len() > MAX_ENTRIES || either.manifests.len() > MAX_ENTRIES {
            return Err(refused(ContainerError::TooMuch));
        }
        let digests = either.layers.iter().map(|layer| &layer.digest).chain(either.manifests.iter().map(|m| &m.digest));
        if let Some(bad) = digests.clone().find(|digest| !is_sha256(digest)) {
            return Err(refused(ContainerError::Digest(bad.chars().take(100).collect())));
        }
        if either.manifests.is_empty() {
            return Ok(either.layers);
        }
        let fits = |named: &&Named| match &named.platform {
            Some(platform) => platform.os == "linux" && platform.architecture == "amd64",
            None => false,
        };
        // One that stands alone and says nothing is for everybody.
        let alone = || either.manifests.first().filter(|named| either.manifests.len() == 1 && named.platform.is_none());
        let chosen = either.manifests.iter().find(fits).or_else(alone);
        bytes = blobs.manifest(&chosen.ok_or_else(|| refused(ContainerError::Platform))?.digest)?;
    }
    Err(refused(ContainerError::TooMuch))
}

/// Imports the file in the folder `disk` of a layer; `None` when it has none.
fn import_layer(
    store: &Store,
    layer: &mut dyn Read,
    len: u64,
    path: &Path,
    options: Options<'_>,
    progress: &mut Progress<'_>,
) -> Result<Option<Imported>, ImportError> {
    let (counted, count) = Counted::new(layer);
    let (head, packed) = peek(counted, HEAD_LEN).map_err(failed(path, None))?;
    let packing = Some(detect(&head, &[])).filter(|format| format.is_packed());
    let failed = failed(path, packing);
    let unpacked = unpack(packed, packing.unwrap_or(Format::Raw), &count).map_err(&failed)?;
    let mut archive = tar::Archive::new(unpacked);
    // Raw: names that come as entries of their own are passed over, with whatever length they claim.
    for entry in archive.entries().map_err(&failed)?.raw(true) {
        let entry = entry.map_err(&failed)?;
        if is_disk(&entry) {
            // The bytes of the layer as it came, not those of the file, which nobody knows who sees the progress.
            let mut told = |_, _| progress(count.get(), len);
            let size = entry.size();
            return import_stream(store, entry, Some(size), path, options, &mut told).map(Some);
        }
    }
    Ok(None)
}

fn is_disk<R: Read>(entry: &tar::Entry<'_, R>) -> bool {
    let Ok(path) = entry.path() else { return false };
    let mut parts = path.components().filter(|part| !matches!(part, Component::CurDir | Component::RootDir));
    let named = match (parts.next(), parts.next(), parts.next()) {
        (Some(Component::Normal(folder)), Some(Component::Normal(name)), None) => {
            // What begins so says that something was removed.
            folder == "disk" && !name.to_string_lossy().starts_with(".wh.")
        }
        _ => false,
    };
    named && entry.header().entry_type().is_file() && entry.size() > 0
}

/// A directory in the OCI image layout.
pub struct Layout {
    dir: PathBuf,
}

impl Layout {
    /// `dir`, if it is one: it has a file `oci-layout`.
    pub fn find(dir: &Path) -> Option<Self> {
        dir.join("oci-layout").is_file().then(|| Self { dir: dir.to_owned() })
    }

    /// Imports the disk in it.
    pub fn import(
        mut self,
        store: &Store,
        options: Options<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<Imported, ImportError> {
        let index = read_small(&self.dir.join("index.json"))?;
        let path = self.dir.clone();
        import_container(store, &mut self, &index, &path, options, progress)
    }

    /// The digest was looked at, so it is no way out of the directory.
    fn blob(&self, digest: &str) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
    }
}

fn read_small(path: &Path) -> Result<Vec<u8>, ImportError> {
    let file = super::open_file(path, "a container image")?;
    let mut bytes = Vec::new();
    file.take(MAX_OCI_MANIFEST_LEN as u64).read_to_end(&mut bytes).map_err(ImportError::io("read", path))?;
    Ok(bytes)
}

impl Blobs for Layout {
    fn manifest(&mut self, digest: &str) -> Result<Vec<u8>, ImportError> {
        let bytes = read_small(&self.blob(digest))?;
        let found = sha256(&bytes);
        if found == digest {
            return Ok(bytes);
        }
        let cause = ContainerError::Damaged { wanted: digest.to_owned(), found };
        Err(ImportError::Container { path: self.dir.clone(), cause })
    }

    fn layer(&mut self, layer: &Descriptor) -> Result<Box<dyn Read + '_>, ImportError> {
        let path = self.blob(&layer.digest);
        let file = super::open_file(&path, "a container image")?;
        Ok(Box::new(Verified { inner: file, hasher: Sha256::new(), wanted: layer.digest.clone() }))
    }
}

/// Fails at its end when it was not what it should be.
struct Verified {
    inner: File,
    hasher: Sha256,
    wanted: String,
}

impl Read for Verified {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(bytes)?;
        self.hasher.update(&bytes[..n]);
        if n == 0 && !bytes.is_empty() {
            let found = hex_of(self.hasher.clone());
            if found != self.wanted {
                let wanted = self.wanted.clone();
                return Err(io::Error::other(ContainerError::Damaged { wanted, found }));
            }
        }
        Ok(n)
    }
}
