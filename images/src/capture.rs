//! A golden image out of a VM's disk.
//!
//! The way: the disk is written out flat, into a file of ours → what belongs to one machine is removed from that
//! ([`crate::identity`]) → it is imported like any disk ([`crate::import`]), so that only chunks that are new are stored,
//! and what boots it now is found.

use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::path::Path;

use bedplate_api::control::CapturePhase;
use bedplate_api::image::Origin;

use crate::disk::{Disk, DiskError};
use crate::identity::{self, IdentityError, Left, Report};
use crate::import::{ImportError, Imported, Options, import_raw};
use crate::manifest::DISK;
use crate::store::need_space;
use crate::{Store, StoreError};

/// What a capture is to do.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Tag that shall point to the image.
    pub tag: &'a str,
    /// Name of the VM or of the disk's directory, for people.
    pub captured_from: &'a str,
    /// The guest's file systems had come to rest.
    pub at_rest: bool,
    /// What belongs to one machine stays.
    pub keep_identity: bool,
}

/// Told what is being done, and the bytes done and in all (0 where nobody knows); answers whether to go on.
pub type Progress<'a> = dyn FnMut(CapturePhase, u64, u64) -> ControlFlow<()> + 'a;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// What belongs to one machine.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The image.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// Whoever asked wants it no more.
    #[error("the capture was stopped")]
    Stopped,
}

impl From<StoreError> for CaptureError {
    fn from(error: StoreError) -> Self {
        Self::Disk(error.into())
    }
}

impl CaptureError {
    /// Whether a file system is full.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Disk(error) => error.is_full(),
            Self::Import(ImportError::Store(error)) => error.is_full(),
            Self::Import(ImportError::Io { cause, .. }) | Self::Identity(IdentityError::Io { cause, .. }) => {
                matches!(cause.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
            }
            _ => false,
        }
    }
}

/// Makes an image of `disk`, whose image `store` has, and says what of its machine was in it. Works in `scratch`, an empty
/// directory of the caller's own that nobody else can enter; whatever is left there is the caller's to remove.
pub fn capture(
    store: &Store,
    disk: &mut Disk,
    scratch: &Path,
    request: Request<'_>,
    progress: &mut Progress<'_>,
) -> Result<(Imported, Report), CaptureError> {
    let parent = disk.spec().image;
    let content = store.manifest(&parent)?.parts.get(DISK).map_or(0, |part| part.content);
    need_space("the capture", scratch, content.saturating_add(disk.written()).min(disk.size()))?;
    let raw = scratch.join("disk.raw");
    let mut stopped = false;
    let mut told = |phase, done, total| {
        let answer = progress(phase, done, total);
        stopped |= answer.is_break();
        answer
    };
    let captured = (|| {
        disk.write_raw(&raw, &mut |done, total| told(CapturePhase::Merge, done, total))?;
        if told(CapturePhase::Clean, 0, 0).is_break() {
            return Err(CaptureError::Stopped);
        }
        let (report, looked) = match request.keep_identity {
            false => (identity::remove(&raw)?, true),
            true => kept(&raw),
        };
        let unique = looked.then(|| report.left.iter().map(|left| left.trace.kind).collect());
        let (captured_from, at_rest) = (request.captured_from.to_owned(), request.at_rest);
        let origin = Origin { parent, captured_from, at_rest, unique };
        let options = Options { tag: Some(request.tag), origin: Some(&origin), ..Options::default() };
        // A name that does not point to anything readable has nothing worth telling.
        let before = store.tag(request.tag).ok();
        let mut imported = import_raw(store, &raw, options, &mut |done, total| told(CapturePhase::Store, done, total))?;
        if let Some(before) = before.filter(|before| *before != imported.digest) {
            imported.report.push(format!("{} was {before} before", request.tag));
        }
        Ok((imported, report))
    })();
    if stopped { Err(CaptureError::Stopped) } else { captured }
}

/// What belongs to one machine, where it is to stay, and whether it could be looked for: a disk that cannot be looked into
/// is no reason not to capture it.
fn kept(raw: &Path) -> (Report, bool) {
    match identity::find(raw) {
        Ok(traces) => {
            let left = traces.into_iter().map(|trace| Left { trace, why: "it was asked to stay".to_owned() });
            (Report { left: left.collect(), ..Report::default() }, true)
        }
        Err(error) => {
            let notes = vec![format!("what belongs to one machine could not be looked for: {error}")];
            (Report { notes, ..Report::default() }, false)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use bedplate_api::image::TraceKind;

    use super::*;
    use crate::disk::Mode;
    use crate::export::{Format, export};
    use crate::fixtures::{files, noise, store};
    use crate::import::import_disk;

    const SECRET: &str = "the key of one machine";

    fn run(program: &str, args: &[&str]) {
        let done = Command::new(program).args(args).output().unwrap();
        assert!(done.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// An image with a system in it, called `base`, and a disk of a machine that ran from it; `None` without e2fsprogs.
    fn machine(dir: &Path, store: &Store) -> Option<Disk> {
        if Command::new("/usr/sbin/mke2fs").arg("-V").output().is_err() {
            eprintln!("skipped: e2fsprogs is not installed");
            return None;
        }
        let (root, raw) = (dir.join("root"), dir.join("raw"));
        for (path, content) in [
            ("etc/machine-id", b"".as_slice()),
            ("usr/large", &noise(1, 8 << 20)),
            ("etc/os-release", b"NAME=x\n"),
            ("srv/x", b""),
        ] {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        fs::create_dir_all(root.join("etc/ssh")).unwrap();
        let name = raw.to_str().unwrap();
        run("/usr/sbin/mke2fs", &["-q", "-F", "-t", "ext4", "-d", root.to_str().unwrap(), name, "32M"]);
        let options = Options { tag: Some("base"), ..Options::default() };
        let base = import_disk(store, &raw, options, &mut |_, _| ControlFlow::Continue(())).unwrap();
        let before = fs::read(&raw).unwrap();
        // It runs: it is given keys, and data that is wanted.
        fs::write(dir.join("key"), SECRET).unwrap();
        fs::write(dir.join("data"), noise(2, 1 << 20)).unwrap();
        let put = |from: &str, to: &str| format!("write {} {to}", dir.join(from).display());
        let script = [put("key", "/etc/ssh/ssh_host_rsa_key"), put("data", "/srv/data")].join("\n");
        fs::write(dir.join("script"), script).unwrap();
        run("/usr/sbin/debugfs", &["-w", "-f", dir.join("script").to_str().unwrap(), name]);
        let mut disk = Disk::create(&dir.join("disk"), store, &base.digest, Mode::Persistent).unwrap();
        for (number, (new, old)) in fs::read(&raw).unwrap().chunks(4096).zip(before.chunks(4096)).enumerate() {
            if new != old {
                disk.write_at(new, number as u64 * 4096).unwrap();
            }
        }
        disk.flush().unwrap();
        Some(disk)
    }

    fn request(keep_identity: bool) -> Request<'static> {
        Request { tag: "golden", captured_from: "web-1", at_rest: true, keep_identity }
    }

    #[test]
    fn an_image_of_a_disk_has_its_data_and_nothing_of_its_machine() {
        let (dir, store) = store();
        let Some(mut disk) = machine(dir.path(), &store) else { return };
        let parent = disk.spec().image;
        let chunks = files(&store.dir().join("chunks")).len();
        let scratch = store.scratch().unwrap();
        let mut phases = Vec::new();
        let mut progress = |phase, _, _| {
            phases.push(phase);
            ControlFlow::Continue(())
        };
        let (made, report) = capture(&store, &mut disk, scratch.path(), request(false), &mut progress).unwrap();
        phases.dedup();
        assert_eq!(phases, [CapturePhase::Merge, CapturePhase::Clean, CapturePhase::Store]);
        assert_eq!(report.removed.iter().map(|trace| &trace.path).collect::<Vec<_>>(), ["/etc/ssh/ssh_host_rsa_key"]);
        assert!(report.left.is_empty(), "{:?}", report.left);
        let origin = Origin { parent, captured_from: "web-1".to_owned(), at_rest: true, unique: Some([].into()) };
        assert_eq!(store.manifest(&store.tag("golden").unwrap()).unwrap().origin, Some(origin));
        // 8 MiB of the image are in it still, and 1 MiB is new, beside what changed of the file system's own.
        let new = files(&store.dir().join("chunks")).len() - chunks;
        assert_eq!(made.chunks - made.reused, new as u64);
        assert!((16..40).contains(&new), "{new} new chunks");

        let out = dir.path().join("out");
        export(&store, &made.digest, DISK, &out, Format::Raw, &mut |_, _| {}).unwrap();
        let bytes = fs::read(&out).unwrap();
        assert!(!bytes.windows(SECRET.len()).any(|window| window == SECRET.as_bytes()), "the key is still there");
        run("/usr/sbin/e2fsck", &["-f", "-n", out.to_str().unwrap()]);
        let back = dir.path().join("back");
        run("/usr/sbin/debugfs", &["-R", &format!("dump /srv/data {}", back.display()), out.to_str().unwrap()]);
        assert!(fs::read(back).unwrap() == noise(2, 1 << 20));
    }

    /// The guest writes the first sector as well.
    #[test]
    fn a_disk_that_looks_like_something_else_is_a_disk_all_the_same() {
        let (dir, store) = store();
        for (number, (at, magic)) in
            [(0, &b"QFI\xfb\0\0\0\x03"[..]), (0, b"\x1f\x8b\x08"), (0, b"# Disk DescriptorFile\n"), (0, b"KDMV")]
                .into_iter()
                .enumerate()
        {
            let mut content = noise(7, 1 << 20);
            content[at..at + magic.len()].copy_from_slice(magic);
            let image = crate::fixtures::image(&store, &vec![0; 1 << 20]);
            let path = dir.path().join(number.to_string());
            let mut disk = Disk::create(&path, &store, &image, Mode::Persistent).unwrap();
            disk.write_at(&content, 0).unwrap();
            let scratch = store.scratch().unwrap();
            let mut go_on = |_, _, _| ControlFlow::Continue(());
            let (made, _) = capture(&store, &mut disk, scratch.path(), request(true), &mut go_on).unwrap();
            assert_eq!(made.manifest.origin.unwrap().unique, None, "nobody could look");
            let out = dir.path().join("flat");
            export(&store, &made.digest, DISK, &out, Format::Raw, &mut |_, _| {}).unwrap();
            assert!(fs::read(&out).unwrap() == content, "{magic:?}");
        }
    }

    #[test]
    fn what_is_to_stay_stays_and_the_image_says_so() {
        let (dir, store) = store();
        let Some(mut disk) = machine(dir.path(), &store) else { return };
        let scratch = store.scratch().unwrap();
        let mut go_on = |_, _, _| ControlFlow::Continue(());
        let (made, report) = capture(&store, &mut disk, scratch.path(), request(true), &mut go_on).unwrap();
        assert_eq!((report.removed.len(), report.left.len()), (0, 1));
        assert_eq!(made.manifest.origin.unwrap().unique, Some([TraceKind::HostKey].into()));
        assert!(!made.report.iter().any(|note| note.starts_with("golden was")), "{:?}", made.report);
        // The name moves on, and where it was is told.
        let scratch = store.scratch().unwrap();
        let (later, _) = capture(&store, &mut disk, scratch.path(), request(false), &mut go_on).unwrap();
        let moved = format!("golden was {} before", made.digest);
        assert!(later.report.contains(&moved), "{:?}", later.report);
    }

    #[test]
    fn it_can_be_stopped_in_each_phase_and_gives_no_name() {
        let (dir, store) = store();
        let Some(mut disk) = machine(dir.path(), &store) else { return };
        for stop in [CapturePhase::Merge, CapturePhase::Clean, CapturePhase::Store] {
            let scratch = store.scratch().unwrap();
            let mut progress = |phase, _, _| {
                if phase == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let stopped = capture(&store, &mut disk, scratch.path(), request(false), &mut progress);
            assert!(matches!(stopped, Err(CaptureError::Stopped)), "{stop:?}: {stopped:?}");
            assert!(store.tag("golden").is_err());
        }
    }
}
