//! What can go wrong between a test and its machines.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The result of everything here.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure, in words that name what to do next.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program is not installed.
    #[error("{program} is not there: install it (`cargo xtask setup` does)")]
    MissingProgram {
        /// Its name.
        program: String,
    },
    /// The system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, with the name of the file.
        what: String,
        /// Why it was refused.
        source: io::Error,
    },
    /// A command ended with an error.
    #[error("`{command}` failed ({status}): {stderr}")]
    Command {
        /// Program and arguments.
        command: String,
        /// Its exit status.
        status: String,
        /// What it said.
        stderr: String,
    },
    /// A machine's console stayed without the awaited text.
    #[error("{machine} did not print {pattern:?} within {timeout:?}; its console is in {}", log.display())]
    TimedOut {
        /// Name of the machine.
        machine: String,
        /// What was awaited.
        pattern: String,
        /// For how long.
        timeout: Duration,
        /// The serial log.
        log: PathBuf,
    },
    /// A machine's console closed before the awaited text came.
    #[error("{machine} ended before it printed {pattern:?}; its console is in {}{said}", log.display())]
    Ended {
        /// Name of the machine.
        machine: String,
        /// What was awaited.
        pattern: String,
        /// What the emulator said last, with a leading separator; empty when it said nothing.
        said: String,
        /// The serial log.
        log: PathBuf,
    },
    /// A process is still there.
    #[error("{name} (process {pid}) did not end within {timeout:?}")]
    StillRunning {
        /// Its name.
        name: String,
        /// Its process id.
        pid: u32,
        /// How long was waited.
        timeout: Duration,
    },
    /// A kernel module that is not in its tree.
    #[error("no kernel module {name} in {}: the kernel may have it built in, or call it something else", tree.display())]
    NoModule {
        /// Name, as asked for.
        name: String,
        /// The tree with `modules.dep`.
        tree: PathBuf,
    },
}

impl Error {
    /// `what` failed on `path`.
    pub(crate) fn path(what: &str, path: &Path, source: io::Error) -> Self {
        Self::Io { what: format!("{what} {}", path.display()), source }
    }

    /// `what` failed.
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io { what: what.into(), source }
    }
}
