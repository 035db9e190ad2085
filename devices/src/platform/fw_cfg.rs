//! The firmware configuration device (QEMU's docs/specs/fw_cfg.rst): numbered items and named files that firmware reads,
//! byte by byte through ports or by DMA into guest memory. Only there when a VM starts through firmware.
//!
//! ```text
//! port 0x510   2 bytes, write   selects an item
//!      0x511   1 byte,  read    the next byte of it
//!      0x514   8 bytes          address of a DMA request, big-endian; the write of its lower half starts it
//! ```
//! A request is 16 bytes, big-endian: control, length, address. It is done when the write returns.

use std::collections::BTreeMap;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::Memory;
use crate::bus::BusDevice;

/// First port.
pub const FW_CFG_PORT: u64 = 0x510;
/// Number of ports.
pub const FW_CFG_LEN: u64 = 12;

/// Items with a number of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum FwCfgKey {
    /// Number of processors, 2 bytes little-endian.
    Cpus = 0x05,
    /// The most processors that there can be, 2 bytes little-endian.
    MaxCpus = 0x0f,
}

const SIGNATURE: u16 = 0x00;
const ID: u16 = 0x01;
const DIRECTORY: u16 = 0x19;
/// Files have the numbers from here on, in the order of their names.
const FIRST_FILE: u16 = 0x20;
/// Of a number, those bits that name an item; the other two ask for write access and for the architecture's own.
const FILES_LIMIT: usize = 0x3fff - FIRST_FILE as usize;
/// Of a name, with its terminator.
const NAME_LEN: usize = 56;

/// Both interfaces: ports and DMA.
const FEATURES: u32 = 0b11;
/// What the DMA port reads as.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";
const DMA: u64 = 4;
const DMA_LOW: u64 = 8;

const ERROR: u32 = 1;
const READ: u32 = 1 << 1;
const SKIP: u32 = 1 << 2;
const SELECT: u32 = 1 << 3;
const WRITE: u32 = 1 << 4;
/// Bytes that one request may read. Items have some KiB; firmware asks for as much as an item has. What is more would keep
/// a vCPU in the host for as long as the guest likes.
pub const MAX_TRANSFER: u32 = 1 << 20;

/// A file that cannot be offered.
#[derive(Debug, thiserror::Error)]
#[error("firmware configuration: the file {name:?} cannot be offered: {why}")]
pub struct FwCfgError {
    name: String,
    why: &'static str,
}

/// What firmware will find, while it is put together.
#[derive(Debug, Default)]
pub struct FwCfgItems {
    numbered: BTreeMap<u16, Vec<u8>>,
    files: BTreeMap<String, Vec<u8>>,
}

impl FwCfgItems {
    /// Nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets an item that has its own number.
    pub fn number(&mut self, key: FwCfgKey, value: u16) {
        self.numbered.insert(key as u16, value.to_le_bytes().to_vec());
    }

    /// Adds a file, or replaces it.
    ///
    /// # Errors
    /// Its name has more than 55 bytes or a zero, it is larger than [`MAX_TRANSFER`], or there are thousands already.
    pub fn file(&mut self, name: &str, bytes: Vec<u8>) -> Result<(), FwCfgError> {
        let refused = |why| Err(FwCfgError { name: name.to_owned(), why });
        if name.len() >= NAME_LEN || name.contains('\0') {
            return refused("its name is too long, or no C string");
        }
        if bytes.len() > MAX_TRANSFER as usize {
            return refused("it is too large");
        }
        if self.files.len() == FILES_LIMIT {
            return refused("there are too many");
        }
        self.files.insert(name.to_owned(), bytes);
        Ok(())
    }

    /// All items by number, the directory of the files among them.
    fn into_items(self) -> BTreeMap<u16, Vec<u8>> {
        let mut items = self.numbered;
        items.insert(SIGNATURE, b"QEMU".to_vec());
        items.insert(ID, FEATURES.to_le_bytes().to_vec());
        // Fits: `file` counts.
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec();
        for ((name, bytes), number) in self.files.into_iter().zip(FIRST_FILE..) {
            directory.extend((bytes.len() as u32).to_be_bytes());
            directory.extend(number.to_be_bytes());
            directory.extend([0; 2]);
            let mut field = [0; NAME_LEN];
            field[..name.len()].copy_from_slice(name.as_bytes());
            directory.extend(field);
            items.insert(number, bytes);
        }
        items.insert(DIRECTORY, directory);
        items
    }
}

/// The device. Items are read-only.
pub struct FwCfg {
    items: BTreeMap<u16, Vec<u8>>,
    memory: Memory,

    selected: u16,
    /// Of the next byte in the selected item; beyond its end everything is zero.
    at: usize,
    dma_high: u32,
}

impl FwCfg {
    /// A device that offers `items` and reads and writes `memory` when it is told to.
    pub fn new(items: FwCfgItems, memory: &Memory) -> Self {
        Self { items: items.into_items(), memory: memory.clone(), selected: SIGNATURE, at: 0, dma_high: 0 }
    }

    fn select(&mut self, number: u16) {
        (self.selected, self.at) = (number, 0);
    }

    /// What is left of the selected item.
    fn rest(&self) -> &[u8] {
        self.items.get(&self.selected).and_then(|item| item.get(self.at..)).unwrap_or_default()
    }

    fn next_byte(&mut self) -> u8 {
        let byte = self.rest().first().copied().unwrap_or(0);
        self.at = self.at.saturating_add(1);
        byte
    }

    /// Does the request at `address`, and says there how it went, if that is RAM.
    fn request(&mut self, address: u64) {
        let mut request = [0; 16];
        if self.memory.read_slice(&mut request, GuestAddress(address)).is_err() {
            return;
        }
        let [a, b, c, d, e, f, g, h, to @ ..] = request;
        let control = u32::from_be_bytes([a, b, c, d]);
        let len = u32::from_be_bytes([e, f, g, h]);
        if control & SELECT != 0 {
            // The upper half is the item's number.
            self.select((control >> 16) as u16);
        }
        let done = if control & READ != 0 {
            self.copy(u64::from_be_bytes(to), len)
        } else if control & WRITE != 0 {
            false
        } else {
            if control & SKIP != 0 {
                self.at = self.at.saturating_add(len as usize);
            }
            true
        };
        let answer = if done { 0 } else { ERROR };
        // It was RAM a moment ago; a guest that has no RAM there any more asks for nothing.
        let _ = self.memory.write_slice(&answer.to_be_bytes(), GuestAddress(address));
    }

    /// `len` bytes of the selected item, with zeroes after its end, to guest memory.
    fn copy(&mut self, to: u64, len: u32) -> bool {
        let end = to.checked_add(len.into());
        if len > MAX_TRANSFER || end.is_none() || !self.memory.check_range(GuestAddress(to), len as usize) {
            return false;
        }
        let mut bytes = vec![0; len as usize];
        let rest = self.rest();
        let there = rest.len().min(bytes.len());
        bytes[..there].copy_from_slice(&rest[..there]);
        self.at = self.at.saturating_add(bytes.len());
        self.memory.write_slice(&bytes, GuestAddress(to)).is_ok()
    }
}

impl BusDevice for FwCfg {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let signature = offset.checked_sub(DMA).and_then(|from| usize::try_from(from).ok());
        match (offset, data) {
            (1, [byte]) => *byte = self.next_byte(),
            (_, data) => match signature.and_then(|from| DMA_SIGNATURE.get(from..from.checked_add(data.len())?)) {
                Some(bytes) => data.copy_from_slice(bytes),
                None => data.fill(0xff),
            },
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[low, high]) => self.select(u16::from_le_bytes([low, high])),
            (DMA, &[a, b, c, d]) => self.dma_high = u32::from_be_bytes([a, b, c, d]),
            (DMA_LOW, &[a, b, c, d]) => {
                let low = u32::from_be_bytes([a, b, c, d]);
                // Each request names all of its address again, or means the first 4 GiB.
                let high = std::mem::take(&mut self.dma_high);
                self.request(u64::from(high) << 32 | u64::from(low));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
