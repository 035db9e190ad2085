//! A suspended guest out of the files that a snapshot of its VMM left.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bedplate_api::image::{ImageKind, Manifest};

use super::cut::{Holey, put_part};
use super::source::{Bytes, RawSource, Source, open_file};
use super::{
    ImportError, Imported, Input, MAX_IMPORT_SIZE, Progress, check_tag, label_source, need_space, open, publish,
    read_limited,
};
use crate::Store;
use crate::manifest::{DISK, MEMORY, SCHEMA, STATE};

/// Bytes of the state of a machine: registers and queues, of a VM with many devices some megabytes.
const MAX_STATE_LEN: u64 = 64 << 20;

/// Bytes of a page of the guest's memory.
const PAGE: u64 = 4096;

/// Files of a suspended guest.
#[derive(Debug, Clone, Copy)]
pub struct SuspendedFiles<'a> {
    /// Its memory, from address 0 on, without what is no memory; holes are zeros.
    pub memory: &'a Path,
    /// What its VMM wrote of processors and devices.
    pub state: &'a Path,
    /// Its disk at that moment: raw, qcow2 or VMDK.
    pub disk: Option<&'a Path>,
    /// Files elsewhere that the disk may refer to.
    pub allow: &'a [PathBuf],
}

/// Makes an image of a guest that stands still. Of its memory and its disk only chunks are written that the store does not
/// have; `progress` counts both.
pub fn import_suspended(
    store: &Store,
    files: SuspendedFiles<'_>,
    tag: Option<&str>,
    progress: &mut Progress<'_>,
) -> Result<Imported, ImportError> {
    check_tag(tag)?;
    let mut memory = RawSource::new(open_file(files.memory, "the memory of a guest")?, files.memory)?;
    match memory.size() {
        0 => return Err(ImportError::Empty { path: files.memory.to_owned() }),
        size if !size.is_multiple_of(PAGE) => {
            return Err(ImportError::Pages { path: files.memory.to_owned(), size, page: PAGE });
        }
        _ => {}
    }
    let state = read_limited(files.state, "the state of a machine", MAX_STATE_LEN)?;
    let mut disk = files.disk.map(|path| unpacked(path, files.allow)).transpose()?;
    let total = memory.size() + disk.as_ref().map_or(0, |disk| disk.size());
    if total > MAX_IMPORT_SIZE {
        return Err(ImportError::TooLarge { path: files.memory.to_owned(), size: total, most: MAX_IMPORT_SIZE });
    }
    need_space(store, &mut memory)?;
    if let Some(disk) = &mut disk {
        need_space(store, &mut **disk)?;
    }
    let _lease = store.lease()?;
    let (mut parts, mut counts, mut before) = (BTreeMap::new(), (0, 0), 0);
    let mut put = |name: &str, source: &mut dyn Source, path: &Path| {
        let size = source.size();
        let mut told = |done, _| progress(before + done, total.max(before + done));
        let stopped = || ImportError::Stopped { path: path.to_owned() };
        let kept = put_part(store, &mut Holey::new(source), &mut told, stopped)?;
        before += size;
        counts = (counts.0 + kept.chunks, counts.1 + kept.reused);
        parts.insert(name.to_owned(), kept.part);
        Ok::<_, ImportError>(())
    };
    put(MEMORY, &mut memory, files.memory)?;
    if let (Some(disk), Some(path)) = (&mut disk, files.disk) {
        put(DISK, &mut **disk, path)?;
    }
    put(STATE, &mut Bytes(&state), files.state)?;
    let mut labels = BTreeMap::new();
    label_source(&mut labels, files.memory);
    let kind = ImageKind::Suspended;
    let manifest = Manifest { schema: SCHEMA, kind, parts, boot: None, firmware: None, origin: None, labels };
    publish(store, manifest, tag, Vec::new(), counts, files.memory)
}

fn unpacked(path: &Path, allow: &[PathBuf]) -> Result<Box<dyn Source>, ImportError> {
    match open(path, allow)? {
        Input::Disk(source, _) => Ok(source),
        Input::Packed(_, format) => Err(ImportError::PackedPart { path: path.to_owned(), format }),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::ops::ControlFlow;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::export::{Format, export};
    use crate::fixtures::{files as stored, noise, store};
    use crate::import::{Options, import_disk};

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_guest_comes_back_byte_for_byte_and_shares_what_other_images_have() {
        let (dir, store) = store();
        let path = |name: &str| dir.path().join(name);
        let memory = File::create(path("memory")).unwrap();
        memory.set_len(256 * MIB).unwrap();
        memory.write_all_at(&noise(1, 100_000), 10 * MIB).unwrap();
        memory.write_all_at(&noise(2, 70_000), 255 * MIB).unwrap();
        fs::write(path("state"), noise(3, 5000)).unwrap();
        fs::write(path("disk"), noise(4, 4 << 20)).unwrap();
        let mut go_on = |_, _| ControlFlow::Continue(());
        let options = Options { tag: Some("base"), ..Options::default() };
        import_disk(&store, &path("disk"), options, &mut go_on).unwrap();
        File::options().write(true).open(path("disk")).unwrap().write_all_at(b"since", MIB).unwrap();

        let (memory, state, disk) = (path("memory"), path("state"), path("disk"));
        let files = SuspendedFiles { memory: &memory, state: &state, disk: Some(&disk), allow: &[] };
        let mut told = Vec::new();
        let mut progress = |done, total| {
            told.push((done, total));
            ControlFlow::Continue(())
        };
        let chunks = stored(&store.dir().join("chunks")).len();
        let made = import_suspended(&store, files, Some("asleep"), &mut progress).unwrap();
        // Four of the memory, one of the state, and one of the disk, of which all others are there.
        assert_eq!(stored(&store.dir().join("chunks")).len() - chunks, 4 + 1 + 1);
        assert!(told.is_sorted() && told.iter().all(|(done, total)| done <= total), "{told:?}");
        let summary = store.summary("asleep").unwrap();
        assert_eq!((summary.kind, summary.direct_boot), (ImageKind::Suspended, false));
        assert_eq!(summary.size, 260 * MIB + 5000);
        for (part, from) in [(MEMORY, &memory), (STATE, &state), (DISK, &disk)] {
            let out = path(&format!("{part}.out"));
            export(&store, &made.digest, part, &out, Format::Raw, &mut |_, _| {}).unwrap();
            assert!(fs::read(&out).unwrap() == fs::read(from).unwrap(), "{part}");
        }
        // Without a disk it is another image.
        let alone = SuspendedFiles { disk: None, ..files };
        let alone = import_suspended(&store, alone, None, &mut go_on).unwrap();
        assert_eq!(alone.manifest.parts.keys().collect::<Vec<_>>(), [MEMORY, STATE]);
        assert_eq!(alone.reused, alone.chunks);
    }

    #[test]
    fn files_that_cannot_be_a_guest_are_refused_and_nothing_has_the_name() {
        let (dir, store) = store();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("page"), noise(1, 4096)).unwrap();
        fs::write(path("odd"), noise(1, 4097)).unwrap();
        fs::write(path("none"), "").unwrap();
        fs::write(path("packed"), [0x1f, 0x8b, 8, 0]).unwrap();
        File::create(path("long")).unwrap().set_len(MAX_STATE_LEN + 1).unwrap();
        let none = path("none");
        let said = |memory: &str, state: &str, disk: Option<&str>| {
            let (memory, state, disk) = (path(memory), path(state), disk.map(path));
            let files = SuspendedFiles { memory: &memory, state: &state, disk: disk.as_deref(), allow: &[] };
            let mut go_on = |_, _| ControlFlow::Continue(());
            import_suspended(&store, files, Some("asleep"), &mut go_on).unwrap_err().to_string()
        };
        assert!(said("odd", "page", None).contains("4097 bytes, which is no multiple of 4096"));
        assert!(said("none", "page", None).contains(none.to_str().unwrap()));
        assert!(said("page", "none", None).contains(none.to_str().unwrap()));
        assert!(said("page", "long", None).contains("the state of a machine"));
        assert!(said("page", "nowhere", None).contains("nowhere"));
        assert!(said("page", "page", Some("packed")).contains("unpack"), "{}", said("page", "page", Some("packed")));
        assert!(store.tag("asleep").is_err());
    }
}
