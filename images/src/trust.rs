//! Who may have made an image: minisign signatures (Ed25519) of manifests, and the keys that a store trusts.
//!
//! ```text
//! {store}/signatures/{hex}.minisig   signature of the image's manifest; its last signer's
//! {store}/trust/{name}.pub           a key that images may be signed with
//! ```
//!
//! A manifest's signature covers the whole image: the manifest names its indexes by digest, and they name every chunk. With a
//! key in `trust/`, nothing boots that none of the keys there has signed; what cannot be read there stops everything, since
//! nobody knows what it would have forbidden.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bedplate_api::Digest;
use minisign_verify::{PublicKey, Signature};

use crate::store::{make_dir, sync_dir};
use crate::{Store, StoreError};

/// No signature and no key is longer; real ones have some 300 bytes, most of it comments.
pub const MAX_LEN: usize = bedplate_api::image::MAX_SIGNATURE_LEN;

/// Why an image is not trusted.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// Nobody signed it.
    #[error(
        "image {image} is not signed, and the keys in {dir} ask for it: sign it with `bedplate image sign`, or fetch it from \
         where it is signed"
    )]
    Unsigned {
        /// The image.
        image: Digest,
        /// Where the keys are.
        dir: PathBuf,
    },
    /// Somebody else signed it, or something else.
    #[error(
        "image {image} is signed, but not by any key in {dir}: add the signer's public key there, if you trust him"
    )]
    Untrusted {
        /// The image.
        image: Digest,
        /// Where the keys are.
        dir: PathBuf,
    },
    /// A text that is no signature.
    #[error("{path} is not a minisign signature ({cause})")]
    NotASignature {
        /// Where it was found.
        path: PathBuf,
        /// Why not.
        cause: String,
    },
    /// A signature of something else, or by another key.
    #[error("the signature is not one of the image {image} by that key ({cause})")]
    Wrong {
        /// The image.
        image: Digest,
        /// What is wrong.
        cause: String,
    },
    /// A file among the keys that is none.
    #[error("{path} is not a minisign public key ({cause}), and nothing boots before it is one or is gone")]
    NotAKey {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: String,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What is known of an image's origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// The store has no keys, so it asks for nothing.
    NotAsked,
    /// Signed with the key of this name.
    SignedBy(String),
}

/// A key that images may be signed with.
pub struct Key {
    /// The file's name without its ending.
    pub name: String,
    key: PublicKey,
}

impl Key {
    /// Reads the public key in the file `path`.
    pub fn read(path: &Path) -> Result<Self, TrustError> {
        let text = read_text(path)?;
        // What a person pastes is often the second line alone.
        let key = PublicKey::decode(&text).or_else(|_| PublicKey::from_base64(text.trim()));
        let key = key.map_err(|e| TrustError::NotAKey { path: path.to_owned(), cause: e.to_string() })?;
        Ok(Self { name: path.file_stem().unwrap_or_default().to_string_lossy().into_owned(), key })
    }
}

fn read_text(path: &Path) -> Result<String, StoreError> {
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(StoreError::io("read", path))?;
    file.take(MAX_LEN as u64).read_to_end(&mut bytes).map_err(StoreError::io("read", path))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A signature in `text`, which `path` is the place of.
fn parse(text: &str, path: &Path) -> Result<Signature, TrustError> {
    let not_one = |cause: String| TrustError::NotASignature { path: path.to_owned(), cause };
    if text.len() > MAX_LEN {
        return Err(not_one("it is too long".to_owned()));
    }
    Signature::decode(text).map_err(|e| not_one(e.to_string()))
}

impl Store {
    /// Where the keys are.
    pub fn trust_dir(&self) -> PathBuf {
        self.dir().join("trust")
    }

    fn signature_path(&self, image: &Digest) -> PathBuf {
        self.dir().join("signatures").join(format!("{}.minisig", image.hex()))
    }

    /// Keeps `text`, a minisign signature of the manifest of `image`, in the place of an earlier one. Whose it is counts
    /// when the image is about to boot, not now.
    pub fn put_signature(&self, image: &Digest, text: &str) -> Result<(), TrustError> {
        let path = self.signature_path(image);
        parse(text, &path)?;
        let dir = self.dir().join("signatures");
        make_dir(&dir)?;
        let mut draft = crate::store::Draft::create(&self.dir().join("tmp"))?;
        draft.write(text.as_bytes())?;
        draft.sync()?;
        draft.publish(&path)?;
        Ok(sync_dir(&dir)?)
    }

    /// The signature of `image`, if it has one. Not verified here.
    pub fn signature(&self, image: &Digest) -> Result<Option<String>, StoreError> {
        match read_text(&self.signature_path(image)) {
            Ok(text) => Ok(Some(text)),
            Err(StoreError::Io { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The keys that images may be signed with; with none, nothing is asked for.
    pub fn keys(&self) -> Result<Vec<Key>, TrustError> {
        let dir = self.trust_dir();
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(StoreError::io("list", &dir)(e).into()),
        };
        let mut keys = Vec::new();
        for entry in entries {
            keys.push(Key::read(&entry.map_err(StoreError::io("list", &dir))?.path())?);
        }
        keys.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(keys)
    }

    /// Whether `image` may boot: the policy. Who boots something asks this before anything of it runs.
    pub fn check_trust(&self, image: &Digest) -> Result<Trust, TrustError> {
        let keys = self.keys()?;
        if keys.is_empty() {
            return Ok(Trust::NotAsked);
        }
        let dir = self.trust_dir();
        let text = self.signature(image)?.ok_or_else(|| TrustError::Unsigned { image: *image, dir: dir.clone() })?;
        let signature = parse(&text, &self.signature_path(image))?;
        let manifest = self.blob(image)?;
        let signer = keys.into_iter().find(|key| key.key.verify(&manifest, &signature, false).is_ok());
        signer.map(|key| Trust::SignedBy(key.name)).ok_or(TrustError::Untrusted { image: *image, dir })
    }

    /// Checks the signature `text` of `image`, else the one that is kept, against one key.
    pub fn check_signature(&self, image: &Digest, text: Option<&str>, key: &Key) -> Result<(), TrustError> {
        let path = self.signature_path(image);
        let text = match text {
            Some(text) => text.to_owned(),
            None => {
                let wrong = || TrustError::Wrong { image: *image, cause: "it is not signed".to_owned() };
                self.signature(image)?.ok_or_else(wrong)?
            }
        };
        let checked = key.key.verify(&self.blob(image)?, &parse(&text, &path)?, false);
        checked.map_err(|e| TrustError::Wrong { image: *image, cause: e.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::fixtures::{image, noise, store};

    /// Made once with `minisign -G -W` and `minisign -S`, of the manifest of [`image`] over these bytes.
    const KEY: &str = "RWQkCJHYq13w4PpoUoppxqlTFB7FQWI5dYzhtOw/6uE+TeZ4GbkB88eh";

    /// A key pair and a signature of `bytes`, by the tool; `None`, with a line that says so, without it.
    fn signed(dir: &Path, name: &str, bytes: &[u8]) -> Option<(PathBuf, String)> {
        let file = |end: &str| dir.join(format!("{name}{end}"));
        let (public, secret, content) = (file(".pub"), file(".sec"), file(""));
        fs::write(&content, bytes).unwrap();
        let run = |args: &[&Path]| Command::new("minisign").args(args).output();
        let Ok(made) = run(&[Path::new("-GWf"), "-p".as_ref(), &public, "-s".as_ref(), &secret]) else {
            println!("skipped: minisign is not installed");
            return None;
        };
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        assert!(run(&["-S".as_ref(), "-s".as_ref(), &secret, "-m".as_ref(), &content]).unwrap().status.success());
        Some((public, fs::read_to_string(file(".minisig")).unwrap()))
    }

    #[test]
    fn a_store_with_keys_boots_what_they_signed_and_nothing_else() {
        let (dir, store) = store();
        let [ours, other] = [1, 2].map(|seed| image(&store, &noise(seed, 1000)));
        assert_eq!(store.check_trust(&ours).unwrap(), Trust::NotAsked);
        let Some((public, signature)) = signed(dir.path(), "ops", &store.blob(&ours).unwrap()) else { return };
        let Some((_, strangers)) = signed(dir.path(), "stranger", &store.blob(&ours).unwrap()) else { return };
        fs::create_dir(store.trust_dir()).unwrap();
        fs::copy(&public, store.trust_dir().join("ops.pub")).unwrap();
        assert!(matches!(store.check_trust(&ours), Err(TrustError::Unsigned { .. })));
        store.put_signature(&ours, &strangers).unwrap();
        assert!(matches!(store.check_trust(&ours), Err(TrustError::Untrusted { .. })));
        store.put_signature(&ours, &signature).unwrap();
        assert_eq!(store.check_trust(&ours).unwrap(), Trust::SignedBy("ops".to_owned()));
        // The signature of one image is none of another.
        store.put_signature(&other, &signature).unwrap();
        assert!(matches!(store.check_trust(&other), Err(TrustError::Untrusted { .. })));
        let key = Key::read(&public).unwrap();
        store.check_signature(&ours, None, &key).unwrap();
        assert!(matches!(store.check_signature(&other, None, &key), Err(TrustError::Wrong { .. })));
        // Whatever is done to a signature, it is not accepted; comments that nobody signed do not matter.
        let lines: Vec<&str> = signature.lines().collect();
        for number in 1..4 {
            let mut lines: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
            lines[number] = lines[number].replacen(|c: char| c.is_ascii_lowercase(), "Z", 30);
            if store.put_signature(&ours, &format!("{}\n", lines.join("\n"))).is_ok() {
                assert!(store.check_trust(&ours).is_err(), "line {number}");
            }
        }
    }

    #[test]
    fn what_cannot_be_read_trusts_nothing() {
        let (_dir, store) = store();
        let ours = image(&store, &noise(1, 1000));
        assert!(matches!(store.put_signature(&ours, "nonsense"), Err(TrustError::NotASignature { .. })));
        assert!(store.put_signature(&ours, &"x".repeat(MAX_LEN + 1)).is_err());
        fs::create_dir(store.trust_dir()).unwrap();
        assert_eq!(store.check_trust(&ours).unwrap(), Trust::NotAsked);
        fs::write(store.trust_dir().join("bare.pub"), format!("{KEY}\n")).unwrap();
        assert!(matches!(store.check_trust(&ours), Err(TrustError::Unsigned { .. })));
        fs::write(store.trust_dir().join("bad.pub"), "not a key").unwrap();
        let error = store.check_trust(&ours).unwrap_err().to_string();
        assert!(error.contains("bad.pub") && error.contains("nothing boots"), "{error}");
    }
}
