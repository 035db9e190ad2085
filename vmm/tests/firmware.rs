//! Starting at the reset vector, with firmware of a few instructions.

// A panic is how a test reports.
#![allow(clippy::unwrap_used)]

mod rig;

use bedplate_api::vmm::ExitReason;
use rig::{Rig, Running, SPIN, has_kvm};

const LEN: usize = 64 << 10;
/// The last 16 bytes: `jmp 0xf000:0`, into the copy below 1 MiB.
const RESET_VECTOR: [u8; 5] = [0xea, 0, 0, 0, 0xf0];
/// Writes a byte into that copy and says what is there then; says the first letter of the configuration device's signature;
/// resets by the chipset's register.
#[rustfmt::skip]
const CODE: [u8; 37] = [
    0x2e, 0xc6, 0x06, 0x00, 0x01, b'w', // mov byte cs:[0x100], 'w'
    0x2e, 0xa0, 0x00, 0x01,             // mov al, cs:[0x100]
    0xba, 0xf8, 0x03, 0xee,             // mov dx, 0x3f8; out dx, al
    0xba, 0x10, 0x05,                   // mov dx, 0x510
    0x31, 0xc0, 0xef,                   // xor ax, ax; out dx, ax
    0x42, 0xec,                         // inc dx; in al, dx
    0xba, 0xf8, 0x03, 0xee,             // mov dx, 0x3f8; out dx, al
    0xba, 0xf9, 0x0c,                   // mov dx, 0xcf9
    0xb0, 0x02, 0xee,                   // mov al, 2; out dx, al
    0xb0, 0x06, 0xee,                   // mov al, 6; out dx, al
    0xeb, 0xfe,                         // jmp $
];

#[test]
fn firmware_runs_from_the_reset_vector_and_in_ram_below_1_mib() {
    if !has_kvm() {
        return;
    }
    let rig = Rig::new(&[&SPIN]);
    let mut rom = vec![0xf4; LEN];
    rom[..CODE.len()].copy_from_slice(&CODE);
    rom[LEN - 16..LEN - 11].copy_from_slice(&RESET_VECTOR);
    std::fs::write(rig.path("rom"), rom).unwrap();
    let text = format!(r#"{{"boot-source": {{"firmware_path": {:?}}}}}"#, rig.path("rom"));
    std::fs::write(rig.path("config"), text).unwrap();
    let mut process = Running(rig.command().arg("--config-file").arg(rig.path("config")).spawn().unwrap());
    assert_eq!(process.wait(), 0, "{:?}", rig.exit());
    assert_eq!(rig.exit().reason, ExitReason::GuestReset);
    assert_eq!(std::fs::read_to_string(rig.path("log")).unwrap(), "wQ");
}
