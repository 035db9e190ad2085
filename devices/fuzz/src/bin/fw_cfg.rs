//! Any firmware: accesses to the ports, and requests that lie in memory. Afterwards the device must still say who it is.
#![no_main]

use bedplate_devices::bus::BusDevice;
use bedplate_devices::platform::{FW_CFG_LEN, FwCfg, FwCfgItems, FwCfgKey};
use bedplate_devices::testing::Machine;
use vm_memory::{Bytes, GuestAddress};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let machine = Machine::new();
    let mut items = FwCfgItems::new();
    items.number(FwCfgKey::Cpus, 1);
    items.file("etc/file", vec![1; 300]).expect("the name is short");
    let mut device = FwCfg::new(items, &machine.memory);
    for step in bytes.chunks_exact(20) {
        let (kind, width, rest) = (step[0] % 4, 1 << (step[1] % 4), &step[2..]);
        let mut data = [0; 8];
        data.copy_from_slice(&rest[10..]);
        match kind {
            0 => device.write(u64::from(rest[0]) % FW_CFG_LEN, &data[..width]),
            1 => device.read(u64::from(rest[0]) % FW_CFG_LEN, &mut data[..width]),
            // A request at any place in the first 64 KiB, with any bytes; then it is made.
            _ => {
                let at = u16::from_le_bytes([rest[0], rest[1]]);
                machine.memory.write_slice(&rest[2..], GuestAddress(at.into())).expect("it is RAM");
                device.write(8, &u32::from(at).to_be_bytes());
            }
        }
    }
    device.write(0, &[0, 0]);
    let mut signature = [[0]; 4];
    signature.iter_mut().for_each(|byte| device.read(1, byte));
    assert_eq!(signature.concat(), b"QEMU");
});
