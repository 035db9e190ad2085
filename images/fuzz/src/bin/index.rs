//! An index that is accepted is written back as the same bytes.
#![no_main]

use bedplate_images::index::Index;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(index) = Index::parse(bytes) {
        assert_eq!(index.encode(), bytes);
    }
});
