//! From somebody's file to the local store.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use bedplate_api::image::ImageKind;
use bedplate_images::Store;
use bedplate_images::import::container::Layout;
use bedplate_images::import::{
    ImportError, Imported, Options, SuspendedFiles, import_disk, import_files, import_stream, import_suspended,
};
use bedplate_images::manifest::DISK;

use super::registry::{self, RegistryArgs, SCHEME};
use super::{Error, note_moved, print_one};
use crate::output::{self, Format, note};
use crate::progress::Progress;

/// What stands for standard input.
const STDIN: &str = "-";

/// Imports the disk in `file`, showing how far it has come; `tag` is the name to give it.
///
/// # Errors
/// See [`ImportError`].
pub fn disk(store: &Store, file: &Path, tag: Option<&str>, allow: &[PathBuf]) -> Result<Imported, ImportError> {
    let options = Options { tag, allow, origin: None };
    let shown = if file == Path::new(STDIN) { Path::new("standard input") } else { file };
    let progress = begin(shown);
    let mut told = |done, total| {
        progress.set(done, total);
        ControlFlow::Continue(())
    };
    let imported = if file == Path::new(STDIN) {
        import_stream(store, std::io::stdin().lock(), None, shown, options, &mut told)?
    } else if let Some(layout) = Layout::find(file) {
        layout.import(store, options, &mut told)?
    } else {
        import_disk(store, file, options, &mut told)?
    };
    end(progress, &imported);
    Ok(imported)
}

fn begin(shown: &Path) -> Progress {
    let name = shown.file_name().unwrap_or(shown.as_os_str()).to_string_lossy().into_owned();
    Progress::new(format!("import {name}"), 0)
}

fn end(progress: Progress, imported: &Imported) {
    let all = imported.manifest.parts.values();
    // Kernel and initial RAM disk of a disk are in it.
    let of_disk = imported.manifest.parts.get(DISK).filter(|_| imported.manifest.kind == ImageKind::Disk);
    let (size, content) = match of_disk {
        Some(disk) => (disk.size, disk.content),
        None => all.fold((0, 0), |(size, content), part| (size + part.size, content + part.content)),
    };
    let there = match imported.reused {
        0 => String::new(),
        reused => format!("; {reused} of {} chunks were here already", imported.chunks),
    };
    progress.finish(&format!("{} with {} of content{there}", output::bytes(size), output::bytes(content)));
}

pub(super) fn run(
    store: &Store,
    file: &Path,
    name: &str,
    allow: &[PathBuf],
    registry: &RegistryArgs,
    format: Format,
) -> Result<(), Error> {
    let before = store.tag(name).ok();
    let imported = match file.to_str().filter(|text| text.starts_with(SCHEME)) {
        Some(from) => {
            let progress = begin(file);
            let options = Options { tag: Some(name), allow, origin: None };
            let imported = registry::import(store, from, registry, options, &progress)?;
            end(progress, &imported);
            imported
        }
        None => disk(store, file, Some(name), allow)?,
    };
    imported.report.iter().for_each(|line| note(line));
    note_moved(name, before, &imported.digest);
    Ok(print_one(&store.summary(name)?, format)?)
}

pub(super) fn run_suspended(store: &Store, files: SuspendedFiles<'_>, name: &str, format: Format) -> Result<(), Error> {
    let before = store.tag(name).ok();
    let progress = begin(files.memory);
    let mut told = |done, total| {
        progress.set(done, total);
        ControlFlow::Continue(())
    };
    let imported = import_suspended(store, files, Some(name), &mut told)?;
    end(progress, &imported);
    note_moved(name, before, &imported.digest);
    Ok(print_one(&store.summary(name)?, format)?)
}

pub(super) fn run_vmm(
    store: &Store,
    kernel: &Path,
    initrd: &Path,
    cmdline: &str,
    name: &str,
    format: Format,
) -> Result<(), Error> {
    let before = store.tag(name).ok();
    let imported = import_files(store, kernel, initrd, cmdline, Some(name))?;
    note_moved(name, before, &imported.digest);
    Ok(print_one(&store.summary(name)?, format)?)
}
