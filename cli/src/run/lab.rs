//! `bedplate run --lab`: the same VM under real KVM, in an emulated machine with hardware virtualization.
//!
//! The machine boots the VMM image, with a small archive behind its initramfs: the VM's kernel and initial RAM disk, or its
//! firmware, and `/bedplate/run.json`, which tells init to run one VM on the console and to power the machine off when it
//! has ended. The VM's disk is the machine's first disk.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use bedplate_api::vmm::BootSource;
use bedplate_images::trust::TrustError;
use bedplate_images::{Store, StoreError};
use bedplate_lab::{Accel, Archive, MachineSpec};

use super::boot::{self, Start};
use super::source::Source;
use super::{Args, Error, exit_code};
use crate::console::{End, Signals};
use crate::output::note;
use crate::progress::Progress;
use crate::rundir::{self, RunDir};
use crate::terminal::RawMode;

/// What the node itself needs beside the guest's memory: its initramfs, unpacked, and the VMM.
const NODE_MEMORY_MIB: u64 = 1024;
/// In the node.
const DISK: &str = "/dev/vda";
const CONFIG: &str = "/bedplate/run.json";
const KERNEL: &str = "/bedplate/kernel";
const INITRD: &str = "/bedplate/initrd";
const FIRMWARE: &str = "/bedplate/firmware";

/// An emulated machine that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// Nothing for it to boot.
    #[error("--lab boots a VMM image and there is none called {name:?} in {}: `cargo xtask images` builds it, or name another with --vmm-image", store.display())]
    NoVmmImage {
        /// As asked.
        name: String,
        /// The store.
        store: PathBuf,
    },
    /// An image of another kind.
    #[error("{0:?} is no VMM image: it has no kernel and initrd of its own; name one with --vmm-image")]
    NotAVmmImage(String),
    /// The store, or what is in it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nobody signed the VMM image whom the store trusts.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The VM's kernel.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// QEMU.
    #[error(transparent)]
    Lab(#[from] bedplate_lab::Error),
    /// QEMU's own exit.
    #[error("the emulated machine failed ({0}); what it said stands above")]
    Machine(ExitStatus),
    /// A file of the run.
    #[error("cannot write {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Signals, threads.
    #[error("cannot watch the emulated machine: {0}")]
    Watch(io::Error),
}

pub(super) fn run(args: &Args, store: &Store, source: &Source, name: &str, run_dir: &RunDir) -> Result<u8, Error> {
    let dir = run_dir.path();
    let (node_kernel, node_initrd) = node_files(args, store, dir)?;
    let start = boot::files(args, store, source, dir)?;
    append_segment(&node_initrd, args, start)?;
    let spec = MachineSpec::new(name, dir)
        .cpus(args.cpus)
        .memory_mib(args.memory.saturating_add(NODE_MEMORY_MIB))
        .kernel(&node_kernel, &node_initrd, "console=ttyS0 panic=-1 quiet");
    let spec = attach_disk(spec, args, store, source, name, dir)?;
    let accel = Accel::best();
    note(&format!("Starting {name} in an emulated machine: {}. Ctrl-A X ends it.", accel.describe()));
    let end = on_terminal(spec.accel(accel))?;
    Ok(exit_code(end))
}

/// The VMM image's kernel and initramfs, as files.
fn node_files(args: &Args, store: &Store, dir: &Path) -> Result<(PathBuf, PathBuf), LabError> {
    let missing = || LabError::NoVmmImage { name: args.vmm_image.clone(), store: store.dir().to_owned() };
    let digest = store.resolve(&args.vmm_image).map_err(|error| match error {
        StoreError::TagMissing { .. } => missing(),
        other => LabError::Store(other),
    })?;
    store.check_trust(&digest)?;
    let parts = store.manifest(&digest)?.parts;
    if !parts.contains_key("kernel") || !parts.contains_key("initrd") {
        return Err(LabError::NotAVmmImage(args.vmm_image.clone()));
    }
    let (kernel, initrd) = (dir.join("node-kernel"), dir.join("node-initrd"));
    store.materialise(&digest, "kernel", &kernel)?;
    store.materialise(&digest, "initrd", &initrd)?;
    Ok((kernel, initrd))
}

/// Adds the VM to the node's initramfs.
fn append_segment(initrd: &Path, args: &Args, start: Start) -> Result<(), LabError> {
    let mut archive = Archive::new();
    let mut config = boot::config(args, start, DISK.into(), None);
    if let Some(source) = &mut config.boot_source {
        into_node(&mut archive, source)?;
    }
    let text = serde_json::to_vec(&config).map_err(|e| LabError::Watch(e.into()))?;
    archive.file(CONFIG, 0o644, text);
    let failed = |source| LabError::File { path: initrd.to_owned(), source };
    let mut file = OpenOptions::new().append(true).open(initrd).map_err(failed)?;
    // Archives begin at multiples of 4.
    let len = file.metadata().map_err(failed)?.len();
    let padding = len.next_multiple_of(4) - len;
    file.write_all(&[0; 3][..padding as usize]).and_then(|()| file.write_all(&archive.bytes())).map_err(failed)
}

/// Puts the files that `source` names into the archive, and their paths in the node into `source`.
fn into_node(archive: &mut Archive, source: &mut BootSource) -> Result<(), LabError> {
    let BootSource { kernel_image_path, firmware_path, initrd_path, boot_args: _ } = source;
    for (path, there) in [(kernel_image_path, KERNEL), (firmware_path, FIRMWARE), (initrd_path, INITRD)] {
        if let Some(path) = path {
            archive.copy(there, 0o644, Path::new(path))?;
            *path = there.to_owned();
        }
    }
    Ok(())
}

/// The VM's disk: the file itself under a layer that QEMU throws away, or a copy of the image.
fn attach_disk(
    spec: MachineSpec,
    args: &Args,
    store: &Store,
    source: &Source,
    name: &str,
    dir: &Path,
) -> Result<MachineSpec, LabError> {
    if let (Some((file, Some(format))), false) = (&source.file, args.persistent) {
        return Ok(spec.throwaway_drive(file, format));
    }
    // A disk of the lab is a plain file: the node cannot open a store that is on this side.
    let path = if args.persistent { rundir::persistent_lab_disk(store.dir(), name) } else { dir.join("disk.raw") };
    if !path.exists() {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|source| LabError::File { path: path.clone(), source })?;
        }
        let progress = Progress::new(format!("copy {} for the emulated machine", args.image), source.disk_size());
        store.materialise(&source.digest, "disk", &path)?;
        progress.finish("");
    }
    Ok(spec.drive(&path))
}

/// Gives the machine the terminal until it ends or a signal ends us; it dies with us.
fn on_terminal(spec: MachineSpec) -> Result<End, LabError> {
    let _terminal = RawMode::none();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(LabError::Watch)?;
    runtime.block_on(async {
        let mut signals = Signals::new().map_err(LabError::Watch)?;
        let (sender, ended) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || sender.send(spec.run_on_terminal()));
        tokio::select! {
            status = ended => match status {
                Ok(Ok(status)) if status.success() => Ok(End::Closed),
                Ok(Ok(status)) => Err(LabError::Machine(status)),
                Ok(Err(error)) => Err(error.into()),
                Err(_) => Err(LabError::Watch(io::Error::other("the thread that waits for it died"))),
            },
            number = signals.next() => Ok(End::Signal(number)),
        }
    })
}
