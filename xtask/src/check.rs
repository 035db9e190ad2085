//! `cargo xtask check`: formatting, lints, and the rules of ARCHITECTURE.md. A rule that no machine checks dies.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::build::{self, cargo, root};

/// A file beyond this does not fit in a head; split it by noun.
const LINES: usize = 600;

/// Runs every check; the first kind that fails ends it, with all its findings printed.
pub fn run() -> Result<()> {
    cargo(&["fmt", "--all", "--check"]).context("formatting: run `cargo fmt`")?;
    let findings = findings()?;
    for finding in &findings {
        eprintln!("{finding}");
    }
    if !findings.is_empty() {
        bail!("{} rules of ARCHITECTURE.md and CONTRIBUTING.md are broken", findings.len());
    }
    cargo(&["clippy", "--release", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"])?;
    println!("check: formatting, rules and lints are in order");
    Ok(())
}

fn findings() -> Result<Vec<String>> {
    let root = root();
    let sources = sources(&root)?;
    let mut findings = arrows(&root)?;
    for source in &sources {
        let text = fs::read_to_string(root.join(source)).with_context(|| format!("read {}", source.display()))?;
        findings.extend(rules(source, &text));
    }
    Ok(findings)
}

/// What one source file must not do.
fn rules(path: &Path, text: &str) -> Vec<String> {
    let name = path.to_string_lossy();
    let mut findings = Vec::new();
    let mut broken = |line: usize, rule: &str| findings.push(format!("{name}:{line}: {rule}"));
    let within = |dir: &str| path.starts_with(dir);
    // Written in two halves, so that this file keeps the rule too.
    let unfinished = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("unimpl", "emented!")];
    for (number, line) in text.lines().enumerate().map(|(index, line)| (index + 1, line)) {
        let code = line.split("//").next().unwrap_or(line);
        if unfinished.iter().any(|mark| line.contains(mark)) {
            broken(number, "unfinished work is an issue, not a comment");
        }
        // What ours is compared with does without us.
        let is_measure = within("benches") || within("tests/tests/compare");
        if code.contains("kvm_ioctls") && !within("vmm/src/kvm") && !is_measure && !within("xtask") {
            broken(number, "only vmm/src/kvm, the benches and the comparison name kvm_ioctls");
        }
        if within("devices/src") && ["kvm_bindings", "tokio", "async fn", "serde_json"].iter().any(|w| code.contains(w))
        {
            broken(number, "devices knows neither KVM nor async nor configuration files");
        }
        let may_use_anyhow = within("xtask") || within("tests") || name.ends_with("main.rs");
        if code.contains("anyhow") && !may_use_anyhow {
            broken(number, "anyhow stands only in main, xtask and tests; a library has an error enum");
        }
    }
    if text.lines().count() > LINES {
        broken(LINES, "the file is too long: split it by noun");
    }
    findings
}

/// Compares what each crate depends on with the arrows of ARCHITECTURE.md.
fn arrows(root: &Path) -> Result<Vec<String>> {
    let map = fs::read_to_string(root.join("ARCHITECTURE.md")).context("read ARCHITECTURE.md")?;
    let allowed = allowed(&map);
    let mut findings = Vec::new();
    for (krate, allowed) in &allowed {
        let manifest = root.join(krate).join("Cargo.toml");
        let text = fs::read_to_string(&manifest).with_context(|| format!("read {}", manifest.display()))?;
        for used in used(&text) {
            if !allowed.as_ref().is_none_or(|list| list.contains(&used)) {
                findings.push(format!("{krate}/Cargo.toml: ARCHITECTURE.md has no arrow from {krate} to {used}"));
            }
        }
    }
    if allowed.len() < 10 {
        findings.push("ARCHITECTURE.md: the crate map has changed its form; xtask/src/check.rs reads it".to_owned());
    }
    Ok(findings)
}

/// From the crate map, by folder: the folders that it may depend on; `None` for any.
fn allowed(map: &str) -> BTreeMap<String, Option<Vec<String>>> {
    let block = map.split("```").nth(1).unwrap_or_default();
    let row = |line: &str| {
        let name = line.split_whitespace().next()?;
        if line.starts_with(' ') || name == "text" {
            return None;
        }
        let targets = line.split_once('→').map_or("", |(_, targets)| targets).trim();
        let list = match targets {
            "anything" => None,
            "nothing of ours" => Some(Vec::new()),
            list => Some(list.split(", ").map(str::to_owned).collect()),
        };
        Some((name.to_owned(), list))
    };
    block.lines().filter_map(row).collect()
}

/// The folders of our crates that a manifest's `[dependencies]` name.
fn used(manifest: &str) -> Vec<String> {
    let section = manifest.split("\n[").find(|section| section.starts_with("dependencies]")).unwrap_or_default();
    let ours = section.lines().filter_map(|line| line.strip_prefix("bedplate-"));
    let names = ours.map(|rest| rest.split(['.', ' ', '=']).next().unwrap_or(rest));
    // One crate is named after its program, its folder after what it is.
    names.map(|name| if name == "node" { "node-agent" } else { name }.to_owned()).collect()
}

/// Every Rust file of the workspace, relative to `root`.
fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
            let path = entry?.path();
            let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if path.is_dir() && !hidden && path != build::target() && path != root.join("target") {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path.strip_prefix(root)?.to_owned());
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_see_what_they_forbid_and_nothing_else() {
        let broken = |path: &str, text: &str| rules(Path::new(path), text).len();
        assert_eq!(broken("devices/src/lib.rs", "use kvm_ioctls::Kvm;"), 1);
        assert_eq!(broken("tests/tests/compare/bare.rs", "use kvm_ioctls::Kvm;"), 0);
        assert_eq!(broken("vmm/src/kvm/vcpu.rs", "use kvm_ioctls::Kvm;"), 0);
        assert_eq!(broken("images/src/disk.rs", "// unlike anyhow\n"), 0);
        assert_eq!(broken("images/src/disk.rs", "use anyhow::Result;"), 1);
        assert_eq!(broken("cli/src/main.rs", "use anyhow::Result;"), 0);
        assert_eq!(broken("cli/src/run.rs", concat!("// TO", "DO: more")), 1);
        assert_eq!(broken("cli/src/run.rs", &"\n".repeat(LINES + 1)), 1);
    }

    #[test]
    fn the_crate_map_is_understood() {
        let map = "x\n```text\napi   types; nothing of ours below it\nvmm   one VM   → devices, api\n      more\nxtask all → anything\n```";
        let allowed = allowed(map);
        assert_eq!(allowed["vmm"], Some(vec!["devices".to_owned(), "api".to_owned()]));
        assert_eq!(allowed["xtask"], None);
        assert_eq!(used("[package]\n[dependencies]\nbedplate-node.workspace = true\nlibc = \"1\"\n"), ["node-agent"]);
    }
}
