//! Parts as flat files: kernels and initial RAM disks for who cannot read a store.

use std::path::Path;

use bedplate_api::Digest;

use super::{Store, StoreError};
use crate::export::{Format, export};

impl Store {
    /// Writes part `part` of the image `image` to the file `path`: see [`export`].
    pub fn materialise(&self, image: &Digest, part: &str, path: &Path) -> Result<(), StoreError> {
        export(self, image, part, path, Format::Raw, &mut |_, _| {})
    }
}
