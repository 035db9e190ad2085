use std::fs;
use std::time::{Duration, SystemTime};

use bedplate_api::Digest;

use super::*;
use crate::fixtures::{files, flip, image, noise, part, store};
use crate::frame::{self, CHUNK_SIZE};

fn chunk_files(store: &Store) -> Vec<PathBuf> {
    files(&store.dir().join("chunks"))
}

#[test]
fn open_wants_a_store_of_its_own_version() {
    let (dir, store) = store();
    assert!(Store::open(store.dir()).is_ok());
    assert!(Store::create(store.dir()).is_ok(), "creating twice is opening");
    assert!(matches!(Store::open(dir.path()), Err(StoreError::NotAStore { .. })));
    fs::write(store.dir().join("format"), "bedplate-images 2\n").unwrap();
    let error = Store::create(store.dir()).unwrap_err().to_string();
    assert!(error.contains("bedplate-images 2") && error.contains("update"), "{error}");
}

#[test]
fn a_store_is_made_in_an_empty_directory_or_where_its_making_broke_off() {
    let dir = tempfile::tempdir().unwrap();
    // Each step of making one, then lost+found, which a new file system has.
    for name in ["blobs", "chunks", "tags", "tmp", "lost+found", "trust"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    fs::write(dir.path().join("tmp/.77-0.tmp"), "bedpl").unwrap();
    Store::create(dir.path()).unwrap();
    Store::create(dir.path()).unwrap();
    for foreign in ["notes.txt", "tags/mine", "tmp/mine", "blobs/.77-0.tmp"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(foreign);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
        let before = fs::read_dir(dir.path()).unwrap().count();
        let error = Store::create(dir.path()).unwrap_err().to_string();
        assert!(error.contains(foreign) && error.contains("name another directory"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), before, "nothing is added");
    }
    let file = dir.path().join("format");
    for bad in [Path::new("/proc/x"), &file, &file.join("store")] {
        let error = Store::create(bad).unwrap_err();
        assert!(matches!(error, StoreError::NotMade { .. }), "{error}");
        assert!(error.to_string().contains("name another one"), "{error}");
    }
}

#[test]
fn chunks_are_kept_once_zeros_never() {
    let (_dir, store) = store();
    let plain = noise(1, CHUNK_SIZE);
    let digest = store.put_chunk(&plain).unwrap();
    let file = &chunk_files(&store)[0];
    let written = fs::metadata(file).unwrap().modified().unwrap();
    assert_eq!(store.put_chunk(&plain).unwrap(), digest);
    assert_eq!(fs::metadata(file).unwrap().modified().unwrap(), written, "not written again");
    assert_eq!(store.put_chunk(&[0; CHUNK_SIZE]).unwrap(), Digest::ZERO);
    assert_eq!(chunk_files(&store).len(), 1);
    let mut out = frame::chunk_buffer();
    assert_eq!(store.read_chunk(&digest, &mut out).unwrap(), CHUNK_SIZE);
    assert_eq!(out[..], plain[..]);
}

#[test]
fn a_damaged_chunk_is_named_set_aside_and_healed() {
    let (_dir, store) = store();
    let digest = image(&store, &noise(1, 3 * CHUNK_SIZE));
    store.set_tag("a", &digest).unwrap();
    store.verify(&digest).unwrap();
    let path = chunk_files(&store).remove(0);
    let whole = fs::read(&path).unwrap();
    flip(&path, 8 * 1000);

    let error = store.verify(&digest).unwrap_err();
    let text = error.to_string();
    for part in [&digest.to_string(), "part \"disk\"", "chunk ", path.to_str().unwrap(), "again"] {
        assert!(text.contains(part), "{text:?} should name {part:?}");
    }
    assert!(error.is_missing());
    assert!(!path.exists(), "set aside");
    let name: Digest = format!("blake3:{}", path.file_name().unwrap().to_str().unwrap()).parse().unwrap();
    assert_eq!(store.missing(&[name, Digest::ZERO, name]), [name]);
    assert!(matches!(store.set_tag("b", &digest), Err(StoreError::Incomplete { chunks: 1, .. })));
    assert!(matches!(store.read_chunk(&name, &mut frame::chunk_buffer()), Err(StoreError::ChunkMissing { .. })));

    store.put_frame(&name, &whole).unwrap();
    store.verify(&digest).unwrap();
}

#[test]
fn a_chunk_file_of_no_length_counts_as_missing() {
    let (_dir, store) = store();
    let digest = store.put_chunk(b"x").unwrap();
    fs::write(&chunk_files(&store)[0], "").unwrap();
    assert_eq!(store.missing(&[digest]), [digest]);
    assert_eq!(store.put_chunk(b"x").unwrap(), digest);
    assert_eq!(store.missing(&[digest]), []);
}

#[test]
fn frames_from_outside_are_verified_before_they_are_kept() {
    let (_dir, store) = store();
    let frame = frame::compress(b"content").unwrap();
    let wrong = Digest::from_bytes([3; 32]);
    let error = store.put_frame(&wrong, &frame).unwrap_err();
    assert!(matches!(error, StoreError::FrameRefused { .. }) && error.to_string().contains("again"));
    assert!(store.put_frame(&wrong, &frame::compress(&vec![0; 1 << 28]).unwrap()).is_err());
    assert_eq!(files(store.dir()).len(), 1, "only the version file: {:?}", files(store.dir()));
    store.put_frame(&crate::digest_of(b"content"), &frame).unwrap();
    assert_eq!(store.frame(&crate::digest_of(b"content")).unwrap(), frame);
}

#[test]
fn a_chunk_goes_out_as_it_is_stored_and_is_found_damaged_where_it_lands_and_here() {
    let ((_dir, store), (_there_dir, there)) = (store(), store());
    let digest = store.put_chunk(&noise(1, CHUNK_SIZE)).unwrap();
    let mut wire = b"before".to_vec();
    store.append_frame(&digest, &mut wire).unwrap();
    assert_eq!(wire, [b"before", &store.frame(&digest).unwrap()[..]].concat());
    store.check_chunk(&digest).unwrap();

    let path = chunk_files(&store).remove(0);
    let whole = fs::read(&path).unwrap();
    let damages: [fn(&Path); 3] = [
        |path| flip(path, 8 * 1000),
        |path| fs::write(path, b"short").unwrap(),
        |path| fs::File::options().write(true).open(path).unwrap().set_len(10 << 20).unwrap(),
    ];
    for damage in damages {
        damage(&path);
        let mut wire = Vec::with_capacity(1 << 20);
        store.append_frame(&digest, &mut wire).unwrap();
        assert!(wire.len() <= frame::MAX_FRAME_LEN + 1, "{}", wire.len());
        assert!(matches!(there.put_frame(&digest, &wire), Err(StoreError::FrameRefused { .. })));
        assert!(chunk_files(&there).is_empty());
        let error = store.check_chunk(&digest).unwrap_err();
        assert!(matches!(error, StoreError::ChunkCorrupt { .. }), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()) && !path.exists(), "{error}");
        assert!(matches!(store.check_chunk(&digest), Err(StoreError::ChunkMissing { .. })));
        assert!(matches!(store.append_frame(&digest, &mut wire), Err(StoreError::ChunkMissing { .. })));
        store.put_frame(&digest, &whole).unwrap();
    }
}

#[test]
fn damaged_blobs_are_found_and_replaced() {
    let (_dir, store) = store();
    let digest = store.put_blob(b"some bytes").unwrap();
    assert!(matches!(store.put_blob_as(&digest, b"other"), Err(StoreError::BlobRefused { .. })));
    let path = files(&store.dir().join("blobs")).remove(0);
    flip(&path, 3);
    assert!(matches!(store.blob(&digest), Err(StoreError::BlobCorrupt { .. })));
    assert!(!store.has_blob(&digest));
    store.put_blob_as(&digest, b"some bytes").unwrap();
    flip(&path, 3);
    store.put_blob(b"some bytes").unwrap();
    assert_eq!(store.blob(&digest).unwrap(), b"some bytes", "putting heals what nobody had read yet");
}

#[test]
fn indexes_are_verified_and_must_fit_their_part() {
    let (_dir, store) = store();
    let part = part(&store, &noise(1, CHUNK_SIZE + 1));
    let path = store.content_path("blobs", &part.index);
    let whole = fs::read(&path).unwrap();
    for size in [0, 1, part.size - 1, part.size + CHUNK_SIZE as u64] {
        let lie = bedplate_api::image::Part { size, ..part.clone() };
        assert!(matches!(store.index(&lie), Err(StoreError::IndexSize { .. })), "{size}");
    }
    for bad in [&whole[..40], &[&whole[..], b"x"].concat(), b""] {
        fs::write(&path, bad).unwrap();
        assert!(matches!(store.index(&part), Err(StoreError::BlobCorrupt { .. })), "{}", bad.len());
        fs::write(&path, &whole).unwrap();
    }
    flip(&path, 8 * 50);
    assert!(matches!(store.index(&part), Err(StoreError::BlobCorrupt { .. })));
    assert!(matches!(store.index(&part), Err(StoreError::BlobMissing { .. })), "set aside");
}

#[test]
fn a_chunk_in_a_place_of_another_length_is_refused() {
    let (_dir, store) = store();
    let short = store.put_chunk(b"short").unwrap();
    let index = crate::index::Index::new(CHUNK_SIZE as u64 * 2, vec![short, Digest::ZERO]).unwrap();
    let part =
        bedplate_api::image::Part { size: index.size(), index: store.put_blob(&index.encode()).unwrap(), content: 5 };
    let manifest = bedplate_api::image::Manifest {
        schema: 1,
        kind: bedplate_api::image::ImageKind::Disk,
        parts: [("disk".to_owned(), part)].into(),
        boot: None,
        firmware: None,
        origin: None,
        labels: Default::default(),
    };
    let image = store.put_manifest(&manifest).unwrap();
    let error = store.materialise(&image, "disk", &store.dir().join("out")).unwrap_err().to_string();
    assert!(error.contains("has 5 bytes and its place in the part 65536"), "{error}");
}

#[test]
fn tags_name_complete_images_only() {
    let (_dir, store) = store();
    let digest = image(&store, &noise(1, 100));
    assert!(matches!(store.set_tag("../x", &digest), Err(StoreError::TagName(_))));
    assert!(matches!(store.set_tag("x", &Digest::from_bytes([9; 32])), Err(StoreError::BlobMissing { .. })));
    store.set_tag("x", &digest).unwrap();
    store.set_tag("a", &digest).unwrap();
    assert_eq!(store.resolve("x").unwrap(), digest);
    assert_eq!(store.resolve(&digest.to_string()).unwrap(), digest);
    assert_eq!(store.summary("x").unwrap().size, 100);
    assert_eq!(store.tags().unwrap(), [("a".to_owned(), digest), ("x".to_owned(), digest)]);
    store.remove_tag("x").unwrap();
    assert!(matches!(store.resolve("x"), Err(StoreError::TagMissing { .. })));
    assert!(matches!(store.remove_tag("x"), Err(StoreError::TagMissing { .. })));
    for garbage in ["", "blake3:00", "\u{fffd}"] {
        fs::write(store.dir().join("tags/bad"), garbage).unwrap();
        assert!(matches!(store.tag("bad"), Err(StoreError::TagCorrupt { .. })));
    }
    fs::create_dir(store.dir().join("tags/dir")).unwrap();
    let names = |store: &Store| store.each_tag().unwrap().into_iter().map(|(n, d)| (n, d.ok())).collect::<Vec<_>>();
    let bad = |name: &str| (name.to_owned(), None);
    assert_eq!(names(&store), [("a".to_owned(), Some(digest)), bad("bad"), bad("dir")]);
    assert!(matches!(store.tags(), Err(StoreError::TagCorrupt { .. })));
    let error = store.gc(&[], Duration::ZERO).unwrap_err().to_string();
    assert!(error.contains("`bedplate image rm bad --store "), "{error}");
    store.remove_tag("bad").unwrap();
    store.remove_tag("dir").unwrap();
    assert_eq!(store.tags().unwrap(), [("a".to_owned(), digest)]);
}

#[test]
fn the_beginning_of_a_digest_stands_for_a_tagged_image() {
    let (_dir, store) = store();
    let [one, two, untagged] = [1, 2, 3].map(|seed| image(&store, &noise(seed, 100)));
    store.set_tag("one", &one).unwrap();
    store.set_tag("again", &one).unwrap();
    store.set_tag("two", &two).unwrap();
    fs::write(store.dir().join("tags/bad"), "garbage").unwrap();
    for name in [one.short(), format!("blake3:{}", one.short()), one.hex()[..40].to_owned(), one.hex()] {
        assert_eq!(store.resolve(&name).unwrap(), one, "{name}");
        assert_eq!(store.summary(&name).unwrap().digest, one);
    }
    for name in [&one.hex()[..11], &untagged.short(), &format!("blake3:{}", untagged.short())] {
        let error = store.resolve(name).unwrap_err();
        assert!(matches!(error, StoreError::TagMissing { .. }), "{error}");
    }
    // No two digests are known that begin alike; a tag may name any.
    let twin = format!("blake3:{}{}", one.short(), "0".repeat(52));
    fs::write(store.dir().join("tags/twin"), &twin).unwrap();
    let error = store.resolve(&one.short()).unwrap_err().to_string();
    assert!(error.contains("more than one") && error.contains(&twin) && error.contains(&one.to_string()), "{error}");
    assert_eq!(store.resolve(&one.hex()[..40]).unwrap(), one);
    store.set_tag(&one.short(), &two).unwrap();
    assert_eq!(store.resolve(&one.short()).unwrap(), two, "names win");
}

#[test]
fn gc_keeps_what_tags_and_live_roots_need() {
    let (_dir, store) = store();
    let [tagged, live, gone] = [1, 2, 3].map(|seed| image(&store, &noise(seed, 2 * CHUNK_SIZE)));
    store.set_tag("keep", &tagged).unwrap();
    let lease = store.lease().unwrap();
    assert!(matches!(store.gc(&[], Duration::ZERO), Err(StoreError::Busy { .. })));
    drop(lease);
    assert_eq!(store.gc(&[live], Duration::from_secs(3600)).unwrap().removed, 0, "everything is young");
    assert_eq!(store.gc(&[live], Duration::ZERO).unwrap().removed, 4, "manifest, index, two chunks");
    store.verify(&tagged).unwrap();
    store.verify(&live).unwrap();
    assert!(matches!(store.verify(&gone), Err(StoreError::BlobMissing { .. })));
    assert!(matches!(store.gc(&[gone], Duration::ZERO), Err(StoreError::BlobMissing { .. })), "unknown root");
    store.verify(&tagged).unwrap();
}

#[test]
fn gc_takes_old_drafts_only() {
    let (_dir, store) = store();
    let old = store.dir().join("tmp/.1-1.tmp");
    let file = fs::File::create(&old).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(2 * 60 * 60)).unwrap();
    let young = store.draft().unwrap();
    assert_eq!(store.gc(&[], Duration::ZERO).unwrap().removed, 1);
    assert!(!old.exists() && young.path().exists());
    let path = young.path().to_owned();
    drop(young);
    assert!(!path.exists(), "an unpublished draft goes with its owner");
}

#[test]
fn materialise_writes_a_sparse_verified_file_or_none() {
    use std::os::unix::fs::MetadataExt;
    let (dir, store) = store();
    let mut bytes = noise(1, 20 * CHUNK_SIZE + 77);
    bytes[CHUNK_SIZE..19 * CHUNK_SIZE].fill(0);
    let digest = image(&store, &bytes);
    let out = dir.path().join("out");
    store.materialise(&digest, "disk", &out).unwrap();
    assert!(fs::read(&out).unwrap() == bytes);
    assert!(fs::metadata(&out).unwrap().blocks() * 512 < 6 * CHUNK_SIZE as u64, "holes stay holes");
    assert!(store.materialise(&digest, "kernel", &out).unwrap_err().to_string().contains("no part \"kernel\""));

    fs::remove_file(&out).unwrap();
    flip(&chunk_files(&store)[0], 99);
    assert!(store.materialise(&digest, "disk", &out).unwrap_err().is_missing());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only the store");
}

#[test]
fn no_room_says_how_much_and_where() {
    let (_dir, store) = store();
    let error = store.need_space("the copy", u64::MAX).unwrap_err();
    assert!(error.is_full());
    let text = error.to_string();
    assert!(text.contains("the copy needs 18446744073709551615 bytes") && text.contains("are free"), "{text}");
}

#[test]
fn threads_may_add_the_same_things_at_once() {
    let (_dir, store) = store();
    let bytes = noise(1, 8 * CHUNK_SIZE);
    std::thread::scope(|scope| {
        for tag in ["a", "b", "c"] {
            let (store, bytes) = (&store, &bytes);
            scope.spawn(move || store.set_tag(tag, &image(store, bytes)).unwrap());
        }
    });
    assert_eq!(chunk_files(&store).len(), 8);
    assert_eq!(fs::read_dir(store.dir().join("tmp")).unwrap().count(), 0);
    store.verify(&store.resolve("c").unwrap()).unwrap();
}
