//! A disk whose every sector is one of the input's: the chain of logical partitions ends.
#![no_main]

use bedplate_images::boot::mbr::{Mbr, SECTOR};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let (sectors, _) = bytes.as_chunks::<SECTOR>();
    let Some(mut mbr) = sectors.first().and_then(Mbr::parse) else { return };
    let read = |number: u64| Ok::<_, ()>(sectors[number as usize % sectors.len()]);
    mbr.follow(read).expect("reading cannot fail");
    assert!(mbr.entries.len() <= 64);
});
