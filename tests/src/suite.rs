//! A test program with two lives: outside it boots an emulated node with itself as init, inside it runs the scenarios
//! there, where KVM works; the node's console carries the results. One boot serves all scenarios.
//!
//! Outside it takes libtest's place: same words, same exit code, filters by name.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use bedplate_lab::process::output;
use bedplate_lab::{Archive, Machine, MachineSpec, Modules};

use crate::Artifacts;
use crate::inside;

/// One thing that must work.
pub struct Scenario {
    /// Name, as in `test name ... ok`.
    pub name: &'static str,
    /// Runs inside the node; what it returns as an error is printed outside.
    pub run: fn() -> Result<()>,
}

/// What a suite needs of its node.
pub struct NodeSpec {
    /// Memory of the emulated machine.
    pub memory_mib: u64,
    /// Programs of ours that go into `/bin`.
    pub programs: &'static [&'static str],
    /// Programs of this machine's Debian, by their paths, which are the same in the node. Their libraries come along.
    pub debian: &'static [&'static str],
    /// How long the slowest scenario may take.
    pub patience: Duration,
}

/// Drivers for what the tests do inside: KVM, networks of VMs, vsock; and one that a guest gets from there.
const MODULES: [&str; 10] =
    ["virtio_pci", "virtio-rng", "kvm-amd", "kvm-intel", "tun", "bridge", "vhost_vsock", "vhost_net", "button", "msr"];

/// In the environment: how many times a scenario that measures takes each figure. Once is enough to see that it works.
pub const ROUNDS: &str = "BEDPLATE_TEST_ROUNDS";

/// In the environment, if it is `1`: the system calls of each thread are counted, and said at the end.
const CALLS: &str = "BEDPLATE_TEST_CALLS";

/// In the environment: programs of others to compare with, `NAME=PATH` with commas between them. The node has no libraries,
/// so they are linked statically.
pub const PEERS: &str = "BEDPLATE_TEST_PEERS";

/// In the environment: a file to which each figure is added, a line of JSON.
pub const FIGURES: &str = "BEDPLATE_TEST_FIGURES";

/// For an emulated machine to get to its init.
const BOOT: Duration = Duration::from_secs(180);

/// The whole of `main`.
pub fn main(name: &str, node: &NodeSpec, scenarios: &[Scenario]) -> ExitCode {
    if std::process::id() == 1 {
        inside::run(scenarios);
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let is_wanted =
        |scenario: &&Scenario| wanted.is_empty() || wanted.iter().any(|w| scenario.name.contains(w.as_str()));
    let chosen: Vec<&Scenario> = scenarios.iter().filter(is_wanted).collect();
    println!("\nrunning {} tests", chosen.len());
    let Some(artifacts) = Artifacts::or_skip(name) else {
        println!("\ntest result: ok. 0 passed; 0 failed; {} ignored; 0 measured; 0 filtered out", chosen.len());
        return ExitCode::SUCCESS;
    };
    let failures = outside(name, node, &artifacts, &chosen);
    for (scenario, why) in &failures {
        println!("\n---- {scenario} ----\n{why}");
    }
    let (verdict, passed) = (if failures.is_empty() { "ok" } else { "FAILED" }, chosen.len() - failures.len());
    let filtered = scenarios.len() - chosen.len();
    println!(
        "\ntest result: {verdict}. {passed} passed; {} failed; 0 ignored; 0 measured; {filtered} filtered out",
        failures.len()
    );
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Boots the node and listens. Returns the names of what failed, and why.
fn outside(name: &str, node: &NodeSpec, artifacts: &Artifacts, chosen: &[&Scenario]) -> Vec<(&'static str, String)> {
    let machine = match boot(name, node, artifacts, chosen) {
        Ok(machine) => machine,
        Err(error) => return chosen.iter().map(|scenario| (scenario.name, format!("{error:#}"))).collect(),
    };
    let (mut failures, mut figures_said, mut data_kept) = (Vec::new(), 0, 0);
    for scenario in chosen {
        let done = format!("{}{} ", inside::DONE, scenario.name);
        // The word after the name, to the end of the line: `ok`, or why not.
        let heard = until_done(&machine, &done, node.patience).and_then(|()| machine.wait_for("\n", BOOT));
        let why = match heard {
            Ok(line) => line.trim_end().rsplit(&done).next().unwrap_or_default().to_owned(),
            Err(error) => error.to_string(),
        };
        println!("test {} ... {}", scenario.name, if why == "ok" { "ok" } else { "FAILED" });
        let text = machine.console().text();
        let figures = text.lines().filter_map(|line| line.split_once(inside::FIGURE));
        // Each once: the console has those of earlier scenarios, too.
        figures.skip(figures_said).for_each(|(_, figure)| {
            println!("    {figure}");
            figures_said += 1;
        });
        let data = text.lines().filter_map(|line| line.split_once(inside::DATA)).skip(data_kept).map(|(_, data)| data);
        match keep(data) {
            Ok(kept) => data_kept += kept,
            Err(error) => failures.push((scenario.name, format!("{FIGURES}: {error}"))),
        }
        if why != "ok" {
            machine.console().keep_log();
            failures.push((scenario.name, why));
        }
    }
    if !failures.is_empty() {
        println!("the node's console is in {}", machine.console().log().display());
    }
    failures
}

/// Adds figures to the file that the environment names, if it does; how many.
fn keep<'a>(data: impl Iterator<Item = &'a str>) -> std::io::Result<usize> {
    let mut file = match std::env::var_os(FIGURES) {
        Some(path) => Some(std::fs::File::options().create(true).append(true).open(path)?),
        None => None,
    };
    let mut kept = 0;
    for line in data {
        if let Some(file) = &mut file {
            writeln!(file, "{line}")?;
        }
        kept += 1;
    }
    Ok(kept)
}

/// Waits for the end of a scenario. One that measures says its figures as it has them, and has as long for the next.
fn until_done(machine: &Machine, done: &str, patience: Duration) -> bedplate_lab::Result<()> {
    while machine.wait_for_any(&[done, inside::FIGURE], patience)?.0 != 0 {}
    Ok(())
}

/// `programs`, and the libraries of this machine that they are loaded with.
fn needed(programs: &[&str]) -> Result<BTreeSet<String>> {
    let mut paths = BTreeSet::new();
    for program in programs {
        let listed = output(std::process::Command::new("ldd").arg(program))?;
        // `libc.so.6 => /lib/… (0x…)`, and the loader itself by its path alone.
        let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(str::to_owned);
        paths.extend(listed.lines().filter_map(path));
        paths.insert((*program).to_owned());
    }
    Ok(paths)
}

fn boot(name: &str, node: &NodeSpec, artifacts: &Artifacts, chosen: &[&Scenario]) -> Result<Machine> {
    let mut archive = Archive::new();
    let myself = std::env::current_exe().context("find this program")?;
    let dir = tempfile::tempdir()?;
    let mut add = |path: &str, program: &Path| -> Result<()> {
        let stripped = dir.path().join("stripped");
        output(std::process::Command::new("strip").arg("-o").arg(&stripped).arg(program))?;
        archive.copy(path, 0o755, &stripped)?;
        Ok(())
    };
    add("/init", &myself)?;
    for program in node.programs {
        add(&format!("/bin/{program}"), &artifacts.program(program))?;
    }
    for path in needed(node.debian)? {
        archive.copy(&path, 0o755, Path::new(&path))?;
    }
    for peer in std::env::var(PEERS).unwrap_or_default().split_terminator(',') {
        let (name, path) = peer.split_once('=').with_context(|| format!("{PEERS}: {peer:?} is not NAME=PATH"))?;
        archive.copy(&format!("{}/{name}", inside::PEERS), 0o755, Path::new(path))?;
    }
    archive.character_device("/dev/console", 5, 1);
    let modules = Modules::open(&artifacts.modules)?;
    for (number, path) in modules.closure(&MODULES)?.iter().enumerate() {
        let file = path.rsplit('/').next().unwrap_or(path);
        archive.copy(&format!("/modules/{number:02}-{file}"), 0o644, &artifacts.modules.join(path))?;
    }
    for (to, from) in [
        (inside::BZIMAGE, &artifacts.vmm_kernel),
        (inside::ELF, &artifacts.tiny_kernel_elf),
        (inside::INITRD, &artifacts.tiny_initrd),
        (inside::DISK, &artifacts.tiny_disk),
        (inside::GRUB_DISK, &artifacts.grub_disk),
        (inside::FIRMWARE, &artifacts.firmware),
        ("/bin/busybox", &artifacts.busybox),
    ] {
        archive.copy(to, 0o755, from)?;
    }
    let names: Vec<&str> = chosen.iter().map(|scenario| scenario.name).collect();
    archive.file(inside::CHOICE, 0o644, names.join("\n"));
    let initrd = dir.path().join("initrd");
    std::fs::write(&initrd, archive.bytes())?;
    let rounds = std::env::var(ROUNDS).unwrap_or_default();
    let stagger = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), name) >> 32;
    let calls = if std::env::var(CALLS).is_ok_and(|value| value == "1") { inside::CALLS } else { "" };
    let cmdline =
        format!("console=ttyS0 panic=-1 quiet {calls} {}{rounds} {}{stagger}", inside::ROUNDS, inside::STAGGER);
    let spec = MachineSpec::new(format!("node-of-{name}"), &artifacts.logs).memory_mib(node.memory_mib);
    let machine = spec.kernel(&artifacts.vmm_kernel, &initrd, &cmdline).start()?;
    machine.wait_for(inside::UP, BOOT)?;
    Ok(machine)
}
