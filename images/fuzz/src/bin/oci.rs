//! OCI manifests, and indexes as registries have them: no more comes out than was asked for.
#![no_main]

use bedplate_images::index::index_len;
use bedplate_images::pack::oci::{Artifact, unpack_index};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = Artifact::parse(bytes);
    let size = 1 << 20;
    if let Ok(index) = unpack_index(bytes, "disk", size) {
        assert_eq!(index.len() as u64, index_len(size));
    }
});
