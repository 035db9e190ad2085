//! New files for a shared disk that was taken from somebody who may still have the old ones open; see `lease.rs`.
//!
//! The map is copied before the data. It never speaks of data that is not there, and whoever still writes the old files
//! keeps to that too: whatever the copied map speaks of is in the data that is copied afterwards.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;

use super::lease::{LeaseError, step};
use super::map::Map;
use super::record::{names, number};
use super::{DiskError, io_at as disk_io_at};
use crate::store::sync_dir;

/// Bytes copied between two looks at the lease; a second or so on a slow network.
const STRIDE: u64 = 64 << 20;

/// Copies of a map that somebody may be writing: each of its sectors is written at once, but not read at once.
const COPIES: u32 = 8;

/// To open a file of a directory that others write to: one of them may be hostile, and a link there would name a file of
/// this host, a pipe wait for ever.
pub(super) fn no_links() -> OpenOptions {
    let mut options = File::options();
    options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed());
    options
}

/// Path of `data` or `map`, as it was made in `epoch`.
pub(super) fn path(dir: &Path, name: &str, epoch: u64) -> PathBuf {
    if epoch == 0 { dir.join(name) } else { dir.join(format!("{name}.{epoch}")) }
}

/// The newest epoch up to `last` whose files are whole.
pub(super) fn published(dir: &Path, last: u64) -> Result<u64, LeaseError> {
    let names = names(dir)?;
    let maps = names.iter().filter_map(|name| made_in(name, "map"));
    let whole = maps.filter(|epoch| *epoch <= last && names.iter().any(|name| made_in(name, "data") == Some(*epoch)));
    whole.max().ok_or_else(|| LeaseError::Bad { path: dir.to_owned(), cause: "it has no data and map".to_owned() })
}

/// The epoch in which the file `name` was made, if it is a `kind` that is whole.
fn made_in(name: &str, kind: &str) -> Option<u64> {
    let rest = name.strip_prefix(kind)?;
    if rest.is_empty() { Some(0) } else { number(rest.strip_prefix('.')?) }
}

/// Makes files of epoch `to` with the content of those of epoch `from`, for a disk of `size` bytes. `ours` says whether
/// the lease still is.
pub(super) fn make(
    dir: &Path,
    size: u64,
    (from, to): (u64, u64),
    ours: impl Fn() -> Result<(), LeaseError>,
) -> Result<(), DiskError> {
    let draft = dir.join(format!("map.{to}.tmp"));
    let map = copy_map(&path(dir, "map", from), &draft, size)?;
    step()?;
    let new = path(dir, "data", to);
    let target = copy_data(&path(dir, "data", from), &new, size, || Ok(ours()?))?;
    step()?;
    target.sync_all().and_then(|()| map.sync_all()).map_err(disk_io_at("sync", &new))?;
    step()?;
    // The data's name has to be there first.
    sync_dir(dir)?;
    ours()?;
    let whole = path(dir, "map", to);
    fs::rename(&draft, &whole).map_err(disk_io_at("rename", &draft))?;
    sync_dir(dir)?;
    Ok(step()?)
}

/// Copies a map, which somebody may be writing.
pub(super) fn copy_map(old: &Path, draft: &Path, size: u64) -> Result<File, DiskError> {
    let damaged = |cause: String| DiskError::Damaged { path: old.to_owned(), cause };
    let mut last = 0;
    for _ in 0..COPIES {
        let source = no_links().read(true).open(old).map_err(disk_io_at("open", old))?;
        let mut target = no_links()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(draft)
            .map_err(disk_io_at("create", draft))?;
        let len = Map::file_len(size);
        // One byte more, so that a longer file is seen.
        let copied = io::copy(&mut source.take(len + 1), &mut target).map_err(disk_io_at("copy to", draft))?;
        if copied != len {
            return Err(damaged(format!("it has not the {len} bytes that it should have")));
        }
        match Map::load(&target, size).map_err(disk_io_at("read", draft))? {
            Ok(_) => return Ok(target),
            Err(cluster) => last = cluster,
        }
    }
    Err(damaged(format!("the sector of cluster {last} fails its checksum")))
}

/// Copies the clusters of `old`, a file of `size` bytes, to the new file `new`: by reference where the file system can,
/// else what is not a hole. `ours` says from time to time whether to go on.
pub(super) fn copy_data(
    old: &Path,
    new: &Path,
    size: u64,
    ours: impl Fn() -> Result<(), DiskError>,
) -> Result<File, DiskError> {
    let source = no_links().read(true).open(old).map_err(disk_io_at("open", old))?;
    let found = source.metadata().map_err(disk_io_at("examine", old))?.len();
    if found != size {
        let cause = format!("it has {found} bytes and should have {size}");
        return Err(DiskError::Damaged { path: old.to_owned(), cause });
    }
    let target = no_links().write(true).create(true).truncate(true).open(new).map_err(disk_io_at("create", new))?;
    match ioctl_ficlone(&target, &source) {
        Ok(()) => {}
        // Not this file system, or not these two files.
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => {
            copy_content(&source, &target, size, new, &ours)?;
        }
        Err(e) => return Err(disk_io_at("copy to", new)(e.into())),
    }
    Ok(target)
}

fn copy_content(
    source: &File,
    target: &File,
    size: u64,
    path: &Path,
    ours: impl Fn() -> Result<(), DiskError>,
) -> Result<(), DiskError> {
    let failed = |e: Errno| disk_io_at("copy to", path)(e.into());
    target.set_len(size).map_err(disk_io_at("resize", path))?;
    let mut at = 0;
    while at < size {
        let start = match seek(source, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // A file system that does not know of holes.
            Err(Errno::INVAL) => at,
            Err(e) => return Err(failed(e)),
        };
        let end = seek(source, SeekFrom::Hole(start)).or_else(|e| if e == Errno::INVAL { Ok(size) } else { Err(e) });
        let end = end.map_err(failed)?.min(size);
        at = start;
        while at < end {
            ours()?;
            let copied = copy_piece(source, target, at, STRIDE.min(end - at)).map_err(disk_io_at("copy to", path))?;
            at += copied;
        }
    }
    Ok(())
}

/// Copies up to `len` bytes at `at`, at least one.
fn copy_piece(source: &File, target: &File, at: u64, len: u64) -> io::Result<u64> {
    let (mut from, mut to) = (at, at);
    // 64 MiB at most.
    match copy_file_range(source, Some(&mut from), target, Some(&mut to), len as usize) {
        Ok(copied) if copied > 0 => return Ok(copied as u64),
        Ok(_) | Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        Err(e) => return Err(e.into()),
    }
    let mut bytes = vec![0; len.min(1 << 20) as usize];
    source.read_exact_at(&mut bytes, at)?;
    target.write_all_at(&bytes, at)?;
    Ok(bytes.len() as u64)
}

/// Removes what earlier epochs than `epoch` have left, but the files of `files`. What cannot be removed is in nobody's
/// way but the space's, and the next epoch tries again.
pub(super) fn clear(dir: &Path, files: u64, epoch: u64) -> Result<(), LeaseError> {
    let mut old: Vec<_> = names(dir)?.into_iter().filter(|name| is_leftover(name, files, epoch)).collect();
    // A map without data is looked at by nobody, and neither is the other way round; but drafts go first, so that whoever
    // is about to give one its name cannot.
    old.sort_by_key(|name| (!name.ends_with(".tmp"), name.starts_with("data")));
    for name in old {
        let _ = fs::remove_file(dir.join(name));
    }
    Ok(())
}

fn is_leftover(name: &str, files: u64, epoch: u64) -> bool {
    let whole = name.strip_suffix(".tmp").unwrap_or(name);
    if let Some(made) = made_in(whole, "holder") {
        // Epoch 0 has no holder.
        return made != 0 && made < epoch;
    }
    let made = made_in(whole, "map").or_else(|| made_in(whole, "data"));
    made.is_some_and(|made| made < epoch && (made != files || whole != name))
}
