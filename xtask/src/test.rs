//! `cargo xtask test`: every test, from units to clusters of emulated machines.
//!
//! Everything is built by one command, so that no crate is compiled twice with other features. Then each test program is
//! run by itself: those of the package `bedplate-tests`, which start machines, one test at a time. Beside them the fuzz
//! targets run, a minute each.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use bedplate_tests::Artifacts;
use serde_json::Value;

use crate::{build, fuzz, images, setup};

/// A test program.
pub struct Suite {
    package_dir: PathBuf,
    /// The package's folder, a slash, the program's name.
    pub name: String,
    program: PathBuf,
}

impl Suite {
    /// The program as it is to be run: where, and told of `artifacts`.
    pub fn command(&self, artifacts: &Artifacts) -> Command {
        let mut command = Command::new(&self.program);
        command.current_dir(&self.package_dir).stdin(Stdio::null());
        artifacts.tell(&mut command);
        command
    }
}

#[derive(Default)]
struct Totals {
    passed: u64,
    failed: u64,
    /// One line each: what and why.
    skipped: BTreeSet<String>,
    /// One line each: program and test.
    failures: Vec<String>,
}

/// Installs, builds, runs; an error when a test failed.
pub fn run(filter: Option<&str>) -> Result<()> {
    let start = Instant::now();
    setup::run()?;
    let suites = build_all()?;
    let targets = if filter.is_none() { fuzz::build()? } else { Vec::new() };
    let built = start.elapsed();
    let artifacts = images::make(&|line| println!("{line}"))?;
    let imaged = start.elapsed();
    let mut totals = Totals::default();
    // Beside the others, at the lowest priority: most of them leave a processor idle most of the time.
    let fuzzing = thread::spawn(move || targets.iter().map(|target| target.run(fuzz::A_MINUTE)).collect::<Vec<_>>());
    for suite in suites.iter().filter(|suite| filter.is_none_or(|wanted| suite.name.contains(wanted))) {
        run_suite(suite, &artifacts, &mut totals)?;
    }
    let fuzzed = fuzzing.join().map_err(|_| anyhow!("the thread that runs the fuzz targets panicked"))?;
    if !fuzzed.is_empty() {
        println!("\n     fuzz targets, {} s each", fuzz::A_MINUTE);
    }
    for result in fuzzed {
        match result {
            Ok(line) => {
                println!("{line}");
                totals.passed += 1;
            }
            Err(error) => {
                totals.failures.push(format!("failed: fuzz {error:#}"));
                totals.failed += 1;
            }
        }
    }
    for line in totals.skipped.iter().chain(&totals.failures) {
        println!("{line}");
    }
    println!(
        "times: build {:.0} s, images {:.0} s, tests {:.0} s",
        built.as_secs_f64(),
        (imaged - built).as_secs_f64(),
        (start.elapsed() - imaged).as_secs_f64()
    );
    println!("{} passed, {} failed, {} skipped", totals.passed, totals.failed, totals.skipped.len());
    if totals.failed > 0 {
        bail!("{} tests failed", totals.failed);
    }
    Ok(())
}

/// Builds every program and test of the workspace, and lists the tests.
pub fn build_all() -> Result<Vec<Suite>> {
    let mut child = build::cargo_command(&[
        "build",
        "--release",
        "--workspace",
        "--all-targets",
        "--message-format=json-render-diagnostics",
    ])
    .stdout(Stdio::piped())
    .spawn()
    .context("run cargo")?;
    let messages = BufReader::new(child.stdout.take().context("no pipe from cargo")?);
    let mut suites = Vec::new();
    for message in messages.lines() {
        suites.extend(serde_json::from_str::<Value>(&message?).ok().as_ref().and_then(suite));
    }
    if !child.wait()?.success() {
        bail!("the build failed");
    }
    // Light ones first: what fails there explains what fails later.
    suites.sort_by_key(|suite| (is_lab(suite), suite.package_dir.clone(), suite.name.clone()));
    Ok(suites)
}

/// The test program that one of cargo's messages speaks of.
fn suite(message: &Value) -> Option<Suite> {
    let is_bench = message["target"]["kind"].as_array()?.iter().any(|kind| kind == "bench");
    if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true || is_bench {
        return None;
    }
    let package_dir = Path::new(message["manifest_path"].as_str()?).parent()?.to_owned();
    let folder = package_dir.file_name()?.to_string_lossy().into_owned();
    let name = format!("{folder}/{}", message["target"]["name"].as_str()?);
    Some(Suite { package_dir, name, program: message["executable"].as_str()?.into() })
}

fn is_lab(suite: &Suite) -> bool {
    suite.name.starts_with("tests/")
}

/// Runs one program; prints its tests, and of what they printed only why one was skipped or failed.
fn run_suite(suite: &Suite, artifacts: &Artifacts, totals: &mut Totals) -> Result<()> {
    println!("\n     {}", suite.name);
    let mut command = suite.command(artifacts);
    command.arg("--show-output").stdout(Stdio::piped());
    if is_lab(suite) {
        command.arg("--test-threads=1");
    }
    let mut child = command.spawn().with_context(|| format!("run {}", suite.program.display()))?;
    let lines = BufReader::new(child.stdout.take().context("no pipe from the tests")?);
    let (mut in_successes, failed_before) = (false, totals.failed);
    for line in lines.lines() {
        let line = line?;
        match line.as_str() {
            "successes:" => in_successes = true,
            "failures:" => in_successes = false,
            _ => {}
        }
        count(&line, totals);
        let failed = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"));
        totals.failures.extend(failed.map(|test| format!("failed: {}: {test}", suite.name)));
        if let Some(why) = line.strip_prefix("skipped: ") {
            totals.skipped.insert(format!("skipped: {}: {why}", suite.name));
        } else if line.starts_with("test result:")
            || (!in_successes && !line.trim().is_empty() && line != "running 0 tests")
        {
            println!("{line}");
        }
    }
    let status = child.wait()?;
    // One that died has told no result, or another one than its tests'.
    if !status.success() && totals.failed == failed_before {
        println!("{} ended with {status}", suite.name);
        totals.failed += 1;
    }
    Ok(())
}

/// Adds what a line such as `test result: ok. 3 passed; 0 failed; 1 ignored; …` says.
fn count(line: &str, totals: &mut Totals) -> bool {
    let Some(result) = line.strip_prefix("test result: ") else { return false };
    let number = |what: &str| -> u64 {
        let before = result.split([';', '.']).find_map(|part| part.trim().strip_suffix(what));
        before.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
    };
    totals.passed += number("passed");
    totals.failed += number("failed");
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_added_up() {
        let mut totals = Totals::default();
        assert!(count("test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out", &mut totals));
        assert!(count("test result: ok. 10 passed; 0 failed; 0 ignored", &mut totals));
        assert!(!count("test x ... ok", &mut totals));
        assert_eq!((totals.passed, totals.failed), (13, 2));
    }

    #[test]
    fn only_test_programs_are_suites() {
        let message = |kind: &str, test: bool| {
            serde_json::json!({"reason": "compiler-artifact", "manifest_path": "/r/vmm/Cargo.toml", "executable": "/t/x",
                "profile": {"test": test}, "target": {"kind": [kind], "name": "boot"}})
        };
        assert_eq!(suite(&message("lib", true)).unwrap().name, "vmm/boot");
        assert!(suite(&message("bin", false)).is_none());
        assert!(suite(&message("bench", true)).is_none());
    }
}
