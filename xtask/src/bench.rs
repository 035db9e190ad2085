//! `cargo xtask bench`: figures of whole nodes, from an emulated one whose clock counts instructions.
//!
//! What runs are scenarios of the test programs, which `cargo xtask test` runs, too, once and by the usual clock.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use bedplate_lab::accel;
use bedplate_tests::suite::{FIGURES, PEERS, ROUNDS};

use crate::{images, setup, test};

/// What can be measured: its name here, the test program, and the scenario in it.
const BENCHES: [(&str, &str, &str); 5] = [
    ("cold", "tests/agent", "a_cold_start_and_a_warm_one"),
    ("compare-starts", "tests/compare", "vmms_start_side_by_side"),
    ("compare-exits", "tests/compare", "vmms_handle_exits_side_by_side"),
    ("compare-blocks", "tests/compare", "vmms_move_blocks_side_by_side"),
    ("compare-frames", "tests/compare", "vmms_move_frames_side_by_side"),
];

/// How often each figure is taken unless told otherwise.
const A_FEW: u32 = 5;

/// Guests stand still in this kind of emulation now and then (docs/lab.md), which is no result. The more of them a round
/// starts the more often it is lost, so that each round is a node of its own.
const TRIES: u32 = 8;

const CLOCK: &str = "executed instructions of the node's one processor, 2 ns each";

/// What is asked for on the command line.
pub struct Options {
    /// Part of the names of what is to be measured.
    filter: Option<String>,
    /// How often each figure is taken.
    rounds: u32,
    /// VMMs to compare ours with: their names, which say how they are told what to run, and programs.
    peers: Vec<(String, PathBuf)>,
    /// The figures as JSON on stdout, and all that is said meanwhile on stderr.
    json: bool,
}

impl Options {
    /// `None` when the words make no sense.
    pub fn parse(words: &[&str]) -> Option<Self> {
        let mut options = Self { filter: None, rounds: A_FEW, peers: Vec::new(), json: false };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "--json" => options.json = true,
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
    let artifacts = images::make(&|line| eprintln!("{line}"))?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("figures");
    let mut all = Vec::new();
    for (name, program, scenario) in wanted() {
        let suite = suites.iter().find(|suite| suite.name == *program);
        let suite = suite.with_context(|| format!("there is no test program {program}"))?;
        eprintln!("\n     {name}: {rounds} times, clock: {CLOCK}");
        let (mut figures, mut lost) = (Vec::new(), 0);
        for _ in 0..rounds {
            let mut tries = 0..TRIES;
            while tries.next().is_some() {
                let mut command = suite.command(&artifacts);
                command.arg(scenario).env(accel::CHOICE, "counted").env(ROUNDS, "1");
                command.env(PEERS, peers.join(",")).env(FIGURES, &file).stdout(std::io::stderr());
                let _ = std::fs::remove_file(&file);
                if command.status().with_context(|| format!("run {program}"))?.success() {
                    break;
                }
                lost += 1;
                if tries.is_empty() {
                    bail!("{name}: none of {TRIES} tries came to its end; what the last one said is above");
                }
                eprintln!("     {name}: a try was lost; the next one");
            }
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            for line in text.lines() {
                add(&mut figures, serde_json::from_str(line).context("a figure of the test program's")?);
            }
        }
        eprintln!("     {name}: {lost} of {} tries were lost", lost + rounds);
        all.extend(figures.into_iter().map(|figure| (*name, figure)));
    }
    say(&all, options.json);
    Ok(())
}

/// What was measured of one side, each time.
#[derive(Debug, serde::Deserialize)]
struct Figure {
    what: String,
    of: String,
    unit: String,
    samples: Vec<f64>,
}

impl Figure {
    fn median(&self) -> f64 {
        self.samples[self.samples.len() / 2]
    }
}

/// Adds the samples of another round to those that there are.
fn add(figures: &mut Vec<Figure>, figure: Figure) {
    let same = |there: &&mut Figure| (&there.what, &there.of) == (&figure.what, &figure.of);
    match figures.iter_mut().find(same) {
        Some(there) => {
            there.samples.extend(figure.samples);
            there.samples.sort_by(f64::total_cmp);
        }
        None if figure.samples.is_empty() => {}
        None => figures.push(figure),
    }
}

/// Medians and spreads, and that of the first, which is ours, as a multiple of each other's.
fn say(all: &[(&str, Figure)], json: bool) {
    let mut told = Vec::new();
    for (name, figure) in all {
        let first = all.iter().find(|(other, first)| other == name && first.what == figure.what);
        let first = first.map(|(_, first)| first).filter(|first| first.of != figure.of);
        let ratio = first.map(|first| first.median() / figure.median());
        let Figure { what, of, unit, samples } = figure;
        let (median, least, most) = (figure.median(), samples[0], samples[samples.len() - 1]);
        let words = first.map_or_else(String::new, |first| {
            format!(", {} is {:.2} x of that", first.of, first.median() / figure.median())
        });
        if !json {
            println!("{what}, {of}: {median:.2} {unit} ({least:.2} to {most:.2}){words}");
        }
        told.push(serde_json::json!({"bench": name, "what": what, "of": of, "unit": unit, "clock": CLOCK,
            "median": median, "least": least, "most": most, "samples": samples, "ratio": ratio}));
    }
    if json {
        println!("{:#}", serde_json::Value::from(told));
    }
}
