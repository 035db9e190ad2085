//! `cargo xtask bench`: figures of whole nodes, from an emulated one whose clock counts instructions.
//!
//! What runs are scenarios of the test programs, which `cargo xtask test` runs, too, once and by the usual clock.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use bedplate_lab::accel;
use bedplate_tests::suite::{PEERS, ROUNDS};

use crate::{images, setup, test};

/// What can be measured: its name here, the test program, and the scenario in it.
const BENCHES: [(&str, &str, &str); 2] =
    [("cold", "tests/agent", "a_cold_start_and_a_warm_one"), ("compare", "tests/compare", "vmms_start_side_by_side")];

/// How often each figure is taken unless told otherwise.
const A_FEW: u32 = 5;

/// Guests stand still in this kind of emulation now and then (docs/lab.md), which is no result.
const TRIES: u32 = 4;

/// What is asked for on the command line.
pub struct Options {
    /// Part of the names of what is to be measured.
    filter: Option<String>,
    /// How often each figure is taken.
    rounds: u32,
    /// VMMs to compare ours with: their names, which say how they are told what to run, and programs.
    peers: Vec<(String, PathBuf)>,
}

impl Options {
    /// `None` when the words make no sense.
    pub fn parse(words: &[&str]) -> Option<Self> {
        let mut options = Self { filter: None, rounds: A_FEW, peers: Vec::new() };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "--rounds" => options.rounds = words.next()?.parse().ok().filter(|rounds| *rounds > 0)?,
                "--peer" => {
                    let (name, path) = words.next()?.split_once('=')?;
                    let is_plain = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
                    // What is not known has no command line that could be written.
                    let is_known = ["firecracker", "cloud-hypervisor"].iter().any(|known| name.starts_with(known));
                    if !is_plain(name) || !is_known {
                        return None;
                    }
                    options.peers.push((name.to_owned(), path.into()));
                }
                name if !name.starts_with('-') && options.filter.is_none() => options.filter = Some(name.to_owned()),
                _ => return None,
            }
        }
        Some(options)
    }
}

/// Takes the figures that are asked for.
pub fn run(options: &Options) -> Result<()> {
    let (filter, rounds) = (options.filter.as_deref(), options.rounds);
    let wanted = || BENCHES.iter().filter(|(name, ..)| filter.is_none_or(|wanted| name.contains(wanted)));
    if wanted().next().is_none() {
        let names: Vec<_> = BENCHES.iter().map(|(name, ..)| *name).collect();
        bail!("no measurement has {:?} in its name; there is {}", filter.unwrap_or_default(), names.join(", "));
    }
    let mut peers = Vec::new();
    for (name, path) in &options.peers {
        // The test programs run elsewhere.
        let path = path.canonicalize().with_context(|| format!("find {name}, {}", path.display()))?;
        peers.push(format!("{name}={}", path.display()));
    }
    setup::run()?;
    let suites = test::build_all()?;
    let artifacts = images::make(&|line| println!("{line}"))?;
    for (name, program, scenario) in wanted() {
        let suite = suites.iter().find(|suite| suite.name == *program);
        let suite = suite.with_context(|| format!("there is no test program {program}"))?;
        println!("\n     {name}: {rounds} times, clock: executed instructions of the node's one processor, 2 ns each");
        let mut lost = 0;
        loop {
            let mut command = suite.command(&artifacts);
            command.arg(scenario).env(accel::CHOICE, "counted").env(ROUNDS, rounds.to_string());
            command.env(PEERS, peers.join(","));
            let status = command.status().with_context(|| format!("run {program}"))?;
            if status.success() {
                break;
            }
            lost += 1;
            if lost == TRIES {
                bail!("{name}: none of {TRIES} tries came to its end; what the last one said is above");
            }
            println!("     {name}: a try was lost; the next one");
        }
        println!("     {name}: {lost} of {} tries were lost", lost + 1);
    }
    Ok(())
}
