//! A kernel's modules, and what each needs loaded before it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{Archive, Error, Result};

/// The module tree of one kernel version, `/lib/modules/{version}` of some root, after `depmod`.
#[derive(Debug)]
pub struct Modules {
    tree: PathBuf,
    version: String,
    /// By normalised name: path below the tree, and the paths of all that it needs.
    by_name: HashMap<String, (String, Vec<String>)>,
}

impl Modules {
    /// Reads `modules.dep` of `tree`.
    pub fn open(tree: &Path) -> Result<Self> {
        let index = tree.join("modules.dep");
        let text = fs::read_to_string(&index).map_err(|source| Error::path("read", &index, source))?;
        let version = tree.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { tree: tree.to_owned(), version, by_name: parse(&text) })
    }

    /// The kernel's version, as `uname -r` prints it.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The paths, below the tree, of `names` and of all that they need, in an order in which they can be loaded.
    pub fn closure(&self, names: &[&str]) -> Result<Vec<String>> {
        let mut order: Vec<String> = Vec::new();
        for name in names {
            let (path, needs) = self
                .by_name
                .get(&normal(name))
                .ok_or_else(|| Error::NoModule { name: (*name).to_owned(), tree: self.tree.clone() })?;
            // depmod lists what a module needs from the nearest to the farthest; the farthest goes first.
            for step in needs.iter().rev().chain(std::iter::once(path)) {
                if !order.contains(step) {
                    order.push(step.clone());
                }
            }
        }
        Ok(order)
    }

    /// Adds `names`, all that they need, and the part of `modules.dep` that speaks of them, under `/lib/modules`.
    pub fn add_to(&self, archive: &mut Archive, names: &[&str]) -> Result<()> {
        let base = format!("/lib/modules/{}", self.version);
        let mut index = String::new();
        for path in self.closure(names)? {
            archive.copy(&format!("{base}/{path}"), 0o644, &self.tree.join(&path))?;
            let needs = self.by_name.get(&normal(stem(&path))).map(|(_, needs)| needs.join(" ")).unwrap_or_default();
            index.push_str(format!("{path}: {needs}").trim_end());
            index.push('\n');
        }
        archive.file(&format!("{base}/modules.dep"), 0o644, index);
        Ok(())
    }
}

fn parse(text: &str) -> HashMap<String, (String, Vec<String>)> {
    let line = |line: &str| {
        let (path, needs) = line.split_once(':')?;
        Some((normal(stem(path)), (path.to_owned(), needs.split_whitespace().map(str::to_owned).collect())))
    };
    text.lines().filter_map(line).collect()
}

/// `kernel/arch/x86/kvm/kvm-amd.ko` is the file of the module `kvm-amd`.
fn stem(path: &str) -> &str {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.split(".ko").next().unwrap_or(name)
}

/// `-` and `_` are the same letter in a module's name.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = "kernel/kvm/kvm.ko: kernel/lib/irqbypass.ko\n\
                         kernel/kvm/kvm-amd.ko: kernel/crypto/ccp.ko kernel/kvm/kvm.ko kernel/lib/irqbypass.ko\n\
                         kernel/lib/irqbypass.ko:\nkernel/crypto/ccp.ko:\n";

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("6.1.0");
        for file in ["kernel/kvm/kvm.ko", "kernel/kvm/kvm-amd.ko", "kernel/lib/irqbypass.ko", "kernel/crypto/ccp.ko"] {
            fs::create_dir_all(tree.join(file).parent().unwrap()).unwrap();
            fs::write(tree.join(file), file).unwrap();
        }
        fs::write(tree.join("modules.dep"), INDEX).unwrap();
        dir
    }

    #[test]
    fn what_a_module_needs_comes_before_it_and_once() {
        let dir = tree();
        let modules = Modules::open(&dir.path().join("6.1.0")).unwrap();
        let order = modules.closure(&["kvm_amd", "kvm"]).unwrap();
        assert_eq!(
            order,
            ["kernel/lib/irqbypass.ko", "kernel/kvm/kvm.ko", "kernel/crypto/ccp.ko", "kernel/kvm/kvm-amd.ko"]
        );
        let error = modules.closure(&["zfs"]).unwrap_err().to_string();
        assert!(error.contains("zfs"), "{error}");
    }

    #[test]
    fn an_archive_gets_the_files_and_their_index() {
        let dir = tree();
        let mut archive = Archive::new();
        Modules::open(&dir.path().join("6.1.0")).unwrap().add_to(&mut archive, &["kvm"]).unwrap();
        let text = String::from_utf8_lossy(&archive.bytes()).into_owned();
        assert!(text.contains("lib/modules/6.1.0/kernel/kvm/kvm.ko"));
        assert!(text.contains("kernel/kvm/kvm.ko: kernel/lib/irqbypass.ko\n"));
        assert!(!text.contains("ccp.ko"));
    }
}
