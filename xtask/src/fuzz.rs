//! `cargo xtask fuzz`: parsers and devices against inputs that learn from the branches they take.
//!
//! libFuzzer comes with the crate `libfuzzer-sys`; what it needs of the compiler are counters, which stable Rust passes on
//! to LLVM. There is no address sanitizer, which only other compilers have: what is found is a panic, an overflow, a hang,
//! or memory without end.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::build::{self, TARGET, cargo_command, root};
use crate::setup;

/// Where the targets are: packages of their own, each target a program.
const PACKAGES: [&str; 3] = ["devices/fuzz", "images/fuzz", "vmm/fuzz"];

/// What makes LLVM count: each edge, and what was compared with what.
const COUNTERS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing";

/// How long a target runs unless told otherwise, in seconds.
pub const A_MINUTE: u32 = 60;
/// An input that takes longer than this, in seconds, is a hang.
const HANG: u32 = 20;
/// Most MiB that a target may use.
const MEMORY_MIB: u32 = 2048;

/// One program, and the place of its inputs.
pub struct Target {
    name: String,
    program: PathBuf,
}

/// Runs the targets whose names contain `filter` for `seconds` each, and says what was found.
pub fn run(filter: Option<&str>, seconds: u32) -> Result<()> {
    setup::run()?;
    let mut targets = build()?;
    targets.retain(|target| filter.is_none_or(|wanted| target.name.contains(wanted)));
    if targets.is_empty() {
        bail!("no fuzz target has {:?} in its name", filter.unwrap_or_default());
    }
    let mut found = Vec::new();
    for target in &targets {
        match target.run(seconds) {
            Ok(line) => println!("{line}"),
            Err(error) => found.push(format!("{error:#}")),
        }
    }
    if !found.is_empty() {
        bail!("{}", found.join("\n"));
    }
    Ok(())
}

/// Builds all targets.
pub fn build() -> Result<Vec<Target>> {
    let mut targets = Vec::new();
    let into = build::target().join("fuzz");
    for package in PACKAGES {
        let manifest = root().join(package).join("Cargo.toml");
        let status = cargo_command(&["build", "--release", "--quiet", "--target", TARGET])
            .arg("--manifest-path")
            .arg(&manifest)
            .arg("--target-dir")
            .arg(&into)
            // In place of the static linking of .cargo/config.toml: libFuzzer is C++.
            .env("RUSTFLAGS", COUNTERS)
            .status()
            .context("run cargo")?;
        if !status.success() {
            bail!("the fuzz targets of {package} do not build");
        }
        let crate_name = package.split('/').next().unwrap_or(package);
        let programs = root().join(package).join("src/bin");
        for entry in fs::read_dir(&programs).with_context(|| format!("list {}", programs.display()))? {
            let path = entry?.path();
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let program = into.join(TARGET).join("release").join(&name);
            targets.push(Target { name: format!("{crate_name}/{name}"), program });
        }
    }
    targets.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(targets)
}

impl Target {
    /// Lets it run, at the lowest priority; says how far it came. An error names the input that did it.
    pub fn run(&self, seconds: u32) -> Result<String> {
        // What was found to be interesting is kept for the next time.
        let dir = build::target().join("fuzz").join("inputs").join(&self.name);
        let corpus = dir.join("corpus");
        fs::create_dir_all(&corpus).with_context(|| format!("make {}", corpus.display()))?;
        let log = dir.join("log");
        // Files that a target makes are there, and go with it.
        let files = dir.join("files");
        fs::create_dir_all(&files).with_context(|| format!("make {}", files.display()))?;
        let mut child = Command::new("nice")
            .args(["-n", "19"])
            .arg(&self.program)
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-timeout={HANG}"))
            .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
            // Among the others, so that what ended a target is what its next run begins with.
            .arg(format!("-artifact_prefix={}/", corpus.display()))
            .arg("-print_final_stats=1")
            .arg(&corpus)
            .env("TMPDIR", &files)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("run {}", self.program.display()))?;
        let lines = BufReader::new(child.stderr.take().context("no pipe from the target")?);
        let mut file = File::create(&log).with_context(|| format!("make {}", log.display()))?;
        let (mut executions, mut edges) = (String::from("?"), String::from("?"));
        for line in lines.lines() {
            let line = line?;
            writeln!(file, "{line}")?;
            if let Some(count) = line.strip_prefix("stat::number_of_executed_units:") {
                executions = count.trim().to_owned();
            } else if let Some(count) = line.split_once("cov: ").and_then(|(_, rest)| rest.split_whitespace().next()) {
                edges = count.to_owned();
            }
        }
        let ended = child.wait();
        fs::remove_dir_all(&files).with_context(|| format!("remove {}", files.display()))?;
        if !ended?.success() {
            let shown = fs::read_to_string(&log)?;
            let panic = shown.lines().find(|line| line.contains("panicked at") || line.starts_with("SUMMARY"));
            bail!(
                "{}: {}; the input is in {}, what was said in {}",
                self.name,
                panic.unwrap_or("it ended badly"),
                corpus.display(),
                log.display()
            );
        }
        Ok(format!("fuzz {} ... ok, {executions} inputs, {edges} edges", self.name))
    }
}
