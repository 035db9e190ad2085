//! `cargo xtask`: build, check, test and show everything. Each command installs the Debian packages that it needs.

mod bench;
mod build;
mod check;
mod demo;
mod fuzz;
mod images;
mod setup;
mod test;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask COMMAND

  demo [--exit-when-ready] [--nodes N] [--vms-per-node N]
           two blank emulated machines become nodes, VMs boot on them and serve web pages
  test [SUITE]
           every test, from units to clusters of emulated machines; or of one program, such as tests/vmm
  fuzz [TARGET] [--seconds N]
           each fuzz target, or those whose names contain TARGET, for a minute or N seconds
  bench [NAME] [--rounds N]
           figures of whole nodes, 5 times or N times each, by a clock that counts instructions
  images   the VMM image, the sample image `web`, the tiny test image, into target/guest-images
  check    formatting, lints, and the rules of ARCHITECTURE.md
  setup    installs the Debian packages that the others need
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["demo", ref rest @ ..] => match demo::Options::parse(rest) {
            Some(options) => demo::run(&options),
            None => return usage(),
        },
        ["fuzz", ref rest @ ..] => match filter_and_number(rest, "--seconds", fuzz::A_MINUTE) {
            Some((filter, seconds)) => fuzz::run(filter, seconds),
            None => return usage(),
        },
        ["bench", ref rest @ ..] => match filter_and_number(rest, "--rounds", bench::A_FEW) {
            Some((filter, rounds @ 1..)) => bench::run(filter, rounds),
            _ => return usage(),
        },
        ["images"] => setup::run().and_then(|()| images::run()),
        ["test"] => test::run(None),
        ["test", filter] => test::run(Some(filter)),
        ["check"] => check::run(),
        ["setup"] => setup::run(),
        _ => return usage(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A part of a name, if there is one, and the number after `option`, or else `usual`.
fn filter_and_number<'a>(words: &[&'a str], option: &str, usual: u32) -> Option<(Option<&'a str>, u32)> {
    let (filter, words) = match *words {
        [filter, ref rest @ ..] if !filter.starts_with('-') => (Some(filter), rest),
        _ => (None, words),
    };
    match *words {
        [] => Some((filter, usual)),
        [name, number] if name == option => number.parse().ok().map(|number| (filter, number)),
        _ => None,
    }
}

fn usage() -> ExitCode {
    eprint!("{USAGE}");
    ExitCode::from(2)
}
