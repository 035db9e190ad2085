//! Writing a part of an image to a file that other tools read.
//!
//! The file is there whole or not at all, every byte in it was verified, and zeros take no space in it.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bedplate_api::Digest;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Storage, StorageOpenOptions};

use crate::frame::{CHUNK_SIZE, chunk_buffer};
use crate::store::{Draft, PartReader, need_space, sync_dir};
use crate::{Store, StoreError};

type Access = FormatAccess<imago::file::File>;

/// What an image is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Byte for byte, with holes.
    Raw,
    /// QEMU's, version 3.
    Qcow2,
}

/// Writes part `part` of the image `image` to the file `path`, replacing what is there. `progress` is told the bytes of
/// the part that are done, and all that there are. Refused at once when it cannot fit.
pub fn export(
    store: &Store,
    image: &Digest,
    part: &str,
    path: &Path,
    format: Format,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), StoreError> {
    let reader = store.part(image, part)?;
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    need_space("writing the file", dir, content(&reader)?.min(reader.size()))?;
    let draft = Draft::create(dir)?;
    match format {
        Format::Raw => write_raw(&reader, &draft, path, progress)?,
        Format::Qcow2 => write_qcow2(&reader, &draft, path, progress)?,
    }
    draft.sync()?;
    draft.publish(path)?;
    sync_dir(dir)
}

/// What the file takes at most, without tables.
fn content(reader: &PartReader) -> Result<u64, StoreError> {
    let mut content: u64 = 0;
    reader.index().each(|_, _| {
        content = content.saturating_add(CHUNK_SIZE as u64);
        Ok::<_, StoreError>(())
    })?;
    Ok(content)
}

/// Calls `write` with every run of bytes that may not be zeros, and where it begins.
fn each_chunk(
    reader: &PartReader,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64),
    mut write: impl FnMut(&[u8], u64) -> io::Result<()>,
) -> Result<(), StoreError> {
    let mut plain = chunk_buffer();
    reader.index().each(|number, digest| {
        let len = reader.read(number, &digest, &mut plain)?;
        let at = number * CHUNK_SIZE as u64;
        write(&plain[..len], at).map_err(StoreError::io("write", path))?;
        progress(at + len as u64, reader.size());
        Ok(())
    })
}

fn write_raw(
    reader: &PartReader,
    draft: &Draft,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), StoreError> {
    draft.file().set_len(reader.size()).map_err(StoreError::io("write", draft.path()))?;
    each_chunk(reader, path, progress, |bytes, at| draft.file().write_all_at(bytes, at))
}

fn write_qcow2(
    reader: &PartReader,
    draft: &Draft,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), StoreError> {
    let failed = || StoreError::io("write", path);
    let open = || imago::file::File::open(StorageOpenOptions::new().filename(draft.path()).write(true));
    // A disk of qcow2 consists of sectors; kernels, which nobody wants as qcow2, do not.
    let size = reader.size().next_multiple_of(512);
    Qcow2::<_, Access>::create_builder(open().map_err(failed())?).size(size).create().map_err(failed())?;
    let image = Qcow2::<_, Access>::builder(open().map_err(failed())?).write(true);
    let image = image.open(imago::DenyImplicitOpenGate::default()).map_err(failed())?;
    let access = FormatAccess::new(image);
    each_chunk(reader, path, progress, |bytes, at| access.write(bytes, at))?;
    // The library's file is another one than the draft's, and its tables are in memory until now.
    access.flush().and_then(|()| access.sync()).map_err(failed())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;
    use crate::fixtures::{image, noise, store};
    use crate::manifest::DISK;

    #[test]
    fn both_formats_hold_the_disk_and_no_zeros() {
        use std::os::unix::fs::MetadataExt;
        let (dir, store) = store();
        let mut bytes = noise(1, 40 * CHUNK_SIZE + 512);
        bytes[3 * CHUNK_SIZE..35 * CHUNK_SIZE].fill(0);
        let digest = image(&store, &bytes);
        let mut last = (0, 0);
        for (format, name) in [(Format::Raw, "raw"), (Format::Qcow2, "qcow2")] {
            let out = dir.path().join(name);
            export(&store, &digest, DISK, &out, format, &mut |done, total| last = (done, total)).unwrap();
            assert_eq!(last, (bytes.len() as u64, bytes.len() as u64));
            assert!(fs::metadata(&out).unwrap().blocks() * 512 < 16 * CHUNK_SIZE as u64, "{name} has holes");
            let raw = dir.path().join("back");
            let convert = ["convert", "-f", name, "-O", "raw"];
            match Command::new("qemu-img").args(convert).args([&out, &raw]).output() {
                Err(_) => return println!("skipped: qemu-img is not installed"),
                Ok(done) => assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr)),
            }
            assert!(fs::read(&raw).unwrap() == bytes, "{name}");
        }
        let check = Command::new("qemu-img").arg("check").arg(dir.path().join("qcow2")).output().unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    }
}
