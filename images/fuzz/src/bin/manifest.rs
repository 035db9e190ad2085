//! A manifest that is accepted can be written, and reads as the same manifest.
#![no_main]

use bedplate_images::manifest::{encode, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(manifest) = parse(bytes) {
        // Compact JSON is never longer than what was read, up to escapes; a manifest at the limit may be refused.
        if let Ok(written) = encode(&manifest) {
            assert_eq!(parse(&written).expect("what was written can be read"), manifest);
        }
    }
});
