//! Debian packages by name, in the versions that `packages.txt` pins as long as the archive has them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bedplate_lab::process::output;

use crate::error::at;
use crate::{Error, Result, Workshop};

/// Names and versions, by section. Debian keeps only the newest version of a package in a release, so a pin holds until
/// the next update of it; then the current version is used, and said so.
pub(crate) const PINS: &str = include_str!("../packages.txt");

/// A package and its pinned version.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Pin<'a> {
    pub(crate) name: &'a str,
    pub(crate) version: &'a str,
}

/// The pins of one section of `text`.
pub(crate) fn section<'a>(text: &'a str, wanted: &str) -> Result<Vec<Pin<'a>>> {
    let mut inside = false;
    let mut pins = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            inside = name == wanted;
        } else if inside {
            let (name, version) = line.split_once(' ').ok_or_else(|| Error::Pins { line: line.to_owned() })?;
            pins.push(Pin { name, version: version.trim() });
        }
    }
    Ok(pins)
}

impl Workshop<'_> {
    /// The names under which `pins` are to be asked for: `name=version`, or only the name where that version is gone.
    pub(crate) fn resolve(&self, pins: &[Pin<'_>]) -> Result<Vec<String>> {
        let available = available(pins)?;
        let resolve = |pin: &Pin<'_>| {
            let (name, pinned) = (pin.name, pin.version);
            let versions = available.get(name).ok_or_else(|| Error::NoPackage { package: name.to_owned() })?;
            if versions.iter().any(|version| version == pinned) {
                return Ok(format!("{name}={pinned}"));
            }
            let current = versions.first().map(String::as_str).unwrap_or_default();
            self.say(format!("note: {name} {pinned} is no longer in the archive; using {current}"));
            Ok(name.to_owned())
        };
        pins.iter().map(resolve).collect()
    }

    /// Downloads one package into `dir` and unpacks it into `root`.
    pub(crate) fn unpack(&self, request: &str, dir: &Path, root: &Path) -> Result<()> {
        let mut download = Command::new("apt-get");
        download.args(["-q", "-o", "APT::Sandbox::User=root", "download", request]).current_dir(dir);
        output(&mut download)?;
        let package = find_deb(dir, request.split('=').next().unwrap_or(request))?;
        output(Command::new("dpkg-deb").arg("-x").arg(&package).arg(root))?;
        fs::remove_file(&package).map_err(at("remove", &package))
    }
}

/// What `package` depends on first: a metapackage's real package, whose name has a version in it.
pub(crate) fn first_dependency(request: &str) -> Result<String> {
    let shown = output(Command::new("apt-cache").args(["show", "--no-all-versions", request]))?;
    let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: "));
    let name = depends.and_then(|list| list.split([' ', ',']).next());
    name.map(str::to_owned).ok_or_else(|| Error::NoPackage { package: request.to_owned() })
}

/// Versions that the archive has of each package, the one that apt would choose first; asks the archive anew when apt
/// does not know one.
fn available(pins: &[Pin<'_>]) -> Result<HashMap<String, Vec<String>>> {
    let ask = || -> Result<HashMap<String, Vec<String>>> {
        let table = output(Command::new("apt-cache").arg("madison").args(pins.iter().map(|pin| pin.name)))?;
        let mut versions = HashMap::<String, Vec<String>>::new();
        for line in table.lines() {
            let mut columns = line.split('|').map(|column| column.trim().to_owned());
            if let (Some(name), Some(version)) = (columns.next(), columns.next()) {
                versions.entry(name).or_default().push(version);
            }
        }
        Ok(versions)
    };
    // Without any package list apt-cache fails: that too is mended by the update below.
    let known = ask().unwrap_or_default();
    if pins.iter().all(|pin| known.contains_key(pin.name)) {
        return Ok(known);
    }
    output(Command::new("apt-get").args(["-q", "update"]))?;
    ask()
}

fn find_deb(dir: &Path, package: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).map_err(at("list", dir))?;
    let is_it = |path: &PathBuf| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        name.starts_with(&format!("{package}_")) && name.ends_with(".deb")
    };
    let found = entries.flatten().map(|entry| entry.path()).find(is_it);
    found.ok_or_else(|| Error::NoPackage { package: package.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_hold_names_and_versions() {
        let text = "# c\n[a]\nx 1.0-1\n\n[b]\ny 2:3\nz 4\n";
        assert_eq!(section(text, "b").unwrap(), [Pin { name: "y", version: "2:3" }, Pin { name: "z", version: "4" }]);
        assert!(section(text, "c").unwrap().is_empty());
        assert!(section("[a]\nnoversion", "a").is_err());
    }

    #[test]
    fn the_committed_list_is_readable() {
        for name in ["kernel", "tiny", "web"] {
            assert!(!section(PINS, name).unwrap().is_empty(), "{name}");
        }
    }
}
