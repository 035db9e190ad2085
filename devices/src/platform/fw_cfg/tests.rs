use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

use super::*;

const RAM: usize = 4 << 20;
/// Where requests lie.
const REQUEST: u64 = 0x1000;
/// Where they copy to.
const BUFFER: u64 = 0x2000;

fn device() -> FwCfg {
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap());
    let mut items = FwCfgItems::new();
    items.number(FwCfgKey::Cpus, 3);
    items.file("etc/b", b"second".to_vec()).unwrap();
    items.file("etc/a", b"first".to_vec()).unwrap();
    FwCfg::new(items, &memory)
}

fn bytes(device: &mut FwCfg, number: u16, count: usize) -> Vec<u8> {
    device.write(0, &number.to_le_bytes());
    (0..count).map(|_| read(device, 1)).collect()
}

fn read(device: &mut FwCfg, offset: u64) -> u8 {
    let mut byte = [0];
    device.read(offset, &mut byte);
    byte[0]
}

/// Does a request; what its control field says then.
fn request(device: &mut FwCfg, control: u32, len: u32, to: u64) -> u32 {
    let bytes = [&control.to_be_bytes()[..], &len.to_be_bytes(), &to.to_be_bytes()].concat();
    device.memory.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
    device.write(DMA_LOW, &(REQUEST as u32).to_be_bytes());
    u32::from_be(device.memory.read_obj(GuestAddress(REQUEST)).unwrap())
}

fn buffer(device: &FwCfg, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    device.memory.read_slice(&mut bytes, GuestAddress(BUFFER)).unwrap();
    bytes
}

#[test]
fn the_directory_leads_to_every_file() {
    let mut device = device();
    assert_eq!(bytes(&mut device, SIGNATURE, 5), b"QEMU\0");
    assert_eq!(bytes(&mut device, FwCfgKey::Cpus as u16, 2), [3, 0]);
    let directory = bytes(&mut device, DIRECTORY, 4 + 2 * 64);
    assert_eq!(directory[..4], [0, 0, 0, 2]);
    for (entry, (name, text)) in directory[4..].chunks(64).zip([("etc/a", "first"), ("etc/b", "second")]) {
        assert_eq!(u32::from_be_bytes(entry[..4].try_into().unwrap()) as usize, text.len());
        assert_eq!(entry[8..8 + name.len() + 1], *[name.as_bytes(), b"\0"].concat());
        let number = u16::from_be_bytes(entry[4..6].try_into().unwrap());
        assert_eq!(bytes(&mut device, number, text.len()), text.as_bytes());
    }
}

#[test]
fn a_request_selects_skips_and_reads() {
    let mut device = device();
    assert_eq!(request(&mut device, u32::from(FIRST_FILE) << 16 | SELECT | SKIP, 2, 0), 0);
    device.memory.write_slice(&[0xff; 8], GuestAddress(BUFFER)).unwrap();
    assert_eq!(request(&mut device, READ, 6, BUFFER), 0);
    assert_eq!(buffer(&device, 8), b"rst\0\0\0\xff\xff", "zeroes after the end, and nothing beyond what was asked for");
    let mut signature = [0; 8];
    device.read(DMA, &mut signature);
    assert_eq!(signature, DMA_SIGNATURE);
}

#[test]
fn the_upper_half_of_an_address_is_for_one_request() {
    let mut device = device();
    let control = u32::from(FIRST_FILE) << 16 | SELECT | READ;
    device.write(DMA, &1u32.to_be_bytes());
    assert_eq!(request(&mut device, control, 5, BUFFER), control, "beyond all RAM: nobody answered");
    assert_eq!(request(&mut device, control, 5, BUFFER), 0);
    assert_eq!(buffer(&device, 5), b"first");
}

#[test]
fn what_is_refused_changes_nothing() {
    let mut device = device();
    let select = u32::from(FIRST_FILE) << 16 | SELECT;
    let end = RAM as u64;
    for (len, to) in [(5, end), (5, end - 4), (5, u64::MAX), (5, u64::MAX - 4), (MAX_TRANSFER + 1, 0), (u32::MAX, 0)] {
        assert_eq!(request(&mut device, select | READ, len, to), ERROR, "{len} bytes to {to:#x}");
    }
    assert_eq!(buffer(&device, 5), [0; 5]);
    assert_eq!(request(&mut device, select | WRITE, 5, BUFFER), ERROR);
    assert_eq!(bytes(&mut device, FIRST_FILE, 5), b"first");
    // The request itself lies partly or wholly outside.
    for address in [end - 8, end, u64::from(u32::MAX)] {
        device.write(DMA_LOW, &(address as u32).to_be_bytes());
    }
}

#[test]
fn items_that_are_not_there_are_zeroes() {
    let mut device = device();
    for number in [2, 0x0d, 0x1a, FIRST_FILE + 2, 0x4000, 0x8000, 0xffff] {
        assert_eq!(bytes(&mut device, number, 3), [0; 3], "{number:#x}");
    }
    assert_eq!(request(&mut device, 0xffff << 16 | SELECT | SKIP, u32::MAX, 0), 0);
    assert_eq!(request(&mut device, SKIP, u32::MAX, 0), 0);
    assert_eq!(request(&mut device, READ, 4, BUFFER), 0);
    assert_eq!(buffer(&device, 4), [0; 4]);
}

#[test]
fn a_name_fits_into_the_directory() {
    let mut items = FwCfgItems::new();
    assert!(items.file(&"x".repeat(NAME_LEN - 1), Vec::new()).is_ok());
    assert!(items.file(&"x".repeat(NAME_LEN), Vec::new()).is_err());
    assert!(items.file("a\0b", Vec::new()).is_err());
    assert!(items.file("a", vec![0; MAX_TRANSFER as usize + 1]).is_err());
}

proptest! {
    #[test]
    fn any_accesses_are_survived(
        accesses in prop::collection::vec((any::<bool>(), 0..FW_CFG_LEN, 0usize..4, any::<[u8; 8]>()), 0..64)
    ) {
        let mut device = device();
        for (is_write, offset, width, mut data) in accesses {
            let data = &mut data[..1 << width];
            if is_write { device.write(offset, data) } else { device.read(offset, data) }
        }
        device.dma_high = 0;
        prop_assert_eq!(request(&mut device, u32::from(FIRST_FILE) << 16 | SELECT | READ, 5, BUFFER), 0);
        prop_assert_eq!(buffer(&device, 5), b"first");
    }
}
