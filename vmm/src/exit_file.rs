//! How the VM ended, in a file: written aside and put into place by a rename, so that nobody reads half of it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bedplate_api::vmm::Exit;
use bedplate_devices::files::kind;

use crate::files;

/// The place is not one for an exit file.
#[derive(Debug, thiserror::Error)]
pub enum ExitFileError {
    /// A rename would replace it, whatever it is.
    #[error("exit file: {path} is {found}; name a regular file, or one that does not exist yet")]
    InTheWay {
        /// The exit file, or what is made aside.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// The host refuses.
    #[error("exit file {path}: {source}; {}", files::remedy(.source))]
    Write {
        /// As given.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}

/// A place where an exit file can be.
#[derive(Debug)]
pub struct ExitFile {
    path: PathBuf,
    aside: PathBuf,
}

impl ExitFile {
    /// Looks at the place, before a VM runs whose end could not be told.
    ///
    /// # Errors
    /// Something else than a regular file is there, or its directory takes no file.
    pub fn prepare(path: &Path) -> Result<Self, ExitFileError> {
        let mut aside = path.to_path_buf().into_os_string();
        aside.push(".tmp");
        let place = Self { path: path.into(), aside: aside.into() };
        if path.file_name().is_none() && fs::symlink_metadata(path).is_err() {
            return Err(place.cannot(io::Error::new(ErrorKind::InvalidInput, "this path names no file")));
        }
        place.create()?;
        // Gone again: a process that is killed leaves nothing half-made.
        fs::remove_file(&place.aside).map_err(|source| place.cannot(source))?;
        Ok(place)
    }

    /// Replaces what is there.
    ///
    /// # Errors
    /// As at [`Self::prepare`]: the place may have changed since.
    pub fn write(&self, exit: &Exit) -> Result<(), ExitFileError> {
        let mut file = self.create()?;
        let written = serde_json::to_vec(exit)
            .map_err(io::Error::from)
            .and_then(|text| file.write_all(&text))
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&self.aside, &self.path));
        written.map_err(|source| {
            // What is there of it says nothing.
            let _ = fs::remove_file(&self.aside);
            self.cannot(source)
        })
    }

    /// The file aside, empty.
    fn create(&self) -> Result<File, ExitFileError> {
        only_regular(&self.path)?;
        only_regular(&self.aside)?;
        // The flags: neither through a link nor into a FIFO that was put there this moment.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(&self.aside);
        file.map_err(|source| self.cannot(source))
    }

    fn cannot(&self, source: io::Error) -> ExitFileError {
        ExitFileError::Write { path: self.path.clone(), source }
    }
}

/// Of the path itself, not of where a link leads: it is the link that a rename replaces.
fn only_regular(path: &Path) -> Result<(), ExitFileError> {
    match fs::symlink_metadata(path) {
        Ok(there) if !there.is_file() => {
            Err(ExitFileError::InTheWay { path: path.into(), found: kind(there.file_type()) })
        }
        // What cannot be looked at cannot be written either, and that says why.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileTypeExt;

    use bedplate_api::vmm::ExitReason;
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

    use super::*;

    fn exit() -> Exit {
        Exit { reason: ExitReason::Stopped, detail: "as the test wants".into() }
    }

    #[test]
    fn it_appears_at_the_end_and_replaces_the_last_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exit");
        let place = ExitFile::prepare(&path).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing before the end");
        fs::write(&path, "old").unwrap();
        place.write(&exit()).unwrap();
        assert_eq!(serde_json::from_slice::<Exit>(&fs::read(&path).unwrap()).unwrap(), exit());
        ExitFile::prepare(&path).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else after it");
    }

    #[test]
    fn what_is_no_regular_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        std::os::unix::fs::symlink("target", at("link")).unwrap();
        fs::create_dir(at("dir")).unwrap();
        let mut others = vec![("fifo", "a FIFO"), ("link", "a symbolic link"), ("dir", "a directory")];
        // /dev/full, as root.
        match mknodat(CWD, at("full"), FileType::CharacterDevice, Mode::RWXU, makedev(1, 7)) {
            Ok(()) => others.push(("full", "a character device")),
            Err(error) => println!("without a device: {error}"),
        }
        let place = ExitFile { path: at("fifo"), aside: at("fifo.tmp") };
        assert!(place.write(&exit()).unwrap_err().to_string().contains("a FIFO"), "also at the end");
        for (name, what) in others {
            let error = ExitFile::prepare(&at(name)).unwrap_err().to_string();
            assert!(error.contains(what) && error.contains(name), "{error}");
            assert!(!fs::symlink_metadata(at(name)).unwrap().is_file());
        }
        mknodat(CWD, at("exit.tmp"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert!(ExitFile::prepare(&at("exit")).unwrap_err().to_string().contains("exit.tmp is a FIFO"));
        assert!(fs::symlink_metadata(at("exit.tmp")).unwrap().file_type().is_fifo());
    }

    #[test]
    fn a_place_that_takes_no_file_is_found_before_the_end() {
        for path in ["/nowhere/exit", "/proc/exit", ""] {
            let error = ExitFile::prepare(Path::new(path)).unwrap_err().to_string();
            assert!(error.starts_with(&format!("exit file {path}: ")), "{error}");
        }
    }
}
