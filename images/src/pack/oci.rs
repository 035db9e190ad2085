//! An image as an artifact of an OCI registry: one manifest of the registry's own kind that names blobs.
//!
//! ```text
//! OCI manifest ─► config: the image's manifest, as it is
//!             ├─► one layer per part, in the order of their names: its index, one zstd frame
//!             └─► any number of layers: packs, which together have every chunk of the image, and may have others
//! ```
//!
//! The registry's digests (SHA-256) are the way through the registry; ours (BLAKE3) are what the image is made of, and are
//! checked again when its pieces are kept. Specifications: OCI image 1.1 (manifest, artifacts), OCI distribution 1.1.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::Read;

use bedplate_api::Digest;
use bedplate_api::image::{MAX_BLOB_LEN, Manifest};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{MAX_PACK_LEN, PackError};
use crate::index::index_len;
use crate::manifest::{MAX_MANIFEST_LEN, ManifestError};

/// What the artifact is: the `artifactType` of the OCI manifest.
pub const ARTIFACT: &str = "application/vnd.bedplate.image.v1";
/// The image's manifest.
pub const MANIFEST: &str = "application/vnd.bedplate.manifest.v1+json";
/// A part's index, compressed with zstd.
pub const INDEX: &str = "application/vnd.bedplate.index.v1+zstd";
/// A pack.
pub const PACK: &str = "application/vnd.bedplate.pack.v1";
/// An OCI manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Annotation with a BLAKE3 digest: of the image on the OCI manifest, of the plain index on an index.
pub const DIGEST: &str = "bedplate.digest";
/// Annotation with the minisign signature of the image's manifest, on the OCI manifest.
pub const SIGNATURE: &str = "bedplate.signature";

/// Registries take no longer OCI manifests; that is packs for about 600 GiB of content.
pub const MAX_OCI_MANIFEST_LEN: usize = 4 << 20;

/// What is fetched from a registry and is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// Not the JSON that it should be.
    #[error("this is not an OCI manifest ({0})")]
    Syntax(#[from] serde_json::Error),
    /// Longer than any.
    #[error("an OCI manifest of {0} bytes is more than the {MAX_OCI_MANIFEST_LEN} that registries take")]
    TooLong(usize),
    /// Somebody else's artifact.
    #[error("this is {0}, and no Bedplate image; `bedplate image import` takes the disk out of a container image")]
    Foreign(String),
    /// A layer that is none of ours.
    #[error("a layer of the media type {0:?} has no place in a Bedplate image")]
    Layer(String),
    /// A text that is no digest.
    #[error("{0:?} is not a digest: expected \"sha256:\" and 64 lower-case hex digits")]
    Digest(String),
    /// A size that no such blob has.
    #[error("the OCI manifest claims {size} bytes for {what}; 1 to {most} are possible")]
    Size {
        /// Which blob.
        what: &'static str,
        /// As claimed.
        size: u64,
        /// The limit.
        most: u64,
    },
    /// Not one index for each part.
    #[error("the OCI manifest names {found} indexes, and the image has {wanted} parts")]
    Indexes {
        /// Indexes there are.
        found: usize,
        /// Parts there are.
        wanted: usize,
    },
    /// An index that is no zstd frame, or one of more bytes than it should have.
    #[error("the index of part {part:?} does not unpack to the {wanted} bytes that the part needs")]
    Index {
        /// The part.
        part: String,
        /// Length that follows from its size.
        wanted: u64,
    },
    /// The image's own manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A pack.
    #[error(transparent)]
    Pack(#[from] PackError),
}

/// Where a blob is and what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Kind of content.
    pub media_type: String,
    /// SHA-256 of the bytes, as registries write it.
    pub digest: String,
    /// Length in bytes.
    pub size: u64,
    /// Notes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// Of `bytes`.
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: sha256(bytes),
            size: bytes.len() as u64,
            annotations: BTreeMap::new(),
        }
    }

    fn check(&self, what: &'static str, most: u64) -> Result<(), OciError> {
        if !is_sha256(&self.digest) {
            return Err(OciError::Digest(self.digest.chars().take(100).collect()));
        }
        if self.size == 0 || self.size > most {
            return Err(OciError::Size { what, size: self.size, most });
        }
        Ok(())
    }
}

/// The OCI manifest of an image. Fields that others add are passed over, as the specification wants it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OciManifest {
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    artifact_type: Option<String>,
    config: Descriptor,
    layers: Vec<Descriptor>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// What an image consists of in a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// The image's manifest.
    pub manifest: Descriptor,
    /// The parts' indexes, in the order of the parts' names.
    pub indexes: Vec<Descriptor>,
    /// The packs.
    pub packs: Vec<Descriptor>,
    /// The signature of the image's manifest, if it has one; as it came.
    pub signature: Option<String>,
}

impl Artifact {
    /// Reads and checks an OCI manifest. Only what needs no other blob is checked: see [`Artifact::check_parts`].
    pub fn parse(bytes: &[u8]) -> Result<Self, OciError> {
        if bytes.len() > MAX_OCI_MANIFEST_LEN {
            return Err(OciError::TooLong(bytes.len()));
        }
        let manifest: OciManifest = serde_json::from_slice(bytes)?;
        let kind = manifest.artifact_type.as_deref().unwrap_or(&manifest.config.media_type);
        if kind != ARTIFACT || manifest.config.media_type != MANIFEST {
            return Err(OciError::Foreign(kind.chars().take(100).collect()));
        }
        manifest.config.check("the image's manifest", MAX_MANIFEST_LEN)?;
        let (mut indexes, mut packs) = (Vec::new(), Vec::new());
        for layer in manifest.layers {
            match layer.media_type.as_str() {
                INDEX => {
                    layer.check("an index", MAX_BLOB_LEN as u64)?;
                    indexes.push(layer);
                }
                PACK => {
                    layer.check("a pack", MAX_PACK_LEN)?;
                    packs.push(layer);
                }
                other => return Err(OciError::Layer(other.chars().take(100).collect())),
            }
        }
        let signature = manifest.annotations.get(SIGNATURE).cloned();
        Ok(Self { manifest: manifest.config, indexes, packs, signature })
    }

    /// The bytes of the OCI manifest of the image `image`.
    pub fn encode(&self, image: &Digest) -> Result<Vec<u8>, OciError> {
        let signature = self.signature.as_ref().map(|text| (SIGNATURE.to_owned(), text.clone()));
        let manifest = OciManifest {
            schema_version: 2,
            media_type: Some(OCI_MANIFEST.to_owned()),
            artifact_type: Some(ARTIFACT.to_owned()),
            config: self.manifest.clone(),
            layers: self.indexes.iter().chain(&self.packs).cloned().collect(),
            annotations: [(DIGEST.to_owned(), image.to_string())].into_iter().chain(signature).collect(),
        };
        let bytes = serde_json::to_vec(&manifest)?;
        if bytes.len() > MAX_OCI_MANIFEST_LEN {
            return Err(OciError::TooLong(bytes.len()));
        }
        Ok(bytes)
    }

    /// Checks that each part of the image has an index.
    pub fn check_parts(&self, manifest: &Manifest) -> Result<(), OciError> {
        if self.indexes.len() == manifest.parts.len() {
            return Ok(());
        }
        Err(OciError::Indexes { found: self.indexes.len(), wanted: manifest.parts.len() })
    }
}

/// An index as it is sent.
pub fn pack_index(index: &[u8]) -> std::io::Result<Vec<u8>> {
    // The level that chunks have: an index is noise and runs of zeros, and no level finds more in it.
    zstd::bulk::compress(index, 3)
}

/// Unpacks the index of `part`, which is `size` bytes large: to exactly as many bytes as its index must have.
pub fn unpack_index(packed: &[u8], part: &str, size: u64) -> Result<Vec<u8>, OciError> {
    let wanted = index_len(size);
    let refused = || OciError::Index { part: part.to_owned(), wanted };
    if wanted > MAX_BLOB_LEN as u64 {
        return Err(refused());
    }
    let mut index = Vec::new();
    let reader = zstd::stream::read::Decoder::new(packed).map_err(|_| refused())?;
    // One byte more than there should be is enough to know.
    reader.take(wanted + 1).read_to_end(&mut index).map_err(|_| refused())?;
    if index.len() as u64 == wanted { Ok(index) } else { Err(refused()) }
}

/// The digest of `bytes` as registries write it.
pub fn sha256(bytes: &[u8]) -> String {
    let mut hasher = Sha256::new();
    hasher.update(bytes);
    hex_of(hasher)
}

/// The digest of all that `reader` yields, and how many bytes that was.
pub fn sha256_of(reader: &mut dyn Read) -> std::io::Result<(String, u64)> {
    let (mut hasher, mut bytes, mut len) = (Sha256::new(), vec![0; 64 << 10], 0);
    loop {
        match reader.read(&mut bytes) {
            Ok(0) => return Ok((hex_of(hasher), len)),
            Ok(n) => {
                hasher.update(&bytes[..n]);
                len += n as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// What `hasher` has come to, as registries write it.
pub fn hex_of(hasher: Sha256) -> String {
    hasher.finalize().iter().fold("sha256:".to_owned(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Whether `text` is a digest as registries write it, of the one kind that is used here.
pub fn is_sha256(text: &str) -> bool {
    let hex = |c: u8| c.is_ascii_digit() || matches!(c, b'a'..=b'f');
    text.strip_prefix("sha256:").is_some_and(|digits| digits.len() == 64 && digits.bytes().all(hex))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Artifact {
        Artifact {
            manifest: Descriptor::of(MANIFEST, b"{}"),
            indexes: vec![Descriptor::of(INDEX, b"index")],
            packs: vec![Descriptor::of(PACK, b"pack"), Descriptor::of(PACK, b"another")],
            signature: None,
        }
    }

    /// What is in registries. If this fails, images there get other digests: see "How to change it" in
    /// `docs/image-format.md`.
    #[test]
    fn golden() {
        let golden = include_bytes!("../../golden/oci-manifest-v1.json");
        let bytes = sample().encode(&Digest::from_bytes([0xab; 32])).unwrap();
        assert_eq!(String::from_utf8_lossy(&bytes), String::from_utf8_lossy(golden));
        assert_eq!(Artifact::parse(golden).unwrap(), sample());
    }

    #[test]
    fn sha256_is_what_everybody_means() {
        // printf '' | sha256sum
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(sha256(b""), empty);
        assert!(is_sha256(empty));
        for bad in ["", "sha256:", "sha512:00", &empty[..70], &empty.to_uppercase(), "sha256:../../../etc/passwd"] {
            assert!(!is_sha256(bad), "{bad}");
        }
    }

    #[test]
    fn hostile_manifests_are_refused() {
        let good = String::from_utf8(sample().encode(&Digest::from_bytes([1; 32])).unwrap()).unwrap();
        let refused = |from: &str, to: &str, message: &str| {
            assert!(good.contains(from), "{from}");
            let error = Artifact::parse(good.replacen(from, to, 1).as_bytes()).unwrap_err().to_string();
            assert!(error.contains(message), "{error:?} should say {message:?}");
        };
        refused(ARTIFACT, "application/vnd.kubevirt", "no Bedplate image");
        refused(MANIFEST, "application/vnd.oci.image.config.v1+json", "no Bedplate image");
        refused(PACK, "application/vnd.oci.image.layer.v1.tar", "has no place");
        refused("sha256:", "sha256:../", "is not a digest");
        refused("\"size\":2", "\"size\":0", "claims 0 bytes for the image's manifest");
        refused("\"size\":4", "\"size\":99999999999", "for a pack");
        refused("\"size\":5", "\"size\":18446744073709551615", "for an index");
        refused("\"size\":5", "\"size\":-1", "not an OCI manifest");
        assert!(matches!(Artifact::parse(&vec![b' '; MAX_OCI_MANIFEST_LEN + 1]), Err(OciError::TooLong(_))));
        assert!(Artifact::parse(good.replacen('{', "{\"new\":1,", 1).as_bytes()).is_ok(), "what others add");
    }

    #[test]
    fn an_index_is_no_bomb() {
        let size = 3 * crate::CHUNK_SIZE as u64;
        let index = vec![7; index_len(size) as usize];
        assert_eq!(unpack_index(&pack_index(&index).unwrap(), "disk", size).unwrap(), index);
        let bomb = pack_index(&vec![0; 1 << 28]).unwrap();
        for (packed, size) in
            [(&bomb[..], size), (b"noise", size), (&bomb, 64 << 40), (&pack_index(b"").unwrap(), size)]
        {
            let error = unpack_index(packed, "disk", size).unwrap_err();
            assert!(error.to_string().contains("the index of part \"disk\""), "{error}");
        }
    }
}
