//! Making room: taking out of the node's store what none of its VMs needs.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use bedplate_api::Digest;
use bedplate_images::StoreError;
use bedplate_images::disk::Disk;

use super::{ImageError, Images, blocking};
use crate::files::FileError;
use crate::vm::dir::VmDir;

/// What may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sweep {
    /// What was left of copies that did not become images.
    Leftovers,
    /// That, and complete images that were copied here and that no VM needs: they can be copied again.
    Unused,
}

impl Images {
    /// Removes what neither a disk of a VM nor one of the images `keep`, whose manifests and indexes must be here, needs. Does nothing to a
    /// store that is not this node's alone, nor to one that nothing is copied into, nor while a copy is under way.
    ///
    /// # Errors
    /// It cannot be told what is needed, or the store fails.
    pub async fn make_room(&self, keep: Vec<Digest>, sweep: Sweep) -> Result<(), ImageError> {
        let this = self.clone();
        blocking(move || this.sweep(&keep, sweep)).await
    }

    fn sweep(&self, keep: &[Digest], sweep: Sweep) -> Result<(), ImageError> {
        // Without a source, somebody else put the images there and may not have named them: none can be copied again.
        if self.store.dir() != self.state.join("images") || !self.has_source() {
            return Ok(());
        }
        let mut live = images_of_disks(&self.state)?;
        live.extend(keep);
        if sweep == Sweep::Unused {
            for (name, digest) in self.store.tags()? {
                // Only names that a copy gave.
                if name == digest.hex() && !live.contains(&digest) {
                    tracing::info!("image {} is removed to make room, no VM here needs it", digest.short());
                    self.store.remove_tag(&name)?;
                }
            }
        }
        // Uploads that hold no lease go to the control node's repository, not here.
        match self.store.gc(&live.into_iter().collect::<Vec<_>>(), Duration::ZERO) {
            Ok(swept) => tracing::info!("{} MiB of images were removed to make room", swept.bytes >> 20),
            Err(StoreError::Busy { .. }) => tracing::debug!("no room is made while an image is being copied"),
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }
}

/// The images of the disks of every VM under `state`. One disk that cannot be read fails all: nobody knows what it needs.
fn images_of_disks(state: &Path) -> Result<BTreeSet<Digest>, ImageError> {
    let vms = state.join("vms");
    let entries = match fs::read_dir(&vms) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(e) => return Err(FileError::io("read", &vms)(e).into()),
    };
    let mut images = BTreeSet::new();
    for entry in entries {
        let name = entry.map_err(FileError::io("read", &vms))?.file_name();
        let Some(id) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        let disk = VmDir::new(state, id).disk();
        if disk.join("disk.json").exists() {
            images.insert(Disk::spec_of(&disk)?.image);
        }
    }
    Ok(images)
}

#[cfg(test)]
mod tests {
    use bedplate_api::client::{Client, Endpoint};
    use bedplate_images::Store;

    use super::super::CopyLimits;
    use super::*;

    /// Of a control node that is never asked.
    fn source() -> Option<Client> {
        Some(Client::new(Endpoint::Http("192.0.2.1:1".to_owned()), None).unwrap())
    }

    #[test]
    fn leftovers_go_and_a_store_of_others_is_left_alone() {
        let state = tempfile::tempdir().unwrap();
        let own = Store::create(state.path().join("images")).unwrap();
        let others = Store::create(state.path().join("repository")).unwrap();
        let chunk = own.put_chunk(b"half an image").unwrap();
        others.put_chunk(b"half an image").unwrap();
        Images::new(others.clone(), state.path(), source(), CopyLimits::default()).sweep(&[], Sweep::Unused).unwrap();
        assert!(others.has_chunk(&chunk));
        Images::new(own.clone(), state.path(), None, CopyLimits::default()).sweep(&[], Sweep::Unused).unwrap();
        assert!(own.has_chunk(&chunk), "nobody could copy it again");
        let images = Images::new(own.clone(), state.path(), source(), CopyLimits::default());
        let lease = own.lease().unwrap();
        images.sweep(&[], Sweep::Leftovers).unwrap();
        assert!(own.has_chunk(&chunk), "a copy is under way");
        drop(lease);
        images.sweep(&[], Sweep::Leftovers).unwrap();
        assert!(!own.has_chunk(&chunk));
    }

    #[test]
    fn a_disk_that_cannot_be_read_keeps_everything() {
        let state = tempfile::tempdir().unwrap();
        let own = Store::create(state.path().join("images")).unwrap();
        let chunk = own.put_chunk(b"needed, perhaps").unwrap();
        let disk = VmDir::new(state.path(), bedplate_api::VmId::random()).disk();
        fs::create_dir_all(&disk).unwrap();
        fs::write(disk.join("disk.json"), "{").unwrap();
        let refused = Images::new(own.clone(), state.path(), source(), CopyLimits::default()).sweep(&[], Sweep::Unused);
        assert!(matches!(refused, Err(ImageError::Disk(_))), "{refused:?}");
        assert!(own.has_chunk(&chunk));
    }
}
