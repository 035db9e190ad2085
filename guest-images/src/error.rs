//! What can go wrong while an image is made.

use std::io;
use std::path::{Path, PathBuf};

/// The result of everything here.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tool failed, or an archive could not be written.
    #[error(transparent)]
    Lab(#[from] bedplate_lab::Error),
    /// The system refused a file.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it was refused.
        source: io::Error,
    },
    /// The package archive does not have what is needed.
    #[error(
        "the package archive has no {package}: check the sources in /etc/apt (Debian 12, amd64), then `apt-get update`"
    )]
    NoPackage {
        /// The package.
        package: String,
    },
    /// A kernel that is not laid out as the boot protocol says.
    #[error("{} is not a bzImage with an LZ4 payload: {problem}", path.display())]
    NotBzImage {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// `packages.txt` has a line that says nothing.
    #[error("guest-images/packages.txt: {line:?} is neither a [section] nor a name and a version")]
    Pins {
        /// The line.
        line: String,
    },
}

/// `what` failed on `path`; for `map_err`.
pub(crate) fn at<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::File { what, path: path.to_owned(), source }
}
