//! Debian packages by name, in the versions that `packages.txt` pins as long as the archive has them.

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// Downloads each package, in its pinned version where the archive has it, and unpacks it into `root`. Of a
    /// metapackage, which is empty, it takes what that depends on first.
    pub(crate) fn unpack(&self, pins: &[Pin<'_>], dir: &Path, root: &Path) -> Result<()> {
        for pin in pins {
            // The lists of this machine may be older than the archive, and then name what is no longer there.
            self.unpack_one(pin, dir, root).or_else(|_| {
                output(Command::new("apt-get").args(["-q", "update"]))?;
                self.unpack_one(pin, dir, root)
            })?;
        }
        Ok(())
    }

    fn unpack_one(&self, pin: &Pin<'_>, dir: &Path, root: &Path) -> Result<()> {
        let versions = versions(pin.name)?;
        let newest = versions.first().ok_or_else(|| Error::NoPackage { package: pin.name.to_owned() })?;
        let version = versions.iter().find(|version| *version == pin.version).unwrap_or(newest);
        self.note(pin, version);
        let request = format!("{}={version}", pin.name);
        let request = real_package(&request)?.unwrap_or(request);
        let mut download = Command::new("apt-get");
        download.args(["-q", "-o", "APT::Sandbox::User=root", "download", &request]).current_dir(dir);
        output(&mut download)?;
        let package = find_deb(dir, request.split('=').next().unwrap_or(&request))?;
        output(Command::new("dpkg-deb").arg("-x").arg(&package).arg(root))?;
        fs::remove_file(&package).map_err(at("remove", &package))
    }

    /// Says so where `version` is not the pinned one.
    pub(crate) fn note(&self, pin: &Pin<'_>, version: &str) {
        if pin.version != version {
            self.say(format!("note: {} {} is no longer in the archive; using {version}", pin.name, pin.version));
        }
    }
}

/// Preferences for apt that choose the pinned versions where the archive has them.
pub(crate) fn preferences(pins: &[Pin<'_>]) -> String {
    // Above 500, the priority of what an archive has.
    let rule = |pin: &Pin<'_>| format!("Package: {}\nPin: version {}\nPin-Priority: 990\n\n", pin.name, pin.version);
    pins.iter().map(rule).collect()
}

/// Of a metapackage such as `linux-image-cloud-amd64`, the package with the version in its name.
fn real_package(request: &str) -> Result<Option<String>> {
    let shown = output(Command::new("apt-cache").args(["show", "--no-all-versions", request]))?;
    let is_meta = shown.lines().any(|line| line.contains("(meta-package)") || line == "Section: metapackages");
    let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: "));
    let first = depends.and_then(|list| list.split([' ', ',']).next()).map(str::to_owned);
    Ok(first.filter(|_| is_meta))
}

/// Versions of a package that apt knows, the one that it would choose first.
fn versions(package: &str) -> Result<Vec<String>> {
    let table = output(Command::new("apt-cache").args(["madison", package]))?;
    Ok(table.lines().filter_map(|line| Some(line.split('|').nth(1)?.trim().to_owned())).collect())
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
    fn preferences_name_each_pin() {
        let text = preferences(&[Pin { name: "a", version: "1-2" }, Pin { name: "b", version: "3" }]);
        assert!(text.contains("Package: a\nPin: version 1-2\nPin-Priority: 990\n\nPackage: b\n"), "{text}");
    }

    #[test]
    fn the_committed_list_is_readable() {
        for name in ["kernel", "tiny", "grub", "web", "web-dependencies"] {
            assert!(!section(PINS, name).unwrap().is_empty(), "{name}");
        }
    }
}
