//! The host bridge: function 0 of the bus, which guests look for to see that there is a bus at all.

use super::{ConfigSpace, Identity, PciFunction};

pub(super) struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    pub(super) fn new() -> Self {
        // The generic PCI Express host bridge of the QEMU project: guests have no quirks for it.
        Self {
            config: ConfigSpace::new(&Identity {
                vendor: 0x1b36,
                device: 0x0008,
                revision: 0,
                class: 0x06_0000,
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
            }),
        }
    }
}

impl PciFunction for HostBridge {
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
}
