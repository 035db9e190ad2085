//! Memory that can be added. Faults are in Firecracker's words.

use bedplate_api::vmm::MemoryHotplug;

use super::MAX_MEMORY_MIB;

/// Smallest block, in MiB: what Linux on x86 can add.
const MIN_BLOCK_MIB: u64 = 2;
/// Smallest slot, in MiB.
const MIN_SLOT_MIB: u64 = 128;

/// A region for memory that can be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct HotplugConfig {
    pub total_mib: u64,
    pub block_mib: u64,
}

/// What cannot be such a region.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum HotplugError {
    #[error("Block size must not be lower than {MIN_BLOCK_MIB} MiB")]
    BlockTooSmall,
    #[error("Block size must be a power of 2")]
    BlockNoPowerOfTwo,
    #[error("Slot size must not be lower than {MIN_SLOT_MIB} MiB")]
    SlotTooSmall,
    #[error("Slot size must be a multiple of block size ({0} MiB)")]
    SlotNoBlocks(u64),
    #[error("Total size must not be lower than slot size ({0} MiB)")]
    TotalTooSmall(u64),
    #[error("Total size must be a multiple of slot size ({0} MiB)")]
    TotalNoSlots(u64),
    #[error("Total size must not be higher than {MAX_MEMORY_MIB} MiB")]
    TotalTooLarge,
}

/// Checks such a region.
///
/// # Errors
/// Its sizes do not fit together.
pub fn memory_hotplug(spec: &MemoryHotplug) -> Result<HotplugConfig, HotplugError> {
    let (total, block, slot) = (spec.total_size_mib, spec.block_size_mib, spec.slot_size_mib);
    match () {
        () if block < MIN_BLOCK_MIB => Err(HotplugError::BlockTooSmall),
        () if !block.is_power_of_two() => Err(HotplugError::BlockNoPowerOfTwo),
        () if slot < MIN_SLOT_MIB => Err(HotplugError::SlotTooSmall),
        () if !slot.is_multiple_of(block) => Err(HotplugError::SlotNoBlocks(block)),
        () if total < slot => Err(HotplugError::TotalTooSmall(slot)),
        () if !total.is_multiple_of(slot) => Err(HotplugError::TotalNoSlots(slot)),
        () if total > MAX_MEMORY_MIB => Err(HotplugError::TotalTooLarge),
        () => Ok(HotplugConfig { total_mib: total, block_mib: block }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_to_fit_together() {
        let check = |total_size_mib, block_size_mib, slot_size_mib| {
            let spec = MemoryHotplug { total_size_mib, block_size_mib, slot_size_mib };
            memory_hotplug(&spec).map_err(|error| error.to_string())
        };
        assert_eq!(check(1024, 4, 256), Ok(HotplugConfig { total_mib: 1024, block_mib: 4 }));
        for (total, block, slot, words) in [
            (1024, 1, 128, "lower than 2 MiB"),
            (1024, 3, 129, "power of 2"),
            (1024, 2, 64, "lower than 128 MiB"),
            (1024, 4, 130, "multiple of block size (4 MiB)"),
            (128, 2, 256, "lower than slot size (256 MiB)"),
            (300, 2, 128, "multiple of slot size (128 MiB)"),
            (1 << 21, 2, 128, "higher than"),
        ] {
            assert!(check(total, block, slot).unwrap_err().contains(words), "{words}");
        }
    }
}
