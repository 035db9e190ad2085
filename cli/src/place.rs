//! Where the local image store is.

use std::path::{Path, PathBuf};

use rustix::process::geteuid;

/// Where root's store is.
const ROOT_STORE: &str = "/var/lib/bedplate/images";

/// Which local store.
#[derive(Debug, Clone, clap::Args)]
pub struct StoreArgs {
    /// The local image store [default: /var/lib/bedplate/images for root, else ~/.local/share/bedplate/images]
    #[arg(long, global = true, env = "BEDPLATE_STORE", value_name = "DIR")]
    store: Option<PathBuf>,
}

/// The store's place cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Neither a home directory nor an answer.
    #[error("no place for the image store: HOME is not set; say where with --store or BEDPLATE_STORE")]
    NoHome,
    /// A relative path, and no current directory to take it from.
    #[error("the image store {} cannot be found: {source}", path.display())]
    NoDirectory {
        /// As given.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl StoreArgs {
    /// The absolute path of its directory.
    ///
    /// # Errors
    /// See [`PlaceError`].
    pub fn dir(&self) -> Result<PathBuf, PlaceError> {
        let dir = match &self.store {
            Some(dir) => dir.clone(),
            None if geteuid().is_root() => ROOT_STORE.into(),
            None => user_store(|name| std::env::var_os(name).map(PathBuf::from))?,
        };
        // Disks remember the path of their store.
        std::path::absolute(&dir).map_err(|source| PlaceError::NoDirectory { path: dir, source })
    }
}

fn user_store(variable: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf, PlaceError> {
    let absolute = |name| variable(name).filter(|path| path.is_absolute());
    let data = absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share")));
    Ok(data.ok_or(PlaceError::NoHome)?.join("bedplate/images"))
}

/// The nearest directory at or above `path` that exists.
pub fn existing(path: &Path) -> &Path {
    path.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_a_store_below_home() {
        let home = |name: &str| (name == "HOME").then(|| PathBuf::from("/home/a"));
        assert_eq!(user_store(home).unwrap(), Path::new("/home/a/.local/share/bedplate/images"));
        let xdg = |name: &str| (name == "XDG_DATA_HOME").then(|| PathBuf::from("/data"));
        assert_eq!(user_store(xdg).unwrap(), Path::new("/data/bedplate/images"));
        assert!(matches!(user_store(|_| None), Err(PlaceError::NoHome)));
        assert_eq!(existing(Path::new("/etc/no/such/dir")), Path::new("/etc"));
    }
}
