//! A file system of the host, Virtio 1.2, 5.11: FUSE's requests on rings.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use super::{Frontend, Registers, Rings, VhostUser, VhostUserError};
use crate::Memory;

/// Bytes of the name by which a guest mounts it, at most.
pub const TAG_LEN: usize = 36;

/// Requests of 1 MiB, the most that FUSE makes, are some 260 pieces.
const QUEUE_SIZE: u16 = 1024;
/// One for what must not wait, one for requests: Linux makes use of one up to 6.10.
const QUEUES: usize = 2;

impl VhostUser {
    /// What `frontend`'s backend shows of its host, to be mounted as `tag`.
    ///
    /// # Errors
    /// The backend is for something else, memory cannot be shared, or descriptors have run out.
    pub fn file_system(frontend: Frontend, memory: &Memory, tag: &str) -> Result<Self, VhostUserError> {
        if frontend.queues().is_some_and(|queues| queues < QUEUES) {
            return Err(frontend.lacks("second virtqueue, which a file system needs", "is it virtiofsd?"));
        }
        let frontend = Arc::new(frontend);
        let mut config = vec![0; TAG_LEN + 4];
        // One that is longer is cut; who configures it has been told.
        let tag = &tag.as_bytes()[..tag.len().min(TAG_LEN)];
        config[..tag.len()].copy_from_slice(tag);
        config[TAG_LEN..].copy_from_slice(&(QUEUES as u32 - 1).to_le_bytes());
        Ok(Self {
            device_type: VIRTIO_ID_FS,
            features: 0,
            queue_sizes: vec![QUEUE_SIZE; QUEUES],
            registers: Registers::new(config),
            rings: Rings::open(&frontend, memory)?,
        })
    }
}
