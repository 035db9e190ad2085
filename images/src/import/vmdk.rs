//! VMDK images that are a text and flat files beside it; `imago` reads these. The sparse kinds are refused by name.

use std::cell::RefCell;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use imago::format::gate::ImplicitOpenGate;
use imago::vmdk::Vmdk;
use imago::{FormatAccess, FormatDriverBuilder, StorageOpenOptions};

use super::ImportError;
use super::layered::{Access, Layered, referred, storage};

/// Opens what the text names, where an image may refer to it.
struct Gate<'a> {
    path: &'a Path,
    allow: &'a [PathBuf],
    /// Why something was not opened, since the library passes on only a kind and a text.
    refused: Rc<RefCell<Option<ImportError>>>,
}

impl ImplicitOpenGate<imago::file::File> for Gate<'_> {
    fn open_format<F: FormatDriverBuilder<imago::file::File>>(
        &mut self,
        _: F,
    ) -> io::Result<FormatAccess<imago::file::File>> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "it refers to another image"))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<imago::file::File> {
        let name = options.get_filename().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let opened = referred(self.path, &name, self.allow).and_then(|target| storage(&target));
        opened.map_err(|error| {
            *self.refused.borrow_mut() = Some(error);
            io::ErrorKind::PermissionDenied.into()
        })
    }
}

/// Opens the image whose text is at `path`; `allow` are files outside its folder that it may refer to.
pub(super) fn open(path: &Path, allow: &[PathBuf]) -> Result<Layered, ImportError> {
    let refused = Rc::new(RefCell::new(None));
    let gate = Gate { path, allow, refused: Rc::clone(&refused) };
    let image = Vmdk::<_, Access>::builder(storage(path)?).open(gate);
    match (image, refused.take()) {
        (_, Some(error)) => Err(error),
        (Ok(image), None) => Ok(Layered::new(FormatAccess::new(image), path)),
        (Err(cause), None) => Err(ImportError::Vmdk { path: path.to_owned(), cause }),
    }
}
