//! Container images with a disk in them, as directories.

use super::*;
use crate::import::container::Layout;
use crate::pack::oci::sha256;

/// A tar archive with these files.
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        // Past what the library would refuse to write.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(bytes.len() as u64);
        header.set_cksum();
        builder.append(&header, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

fn blob(dir: &Path, bytes: &[u8]) -> String {
    let digest = sha256(bytes);
    let path = dir.join("blobs/sha256");
    fs::create_dir_all(&path).unwrap();
    fs::write(path.join(&digest[7..]), bytes).unwrap();
    digest
}

/// A directory with one image of these layers, behind an index that also has one for another machine.
fn layout(dir: &Path, layers: &[Vec<u8>]) -> PathBuf {
    let dir = dir.join("layout");
    let _ = fs::remove_dir_all(&dir);
    let layers: Vec<String> = layers
        .iter()
        .map(|layer| format!(r#"{{"mediaType":"x","digest":"{}","size":{}}}"#, blob(&dir, layer), layer.len()))
        .collect();
    let manifest = format!(r#"{{"schemaVersion":2,"layers":[{}]}}"#, layers.join(","));
    let named = |digest: &str, arch: &str| {
        format!(r#"{{"digest":"{digest}","size":1,"platform":{{"os":"linux","architecture":"{arch}"}}}}"#)
    };
    let arm = named(&sha256(b"none"), "arm64");
    let index = format!(r#"{{"manifests":[{arm},{}]}}"#, named(&blob(&dir, manifest.as_bytes()), "amd64"));
    let outer = format!(r#"{{"manifests":[{{"digest":"{}","size":1}}]}}"#, blob(&dir, index.as_bytes()));
    fs::write(dir.join("oci-layout"), "{}").unwrap();
    fs::write(dir.join("index.json"), outer).unwrap();
    dir
}

fn import_layout(store: &Store, dir: &Path) -> Result<Imported, ImportError> {
    let options = Options { tag: Some("c"), ..Options::default() };
    Layout::find(dir).unwrap().import(store, options, &mut go_on)
}

#[test]
fn the_disk_of_a_container_is_imported_from_its_top_layer() {
    let (dir, store) = store();
    let raw = raw_disk(dir.path());
    let wanted = import(&store, &raw).unwrap().manifest.parts;
    let Some(qcow) = qcow2(&raw, "q", &[]) else { return };
    let (raw, qcow) = (fs::read(&raw).unwrap(), fs::read(&qcow).unwrap());
    let old = archive(&[("disk/old.img", &[1; 1024])]);
    for file in [&raw, &qcow] {
        for name in ["disk/a.img", "./disk/a.img", "/disk/a.img"] {
            let top = archive(&[("etc/x", b"x"), ("disk/.wh.old.img", b"x"), (name, file), ("z", b"z")]);
            let packed = zstd::bulk::compress(&top, 1).unwrap();
            for layer in [top, packed] {
                let dir = layout(dir.path(), &[old.clone(), layer]);
                assert_eq!(import_layout(&store, &dir).unwrap().manifest.parts, wanted, "{name}");
                store.remove_tag("c").unwrap();
            }
        }
    }
}

#[test]
fn hostile_containers_are_refused_and_nothing_gets_a_name() {
    let (dir, store) = store();
    let refused = |dir: &Path, words: &str| {
        let error = import_layout(&store, dir).unwrap_err().to_string();
        assert!(error.contains(words), "{error:?} should say {words:?}");
        assert!(store.tags().unwrap().is_empty());
    };
    for name in ["disk/../etc/shadow", "../disk/a", "disk", "disk/sub/a", "data/disk/a"] {
        refused(&layout(dir.path(), &[archive(&[(name, &[1; 512])])]), "no layer of it has a file");
    }
    let disk = archive(&[("disk/a", &[1; 4096]), ("more", &[2; 100_000])]);
    let damaged = layout(dir.path(), std::slice::from_ref(&disk));
    let layer = damaged.join("blobs/sha256").join(&sha256(&disk)[7..]);
    // In the disk, behind it, and cut off.
    for at in [600, 50_000] {
        let mut bytes = disk.clone();
        bytes[at] ^= 1;
        fs::write(&layer, bytes).unwrap();
        refused(&damaged, "has the digest sha256:");
    }
    fs::write(&layer, &disk[..2000]).unwrap();
    assert!(import_layout(&store, &damaged).is_err());
    let index = damaged.join("index.json");
    let text = fs::read_to_string(&index).unwrap();
    let at = text.find("sha256:").unwrap();
    fs::write(&index, text.replace(&text[at..at + 20], "sha256:../../../../x")).unwrap();
    refused(&damaged, "is not a SHA-256 digest");
    fs::write(&index, "{").unwrap();
    refused(&damaged, "cannot be read");
    let other =
        format!(r#"{{"digest":"{}","size":1,"platform":{{"os":"windows","architecture":"amd64"}}}}"#, sha256(b""));
    fs::write(&index, format!(r#"{{"manifests":[{other}]}}"#)).unwrap();
    refused(&damaged, "no image for linux/amd64");
    // An index that names itself has no digest that fits; a chain of them is cut.
    let mut inner = blob(&damaged, br#"{"layers":[]}"#);
    for _ in 0..4 {
        inner = blob(&damaged, format!(r#"{{"manifests":[{{"digest":"{inner}"}}]}}"#).as_bytes());
    }
    fs::write(&index, format!(r#"{{"manifests":[{{"digest":"{inner}"}}]}}"#)).unwrap();
    refused(&damaged, "more than any image needs");
}
