//! Changing the disk of a device that works.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Backend, SECTOR, Shared};

/// A handle on a block device, for a thread that is neither its worker nor a vCPU's.
pub struct BlockControl<B> {
    shared: Arc<Shared<B>>,
}

impl<B: Backend> BlockControl<B> {
    pub(super) fn new(shared: Arc<Shared<B>>) -> Self {
        Self { shared }
    }

    /// The disk is `backend` from now on, with its size. Waits for what is being served; that is made durable first,
    /// where durability was promised. The driver is told.
    pub fn replace(&self, backend: B) {
        let sectors = backend.size() / SECTOR;
        {
            let mut disk = self.shared.disk();
            disk.settle();
            self.shared.sectors.store(sectors, Ordering::SeqCst);
            disk.replace(backend, sectors);
        }
        if let Some(interrupt) = self.shared.interrupt().as_ref() {
            interrupt.config_changed();
        }
    }
}
