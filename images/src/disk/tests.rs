use proptest::prelude::*;

use super::*;
use crate::CHUNK_SIZE;
use crate::fixtures::{files, flip, image, noise, store};

/// Not a multiple of a chunk, nor of a cluster.
const SIZE: usize = 3 * CHUNK_SIZE + 4096 + 777;

/// The first and the last chunk have content, the second is zeros.
fn content() -> Vec<u8> {
    let mut bytes = noise(1, SIZE);
    bytes[CHUNK_SIZE..2 * CHUNK_SIZE].fill(0);
    bytes
}

fn read_all(disk: &mut Disk) -> Vec<u8> {
    let mut bytes = vec![0xee; disk.size() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[derive(Debug, Clone)]
enum Op {
    Write(usize, Vec<u8>),
    Zero(usize, usize),
    Read(usize, usize),
    Flush,
    Reopen,
}

fn op(size: usize) -> impl Strategy<Value = Op> {
    // Offsets near cluster and chunk boundaries as well as anywhere.
    let at = prop_oneof![0..size, (0..size / 4096).prop_map(|c| c * 4096), Just(0), Just(size - 1)];
    let range = (at, prop_oneof![0..9000_usize, Just(4096), Just(CHUNK_SIZE)])
        .prop_map(move |(at, len)| (at, len.min(size - at)));
    prop_oneof![
        4 => (range.clone(), any::<u8>()).prop_map(|((at, len), fill)| Op::Write(at, vec![fill; len])),
        2 => range.clone().prop_map(|(at, len)| Op::Zero(at, len)),
        2 => range.prop_map(|(at, len)| Op::Read(at, len)),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_disk_is_its_model(ops in prop::collection::vec(op(SIZE), 1..40)) {
        let (dir, store) = store();
        let mut model = content();
        let image = image(&store, &model);
        let path = dir.path().join("disk");
        let mut disk = Disk::create(&path, &store, &image, Mode::Persistent).unwrap();
        for op in ops {
            match op {
                Op::Write(at, bytes) => {
                    disk.write_at(&bytes, at as u64).unwrap();
                    model[at..at + bytes.len()].copy_from_slice(&bytes);
                }
                Op::Zero(at, len) => {
                    disk.write_zeroes(at as u64, len as u64).unwrap();
                    model[at..at + len].fill(0);
                }
                Op::Read(at, len) => {
                    let mut bytes = vec![0xee; len];
                    disk.read_at(&mut bytes, at as u64).unwrap();
                    prop_assert!(bytes == model[at..at + len]);
                }
                Op::Flush => disk.flush().unwrap(),
                Op::Reopen => {
                    drop(disk);
                    disk = Disk::open(&path).unwrap();
                }
            }
        }
        prop_assert!(read_all(&mut disk) == model);
    }
}

// ---- the directory --------------------------------------------------------------------------------------------------

#[test]
fn one_process_at_a_time_and_clear_words_for_the_rest() {
    let (dir, store) = store();
    let image = image(&store, &content());
    let path = dir.path().join("disk");
    assert!(matches!(Disk::open(&path), Err(DiskError::NotADisk { .. })));
    // A creation that was cut off before disk.json is no obstacle.
    fs::create_dir(&path).unwrap();
    fs::write(path.join("data"), "rubbish").unwrap();
    assert!(matches!(Disk::open(&path), Err(DiskError::NotADisk { .. })));
    let mut disk = Disk::create(&path, &store, &image, Mode::Persistent).unwrap();
    let error = Disk::open(&path).unwrap_err();
    assert!(matches!(error, DiskError::InUse { .. }) && error.to_string().contains("stop the VM"), "{error}");
    assert!(read_all(&mut disk) == content());
    assert_eq!(disk.read_at(&mut [0; 2], SIZE as u64 - 1).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(disk.write_at(&[0], u64::MAX).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(disk.discard(1, u64::MAX).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    drop(disk);
    assert!(matches!(Disk::create(&path, &store, &image, Mode::Persistent), Err(DiskError::Exists { .. })));
    Disk::open(&path).unwrap();
}

#[test]
fn non_persistent_disks_start_from_the_image() {
    let (dir, store) = store();
    let image = image(&store, &content());
    let path = dir.path().join("disk");
    let mut disk = Disk::create(&path, &store, &image, Mode::NonPersistent).unwrap();
    disk.write_at(&[9; 10_000], 50_000).unwrap();
    disk.flush().unwrap();
    assert_eq!(disk.written(), 3 * CLUSTER);
    drop(disk);
    let mut disk = Disk::open(&path).unwrap();
    assert!(read_all(&mut disk) == content());
    disk.write_at(&[9], 0).unwrap();
    disk.reset().unwrap();
    assert!(read_all(&mut disk) == content());
}

#[test]
fn discard_gives_space_back() {
    use std::os::unix::fs::MetadataExt;
    let (dir, store) = store();
    let image = image(&store, &content());
    let path = dir.path().join("disk");
    let mut disk = Disk::create(&path, &store, &image, Mode::Persistent).unwrap();
    disk.write_at(&noise(2, SIZE), 0).unwrap();
    disk.flush().unwrap();
    let used = || fs::metadata(path.join("data")).unwrap().blocks() * 512;
    assert!(used() >= SIZE as u64);
    disk.discard(0, SIZE as u64).unwrap();
    disk.flush().unwrap();
    assert!(used() < CLUSTER * 2, "{} bytes still in use", used());
    assert!(read_all(&mut disk).iter().all(|b| *b == 0));
    assert_eq!(disk.written(), 0);
}

#[test]
fn damaged_and_missing_chunks_are_errors_that_name_them() {
    let (dir, store) = store();
    let image = image(&store, &content());
    let path = dir.path().join("disk");
    let mut disk = Disk::create(&path, &store, &image, Mode::Persistent).unwrap();
    let chunks = files(&store.dir().join("chunks"));
    for chunk in &chunks {
        flip(chunk, 200);
    }
    let mut bytes = [0; 16];
    let error = disk.read_at(&mut bytes, 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(error.to_string().contains("part \"disk\", chunk 0"), "{error}");
    assert_eq!(disk.read_at(&mut bytes, 0).unwrap_err().kind(), io::ErrorKind::NotFound, "set aside: now missing");
    disk.read_at(&mut bytes, CHUNK_SIZE as u64).unwrap();
    // A whole cluster written needs nothing from the base; a part of one does.
    disk.write_at(&[5; 4096], 0).unwrap();
    assert!(disk.write_at(&[5], 5000).is_err());
    disk.read_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [5; 16]);
}

#[test]
fn what_is_missing_is_named_and_the_same_request_fares_better_once_it_is_here() {
    const C: usize = CLUSTER as usize;
    let (dir, whole) = store();
    let bytes = noise(7, 6 * CHUNK_SIZE);
    let image = image(&whole, &bytes);
    let part = whole.manifest(&image).unwrap().parts[DISK].clone();
    // A store with everything but the chunks.
    let store = Store::create(dir.path().join("partial")).unwrap();
    store.put_blob(&whole.blob(&part.index).unwrap()).unwrap();
    store.put_blob(&whole.blob(&image).unwrap()).unwrap();
    let mut disk = Disk::create(&dir.path().join("disk"), &store, &image, Mode::Persistent).unwrap();
    let bring = |number: u64| {
        let digest = whole.part(&image, DISK).unwrap().digest(number).unwrap();
        store.put_frame(&digest, &whole.frame(&digest).unwrap()).unwrap();
    };
    let lacks = |result: io::Result<()>| Disk::lacks_chunk(&result.unwrap_err());
    disk.note_loads(true);
    let (mut read, chunk) = (vec![0; 3 * CHUNK_SIZE], CHUNK_SIZE as u64);
    assert_eq!(lacks(disk.read_at(&mut read, chunk)), Some(1));
    assert_eq!(disk.missing(chunk, 3 * chunk, 64).unwrap(), [1, 2, 3]);
    assert_eq!(disk.missing(chunk, 3 * chunk, 2).unwrap(), [1, 2]);
    // What is written whole is not needed any more; a cluster in the middle leaves both ends.
    disk.write_at(&vec![9; CHUNK_SIZE], 2 * chunk).unwrap();
    disk.write_at(&[9; C], 3 * chunk + C as u64).unwrap();
    assert_eq!(disk.missing(chunk, 3 * chunk, 64).unwrap(), [1, 3]);
    assert_eq!(lacks(disk.write_at(&[9], 5 * chunk)), Some(5), "a part of a cluster needs the rest of it");
    bring(1);
    assert_eq!(lacks(disk.read_at(&mut read, chunk)), Some(3));
    bring(3);
    disk.read_at(&mut read, chunk).unwrap();
    let mut expected = bytes[CHUNK_SIZE..4 * CHUNK_SIZE].to_vec();
    expected[CHUNK_SIZE..2 * CHUNK_SIZE].fill(9);
    expected[2 * CHUNK_SIZE + C..][..C].fill(9);
    assert!(read == expected);
    assert_eq!(disk.take_loaded(), [1, 3]);
    assert!(disk.take_loaded().is_empty());
    let past = disk.read_at(&mut read, 6 * chunk).unwrap_err();
    assert_eq!(Disk::lacks_chunk(&past), None);
}

#[test]
fn damage_to_each_file_of_the_directory_is_found_at_open() {
    let (dir, store) = store();
    let image = image(&store, &content());
    let path = dir.path().join("disk");
    let mut disk = Disk::create(&path, &store, &image, Mode::Persistent).unwrap();
    disk.write_at(&[1; 100], 0).unwrap();
    drop(disk);
    let refused = |name: &str, damage: &dyn Fn(&Path)| {
        let file = path.join(name);
        let whole = fs::read(&file).unwrap();
        damage(&file);
        let error = Disk::open(&path).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        fs::write(&file, whole).unwrap();
        Disk::open(&path).unwrap();
    };
    refused("map", &|file| flip(file, 0));
    refused("map", &|file| flip(file, 511 * 8));
    refused("map", &|file| fs::write(file, "").unwrap());
    refused("data", &|file| fs::File::options().write(true).open(file).unwrap().set_len(5).unwrap());
    refused("disk.json", &|file| fs::write(file, "{}").unwrap());
    refused("disk.json", &|file| fs::write(file, "").unwrap());
    let spec = fs::read_to_string(path.join("disk.json")).unwrap();
    refused("disk.json", &|file| fs::write(file, spec.replace("\"schema\": 1", "\"schema\": 2")).unwrap());
    refused("disk.json", &|file| fs::write(file, spec.replace("4096", "512")).unwrap());
    refused("disk.json", &|file| fs::write(file, spec.replace(&SIZE.to_string(), "5")).unwrap());
}
