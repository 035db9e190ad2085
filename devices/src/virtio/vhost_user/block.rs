//! A disk, Virtio 1.2, 5.2: its size and the like are the backend's, and may change.

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::{Frontend, Registers, Rings, VhostUser, VhostUserError};
use crate::Memory;
use crate::virtio::block::{Cache, MAX_QUEUES, SECTOR};

const QUEUE_SIZE: u16 = 256;
/// Bytes of `struct virtio_blk_config` up to the fields of the features below. Backends refuse to show more than they know.
const CONFIG_LEN: usize = 60;
/// Where fields are in it.
const BLK_SIZE: usize = 20;
const NUM_QUEUES: usize = 34;
/// A guest that goes by a larger block than this cannot.
const MAX_BLOCK: u32 = 1 << 20;

/// What a disk may have. Not: what a driver changes by writing configuration space, and what has fields behind those above.
const FEATURES: [u32; 10] = [
    VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_GEOMETRY,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_BLK_SIZE,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_WRITE_ZEROES,
];

/// A disk, from outside of the guest. Outlives the device harmlessly.
#[derive(Clone)]
pub struct VhostUserBlockControl {
    frontend: Arc<Frontend>,
    registers: Arc<Registers>,
    queues: u16,
}

impl VhostUserBlockControl {
    /// Asks the backend for the disk's configuration again, and tells the driver.
    ///
    /// # Errors
    /// It does not answer as it should. The driver goes on with what it knows.
    pub fn read_again(&self) -> Result<(), VhostUserError> {
        let config = config(&self.frontend, self.queues)?;
        self.registers.change(config);
        Ok(())
    }
}

impl VhostUser {
    /// The disk of `frontend`'s backend, with `queues` virtqueues if it and we have as many, and what reads its configuration again. It is
    /// not flushed where `cache` says so.
    ///
    /// # Errors
    /// The backend shows no disk, memory cannot be shared, or descriptors have run out.
    pub fn block(
        frontend: Frontend,
        memory: &Memory,
        cache: Cache,
        queues: usize,
    ) -> Result<(Self, VhostUserBlockControl), VhostUserError> {
        let mut features = FEATURES.iter().fold(0, |bits, feature| bits | 1 << feature) & frontend.features();
        if cache == Cache::Unsafe {
            features &= !(1 << VIRTIO_BLK_F_FLUSH);
        }
        let most = if features & 1 << VIRTIO_BLK_F_MQ == 0 { 1 } else { frontend.queues().unwrap_or(1) };
        let queues = queues.min(most).clamp(1, MAX_QUEUES.into()) as u16;
        if queues == 1 {
            features &= !(1 << VIRTIO_BLK_F_MQ);
        }
        let frontend = Arc::new(frontend);
        let registers = Registers::new(config(&frontend, queues)?);
        let control =
            VhostUserBlockControl { frontend: Arc::clone(&frontend), registers: Arc::clone(&registers), queues };
        let device = Self {
            device_type: VIRTIO_ID_BLOCK,
            features,
            queue_sizes: vec![QUEUE_SIZE; queues.into()],
            registers,
            rings: Rings::open(&frontend, memory)?,
        };
        Ok((device, control))
    }
}

/// Configuration space as the backend has it, for a disk with `queues` virtqueues.
fn config(frontend: &Frontend, queues: u16) -> Result<Vec<u8>, VhostUserError> {
    let mut config = frontend.config::<CONFIG_LEN>()?;
    let wrong = |what: String| VhostUserError::Config { path: frontend.path().into(), what };
    let mut capacity = [0; 8];
    capacity.copy_from_slice(&config[..8]);
    let capacity = u64::from_le_bytes(capacity);
    if capacity.checked_mul(SECTOR).is_none() {
        return Err(wrong(format!("{capacity} sectors")));
    }
    let mut block = [0; 4];
    block.copy_from_slice(&config[BLK_SIZE..BLK_SIZE + 4]);
    let block = u32::from_le_bytes(block);
    let is_good = block.is_power_of_two() && (SECTOR as u32..=MAX_BLOCK).contains(&block);
    if frontend.features() & 1 << VIRTIO_BLK_F_BLK_SIZE != 0 && !is_good {
        return Err(wrong(format!("blocks of {block} bytes")));
    }
    config[NUM_QUEUES..NUM_QUEUES + 2].copy_from_slice(&queues.to_le_bytes());
    Ok(config.to_vec())
}
