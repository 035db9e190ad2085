//! GRUB's configuration and a boot loader entry.
#![no_main]

use bedplate_images::boot::{bls, grub};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let (config, env) = text.split_once('\0').unwrap_or((&text, ""));
    for entry in grub::entries(config, env) {
        assert!(!entry.kernel.is_empty() && !entry.kernel.contains('$'));
    }
    let _ = bls::parse(&text);
});
