//! Building the programs, and where everything lies.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Built for this target always: see .cargo/config.toml.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The repository.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Where cargo puts what it makes.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// A program that [`programs`] has built.
pub fn program(name: &str) -> PathBuf {
    target().join(TARGET).join("release").join(name)
}

/// Where images are kept.
pub fn image_cache() -> PathBuf {
    target().join("guest-images")
}

/// Builds every program of the workspace.
pub fn programs() -> Result<()> {
    cargo(&["build", "--release", "--workspace", "--bins"])
}

/// Cargo in the repository, as a person would start it there.
pub fn cargo_command(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    // `cargo run` tells us about xtask in these. Build scripts that look at them (ring's) would run again, and half of the
    // workspace with them, whenever a person's cargo and ours take turns.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&*name);
        }
    }
    command
}

/// Runs cargo in the repository, its output shown.
pub fn cargo(args: &[&str]) -> Result<()> {
    let status = cargo_command(args).status().context("run cargo")?;
    if !status.success() {
        bail!("cargo {} failed", args.join(" "));
    }
    Ok(())
}
