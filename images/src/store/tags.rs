//! Names for images.

use std::fs;
use std::io;
use std::path::PathBuf;

use bedplate_api::Digest;
use bedplate_api::image::ImageSummary;

use super::{Store, StoreError, sync_dir};
use crate::manifest;

/// Whether `name` may name an image: `[a-z0-9][a-z0-9._-]{0,127}`. Nothing in it can leave a directory.
pub fn is_tag_name(name: &str) -> bool {
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = name.as_bytes();
    bytes.len() <= 128
        && bytes.first().is_some_and(|c| plain(*c))
        && bytes.iter().all(|c| plain(*c) || matches!(c, b'.' | b'_' | b'-'))
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
                .ok_or(StoreError::TagCorrupt { path }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(StoreError::TagMissing { name: name.to_owned(), dir: self.dir().to_owned() })
            }
            Err(e) => Err(StoreError::io("read", &path)(e)),
        }
    }

    /// All tags in the order of their names.
    pub fn tags(&self) -> Result<Vec<(String, Digest)>, StoreError> {
        let dir = self.dir().join("tags");
        let mut tags = Vec::new();
        for entry in fs::read_dir(&dir).map_err(StoreError::io("list", &dir))? {
            let name = entry.map_err(StoreError::io("list", &dir))?.file_name();
            // Anything else in the directory is not ours.
            let Some(name) = name.to_str().filter(|name| is_tag_name(name)) else { continue };
            match self.tag(name) {
                Ok(digest) => tags.push((name.to_owned(), digest)),
                // Removed since the directory was listed.
                Err(StoreError::TagMissing { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        tags.sort_unstable();
        Ok(tags)
    }

    /// Removes the name `name`; the content stays until [`Store::gc`].
    pub fn remove_tag(&self, name: &str) -> Result<(), StoreError> {
        let path = self.tag_path(name)?;
        match fs::remove_file(&path) {
            Ok(()) => sync_dir(&self.dir().join("tags")),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(StoreError::TagMissing { name: name.to_owned(), dir: self.dir().to_owned() })
            }
            Err(e) => Err(StoreError::io("remove", &path)(e)),
        }
    }

    /// The digest of the image called `name`, which is a tag or a digest (`blake3:` and 64 hex digits).
    pub fn resolve(&self, name: &str) -> Result<Digest, StoreError> {
        match name.parse() {
            Ok(digest) if self.has_blob(&digest) => Ok(digest),
            Ok(digest) => Err(StoreError::BlobMissing { digest, dir: self.dir().to_owned() }),
            Err(_) => self.tag(name),
        }
    }

    /// What lists show of the image called `name`, a tag or a digest.
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
