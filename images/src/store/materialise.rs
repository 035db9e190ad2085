//! Parts as flat files: kernels and initial RAM disks for who cannot read a store.

use std::os::unix::fs::FileExt;
use std::path::Path;

use bedplate_api::Digest;

use super::{Draft, Store, StoreError, need_space, sync_dir};
use crate::frame::{self, CHUNK_SIZE};

impl Store {
    /// Writes part `part` of the image `image` to the file `path`: verified, sparse where it is zero, and there whole or
    /// not at all. Refused at once when it cannot fit.
    pub fn materialise(&self, image: &Digest, part: &str, path: &Path) -> Result<(), StoreError> {
        let reader = self.part(image, part)?;
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let mut content: u64 = 0;
        reader.index().each(|_, _| {
            content = content.saturating_add(CHUNK_SIZE as u64);
            Ok::<_, StoreError>(())
        })?;
        need_space("writing the file", dir, content.min(reader.size()))?;

        let draft = Draft::create(dir)?;
        draft.file().set_len(reader.size()).map_err(StoreError::io("write", draft.path()))?;
        let mut plain = frame::chunk_buffer();
        reader.index().each(|number, digest| {
            let len = reader.read(number, &digest, &mut plain)?;
            let written = draft.file().write_all_at(&plain[..len], number * CHUNK_SIZE as u64);
            written.map_err(StoreError::io("write", path))
        })?;
        draft.sync()?;
        draft.publish(path)?;
        sync_dir(dir)
    }
}
