//! In which order a boot reads an image: what earlier boots of it taught. A hint for who copies the image, and kept with
//! it; nobody signs it and nothing depends on it.

use std::collections::HashSet;
use std::io::{self, Read};
use std::path::PathBuf;

use bedplate_api::Digest;
use bedplate_api::image::MAX_BOOT_ORDER;

use super::{Store, StoreError, make_dir};
use crate::manifest::DISK;

/// Most bytes of an order's file: each number with its comma.
const MAX_LEN: u64 = 21 * MAX_BOOT_ORDER as u64 + 2;

impl Store {
    fn order_path(&self, image: &Digest) -> PathBuf {
        self.dir().join("orders").join(image.hex())
    }

    /// Keeps `order`, numbers of chunks of the disk of `image` in the order in which a boot reads them, in the place of an
    /// earlier one. Numbers that the disk does not have, or that come a second time, and what is more than
    /// [`MAX_BOOT_ORDER`] are left out.
    ///
    /// # Errors
    /// The image's manifest or index is not here, or the file cannot be written.
    pub fn put_boot_order(&self, image: &Digest, order: &[u64]) -> Result<(), StoreError> {
        let order = self.sound(image, order)?;
        let path = self.order_path(image);
        let bytes = serde_json::to_vec(&order).map_err(io::Error::from).map_err(StoreError::io("write", &path))?;
        make_dir(&self.dir().join("orders"))?;
        let mut draft = self.draft()?;
        draft.write(&bytes)?;
        draft.publish(&path)
    }

    /// The order in which a boot of `image` reads the chunks of its disk, as far as that is known. What is damaged is not
    /// known.
    ///
    /// # Errors
    /// The image's manifest or index is not here.
    pub fn boot_order(&self, image: &Digest) -> Result<Vec<u64>, StoreError> {
        let path = self.order_path(image);
        let mut bytes = Vec::new();
        let read = std::fs::File::open(&path).and_then(|file| file.take(MAX_LEN).read_to_end(&mut bytes));
        match read {
            Ok(_) => self.sound(image, &serde_json::from_slice::<Vec<u64>>(&bytes).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(StoreError::io("read", &path)(e)),
        }
    }

    /// What of `order` means something for `image`.
    fn sound(&self, image: &Digest, order: &[u64]) -> Result<Vec<u64>, StoreError> {
        let count = self.part(image, DISK)?.count();
        let mut seen = HashSet::new();
        let sound = order.iter().copied().filter(|number| *number < count && seen.insert(*number));
        Ok(sound.take(MAX_BOOT_ORDER).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::fixtures::{image, noise, store};

    #[test]
    fn an_order_is_kept_as_far_as_it_makes_sense_and_goes_with_its_image() {
        let (_dir, store) = store();
        let image = image(&store, &noise(1, 5 << 16));
        assert!(store.boot_order(&image).unwrap().is_empty());
        store.put_boot_order(&image, &[3, 99, 0, 3, u64::MAX, 4]).unwrap();
        assert_eq!(store.boot_order(&image).unwrap(), [3, 0, 4]);
        store.gc(&[image], Duration::ZERO).unwrap();
        assert_eq!(store.boot_order(&image).unwrap(), [3, 0, 4]);
        std::fs::write(store.order_path(&image), "[3, 1").unwrap();
        assert!(store.boot_order(&image).unwrap().is_empty());
        store.gc(&[], Duration::ZERO).unwrap();
        assert!(!store.order_path(&image).exists());
        assert!(store.put_boot_order(&image, &[1]).is_err(), "of an image that is not here");
    }
}
