//! The checks of a qcow2 header, and the telling of formats.
#![no_main]

use bedplate_images::import::format::detect;
use bedplate_images::import::qcow2::Header;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = Header::parse(bytes);
    let _ = detect(bytes, bytes);
});
