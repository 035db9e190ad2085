//! Importing what cannot be read twice: compressed files, pipes.
//!
//! A raw disk is cut into chunks as it comes, and looked into afterwards, in the store. An image of another format is
//! written to a file first, sparse, since its tables have to be read before what they speak of.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;

use super::cut::{Flow, KEEP_FREE, put_part};
use super::format::{Format, HEAD_LEN, detect};
use super::source::{Source, Stored};
use super::unpack::{Counted, failed, peek, read_full, unpack};
use super::{Disk, ImportError, Imported, Options, Progress, check_tag, import_source, qcow2};
use crate::frame::is_zero;
use crate::store::Draft;
use crate::{CHUNK_SIZE, Store, boot};

/// Imports the disk image that `reader` yields, raw or qcow2, packed or not, until it ends. `path` is what to call it, and
/// `len` how many bytes there are, where that is known; progress is told in these.
pub fn import_stream(
    store: &Store,
    reader: impl Read,
    len: Option<u64>,
    path: &Path,
    options: Options<'_>,
    progress: &mut Progress<'_>,
) -> Result<Imported, ImportError> {
    check_tag(options.tag)?;
    let (counted, count) = Counted::new(reader);
    let (head, packed) = peek(counted, HEAD_LEN).map_err(failed(path, None))?;
    let packing = Some(detect(&head, &[])).filter(|format| format.is_packed());
    let failed = failed(path, packing);
    let unpacked = unpack(packed, packing.unwrap_or(Format::Raw), &count).map_err(&failed)?;
    let (head, mut unpacked) = peek(unpacked, HEAD_LEN).map_err(&failed)?;
    if head.is_empty() {
        return Err(ImportError::Empty { path: path.to_owned() });
    }
    let count: &Cell<u64> = &count;
    let position = || (count.get(), len.unwrap_or(0));
    let mut stream = Stream { store, reader: &mut unpacked, path, packing, position: &position };
    match detect(&head, &[]) {
        Format::Raw => stream.import_raw(options, progress),
        Format::Qcow2 => stream.import_qcow2(options, progress),
        format if packing.is_some() => Err(ImportError::Inside { path: path.to_owned(), format }),
        format => Err(ImportError::Format { path: path.to_owned(), format }),
    }
}

/// A stream, unpacked.
struct Stream<'a> {
    store: &'a Store,
    reader: &'a mut dyn Read,
    path: &'a Path,
    packing: Option<Format>,
    position: &'a dyn Fn() -> (u64, u64),
}

impl Stream<'_> {
    fn import_raw(&mut self, options: Options<'_>, progress: &mut Progress<'_>) -> Result<Imported, ImportError> {
        let path = self.path;
        let lease = self.store.lease()?;
        let mut flow = Flow::new(self.reader, path, self.packing, self.position);
        let kept = put_part(self.store, &mut flow, progress, || ImportError::Stopped { path: path.to_owned() })?;
        if detect(&[], flow.tail()) != Format::Raw {
            return Err(ImportError::Inside { path: path.to_owned(), format: Format::Vhd });
        }
        if !kept.part.size.is_multiple_of(512) {
            return Err(ImportError::Sectors { path: path.to_owned(), size: kept.part.size });
        }
        let source: Box<dyn Source> = Box::new(Stored::open(self.store, &kept.part)?);
        let found = boot::inspect(&Rc::new(RefCell::new(source)), path)?;
        Disk { kept, found, format: Format::Raw }.publish(self.store, &lease, options, path)
    }

    fn import_qcow2(&mut self, options: Options<'_>, progress: &mut Progress<'_>) -> Result<Imported, ImportError> {
        let draft = Draft::create(&self.store.dir().join("tmp"))?;
        self.spool(draft.file(), progress)?;
        let (hidden, shown) = (draft.path(), self.path);
        let mut import = || {
            if let Some(target) = qcow2::reference(hidden)? {
                return Err(ImportError::Streamed { path: shown.to_owned(), target });
            }
            let source = Box::new(qcow2::open(hidden, &[])?);
            import_source(self.store, source, Format::Qcow2, shown, options, progress)
        };
        import().map_err(|e| e.about(hidden, shown))
    }

    /// Writes the stream to `file`, whose zeros become holes.
    fn spool(&mut self, file: &File, progress: &mut Progress<'_>) -> Result<(), ImportError> {
        let mut bytes = vec![0; CHUNK_SIZE];
        let write = ImportError::io("unpack", self.path);
        let (mut at, mut written) = (0, 0_u64);
        let spooled: std::io::Result<()> = loop {
            let len = read_full(self.reader, &mut bytes).map_err(failed(self.path, self.packing))?;
            if len == 0 {
                break file.set_len(at);
            }
            if !is_zero(&bytes[..len]) {
                // As often as it could have used up half of what is kept free.
                if written.is_multiple_of(KEEP_FREE / 2) {
                    self.store.need_space("unpacking the image", KEEP_FREE)?;
                }
                if let Err(e) = file.write_all_at(&bytes[..len], at) {
                    break Err(e);
                }
                written += CHUNK_SIZE as u64;
            }
            at += len as u64;
            let (done, total) = (self.position)();
            if progress(done, total).is_break() {
                return Err(ImportError::Stopped { path: self.path.to_owned() });
            }
        };
        spooled.map_err(write)
    }
}
