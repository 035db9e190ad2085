//! A disk that another node sends: refused, or one that can be read from end to end.
//!
//! Checksums that no mutation would get right are put right here: of the map's only sector, and of the whole.
#![no_main]

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::OnceLock;

use bedplate_api::Digest;
use bedplate_api::image::{ImageKind, Manifest, Part};
use bedplate_images::disk::Disk;
use bedplate_images::index::Index;
use bedplate_images::{CHUNK_SIZE, Store, digest_of};
use libfuzzer_sys::fuzz_target;

/// One sector of the map speaks of up to 2016 clusters of 4096 bytes; the last of these is short.
const SIZE: usize = 2 * CHUNK_SIZE + 512;
const MAP_BODY: usize = 504;

/// A store with one image, whose disk has [`SIZE`] bytes, in a directory of this process.
fn image() -> &'static (PathBuf, Store, Digest) {
    static IMAGE: OnceLock<(PathBuf, Store, Digest)> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("bedplate-fuzz-disk-{}", std::process::id()));
        let store = Store::create(dir.join("store")).expect("a store");
        let chunks = vec![1; SIZE].chunks(CHUNK_SIZE).map(|chunk| store.put_chunk(chunk).expect("a chunk")).collect();
        let index = Index::new(SIZE as u64, chunks).expect("an index");
        let part = Part { size: SIZE as u64, index: store.put_blob(&index.encode()).expect("a blob"), content: 0 };
        let parts = [("disk".to_owned(), part)].into();
        let (boot, firmware, origin, labels) = (None, None, None, Default::default());
        let manifest = Manifest { schema: 1, kind: ImageKind::Disk, parts, boot, firmware, origin, labels };
        let digest = store.put_manifest(&manifest).expect("a manifest");
        (dir, store, digest)
    })
}

fn sum(bytes: &[u8]) -> [u8; 32] {
    *digest_of(bytes).as_bytes()
}

fuzz_target!(|bytes: &[u8]| {
    let (dir, store, image) = image();
    let Some((first, rest)) = bytes.split_first() else { return };
    let mut sent = b"bpdisk1\n".to_vec();
    sent.extend(image.as_bytes());
    sent.extend((SIZE as u64).to_le_bytes());
    if first % 2 == 0 && rest.len() >= MAP_BODY {
        let (map, data) = rest.split_at(MAP_BODY);
        sent.extend(map);
        sent.extend(&sum(&[&0_u64.to_le_bytes(), map].concat())[..8]);
        sent.extend(data);
    } else {
        sent.extend(rest);
    }
    let whole = sum(&sent);
    sent.extend(whole);
    let to = dir.join("disk");
    let mut go_on = |_, _| ControlFlow::Continue(());
    if let Ok(mut disk) = Disk::receive(&mut &sent[..], &to, store, image, &mut go_on) {
        disk.read_at(&mut vec![0; SIZE], 0).expect("a disk that was taken can be read");
        assert!(disk.sent_len() <= sent.len() as u64);
    }
    let _ = std::fs::remove_dir_all(to);
});
