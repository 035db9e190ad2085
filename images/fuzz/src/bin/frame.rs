//! A chunk's frame from the network: accepted only when it is the chunk that it is said to be.
#![no_main]

use bedplate_api::Digest;
use bedplate_images::{digest_of, frame};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut chunk = frame::chunk_buffer();
    let lie = frame::decompress(&Digest::ZERO, bytes, &mut chunk);
    assert!(lie.is_err());
    if let Err(frame::FrameError::Mismatch { found }) = lie {
        let len = frame::decompress(&found, bytes, &mut chunk).expect("its own name is accepted");
        assert_eq!(digest_of(&chunk[..len]), found);
    }
});
