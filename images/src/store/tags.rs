//! Names for images.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::PathBuf;

use bedplate_api::Digest;
use bedplate_api::image::ImageSummary;

use super::{Store, StoreError, sync_dir};
use crate::manifest;

/// Hex digits that lists show of a digest, and the fewest that stand for it.
const MIN_PREFIX: usize = 12;

/// A name, and what it points to or why that cannot be told.
pub type FoundTag = (String, Result<Digest, StoreError>);

/// Whether `name` may name an image: `[a-z0-9][a-z0-9._-]{0,127}`. Nothing in it can leave a directory.
pub fn is_tag_name(name: &str) -> bool {
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = name.as_bytes();
    bytes.len() <= 128
        && bytes.first().is_some_and(|c| plain(*c))
        && bytes.iter().all(|c| plain(*c) || matches!(c, b'.' | b'_' | b'-'))
}

/// The hex digits of what may be the beginning of a digest: as many as lists show, or more.
fn digest_prefix(name: &str) -> Option<&str> {
    let digits = name.strip_prefix("blake3:").unwrap_or(name);
    let hex = |c: u8| c.is_ascii_digit() || matches!(c, b'a'..=b'f');
    (MIN_PREFIX..=64).contains(&digits.len()).then_some(digits).filter(|digits| digits.bytes().all(hex))
}

impl Store {
    fn tag_path(&self, name: &str) -> Result<PathBuf, StoreError> {
        if !is_tag_name(name) {
            return Err(StoreError::TagName(name.chars().take(140).collect()));
        }
        Ok(self.dir().join("tags").join(name))
    }

    /// Points the tag `name` at an image that is complete in this store, replacing what it pointed at.
    pub fn set_tag(&self, name: &str, digest: &Digest) -> Result<(), StoreError> {
        let path = self.tag_path(name)?;
        // From the check until the name is there, nobody may take a chunk away.
        let _lease = self.lease()?;
        let missing = self.missing_of(digest)?;
        if missing.chunks > 0 {
            return Err(StoreError::Incomplete { digest: *digest, dir: self.dir().to_owned(), chunks: missing.chunks });
        }
        self.sync()?;
        let mut draft = self.draft()?;
        draft.write(format!("{digest}\n").as_bytes())?;
        draft.sync()?;
        draft.publish(&path)?;
        sync_dir(&self.dir().join("tags"))
    }

    /// What the tag `name` points to.
    pub fn tag(&self, name: &str) -> Result<Digest, StoreError> {
        let path = self.tag_path(name)?;
        match fs::read(&path) {
            Ok(bytes) => std::str::from_utf8(&bytes)
                .ok()
                .and_then(|text| text.trim_end().parse().ok())
                .ok_or_else(|| self.tag_corrupt(name, path)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(self.tag_missing(name)),
            Err(e) if e.kind() == io::ErrorKind::IsADirectory => Err(self.tag_corrupt(name, path)),
            Err(e) => Err(StoreError::io("read", &path)(e)),
        }
    }

    fn tag_missing(&self, name: &str) -> StoreError {
        StoreError::TagMissing { name: name.to_owned(), dir: self.dir().to_owned() }
    }

    fn tag_corrupt(&self, name: &str, path: PathBuf) -> StoreError {
        StoreError::TagCorrupt { name: name.to_owned(), path, dir: self.dir().to_owned() }
    }

    /// All tags in the order of their names; fails when one of them cannot be read.
    pub fn tags(&self) -> Result<Vec<(String, Digest)>, StoreError> {
        self.each_tag()?.into_iter().map(|(name, digest)| Ok((name, digest?))).collect()
    }

    /// All tags in the order of their names, and for each what it points to or why that cannot be told: for who can go
    /// on without some.
    pub fn each_tag(&self) -> Result<Vec<FoundTag>, StoreError> {
        let dir = self.dir().join("tags");
        let mut tags = Vec::new();
        for entry in fs::read_dir(&dir).map_err(StoreError::io("list", &dir))? {
            let name = entry.map_err(StoreError::io("list", &dir))?.file_name();
            // Anything else in the directory is not ours.
            let Some(name) = name.to_str().filter(|name| is_tag_name(name)) else { continue };
            match self.tag(name) {
                // Removed since the directory was listed.
                Err(StoreError::TagMissing { .. }) => {}
                found => tags.push((name.to_owned(), found)),
            }
        }
        tags.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        Ok(tags)
    }

    /// Removes the name `name`; the content stays until [`Store::gc`].
    pub fn remove_tag(&self, name: &str) -> Result<(), StoreError> {
        let path = self.tag_path(name)?;
        let removed = match fs::remove_file(&path) {
            // Not a tag at all, but it is in the way of one. What somebody keeps in there is his to look at first.
            Err(e) if e.kind() == io::ErrorKind::IsADirectory => fs::remove_dir(&path),
            removed => removed,
        };
        match removed {
            Ok(()) => sync_dir(&self.dir().join("tags")),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(self.tag_missing(name)),
            Err(e) => Err(StoreError::io("remove", &path)(e)),
        }
    }

    /// The digest of the image called `name`, which is a tag, a digest (`blake3:` and 64 hex digits), or the beginning
    /// of the digest of an image that has a tag: 12 digits or more, as lists show them, with or without `blake3:`.
    pub fn resolve(&self, name: &str) -> Result<Digest, StoreError> {
        match name.parse() {
            Ok(digest) if self.has_blob(&digest) => return Ok(digest),
            Ok(digest) => return Err(StoreError::BlobMissing { digest, dir: self.dir().to_owned() }),
            Err(_) => {}
        }
        let Some(digits) = digest_prefix(name) else { return self.tag(name) };
        match self.tag(name) {
            // No name can have the colon, so what has one is meant as a digest.
            Err(StoreError::TagMissing { .. } | StoreError::TagName(_)) => self.resolve_prefix(name, digits),
            // A name that looks like a digest is a name nevertheless.
            found => found,
        }
    }

    fn resolve_prefix(&self, name: &str, digits: &str) -> Result<Digest, StoreError> {
        // Tags that cannot be read may point anywhere; whoever lists the images is told about them.
        let tagged = self.each_tag()?.into_iter().filter_map(|(_, digest)| digest.ok());
        let images: BTreeSet<Digest> = tagged.filter(|digest| digest.hex().starts_with(digits)).collect();
        let mut images = images.into_iter();
        match (images.next(), images.next()) {
            (None, _) => Err(self.tag_missing(name)),
            (Some(digest), None) => Ok(digest),
            (Some(one), Some(two)) => Err(StoreError::Ambiguous {
                prefix: name.to_owned(),
                dir: self.dir().to_owned(),
                images: vec![one, two],
            }),
        }
    }

    /// What lists show of the image called `name`, in any way that [`Store::resolve`] knows.
    pub fn summary(&self, name: &str) -> Result<ImageSummary, StoreError> {
        let digest = self.resolve(name)?;
        Ok(manifest::summary(name, digest, &self.manifest(&digest)?))
    }
}

#[cfg(test)]
mod tests {
    use super::is_tag_name;

    #[test]
    fn tag_names() {
        for good in ["a", "0", "debian-12", "web_1.2", &"a".repeat(128)] {
            assert!(is_tag_name(good), "{good}");
        }
        for bad in ["", ".", "..", ".a", "-a", "a/b", "../a", "A", "ä", "a b", "a\0", &"a".repeat(129)] {
            assert!(!is_tag_name(bad), "{bad}");
        }
    }
}
