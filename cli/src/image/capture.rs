//! `bedplate image capture`: an image of the disk that a VM of `bedplate run --persistent` left.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use bedplate_api::control::{Captured, LeftTrace};
use bedplate_images::Store;
use bedplate_images::capture::{Request, capture};
use bedplate_images::disk::{Disk, DiskError, Mode};

use super::Error;
use crate::capture::{Bars, print};
use crate::output::Format;
use crate::rundir;

/// Runs it. `vm` is the name of the VM, or the path of a disk's directory.
pub(super) fn run(store: &Store, vm: &str, tag: &str, keep_identity: bool, format: Format) -> Result<(), Error> {
    let dir = match vm.contains('/') {
        true => PathBuf::from(vm),
        false => rundir::persistent_disk(store.dir(), vm)?,
    };
    let spec = Disk::spec_of(&dir).map_err(|error| match error {
        DiskError::NotADisk { .. } => Error::NoDisk { vm: vm.to_owned(), dir: dir.clone() },
        other => other.into(),
    })?;
    if spec.mode == Mode::NonPersistent {
        return Err(Error::NotKept(dir));
    }
    let mut disk = Disk::open(&dir)?;
    // The disk knows which store has its image; it may be another one.
    let store = Store::open(&disk.spec().store)?;
    let name = Path::new(vm).file_name().map_or_else(|| vm.to_owned(), |name| name.to_string_lossy().into_owned());
    // A guest that was shut down has written everything; of another one nobody knows.
    let request = Request { tag, captured_from: &name, at_rest: false, keep_identity };
    let scratch = store.scratch()?;
    let bars = Bars::default();
    let mut progress = |phase, done, total| {
        bars.set(phase, done, total);
        ControlFlow::Continue(())
    };
    let (imported, report) = capture(&store, &mut disk, scratch.path(), request, &mut progress)?;
    bars.finish();
    let left = report.left.into_iter().map(|left| LeftTrace { trace: left.trace, why: left.why }).collect();
    let mut notes = report.notes;
    notes.extend(imported.report);
    let captured = Captured {
        image: store.summary(tag)?,
        unfrozen: Some("nobody knows how its VM ended; if it was shut down in order, nothing is missing".to_owned()),
        removed: report.removed,
        left,
        notes,
        chunks: imported.chunks,
        reused: imported.reused,
    };
    Ok(print(&captured, &name, format)?)
}
