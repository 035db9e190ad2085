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
  bench [NAME] [--rounds N] [--json] [--peer NAME=PATH]
           figures of whole nodes, 5 times or N times each, by a clock that counts instructions: `cold` starts of VMs whose
           image is elsewhere; `compare`, our VMM and statically linked ones given by --peer firecracker=PATH and
           --peer cloud-hypervisor=PATH (more behind the name tells builds apart), on the same work: starts, blocks, frames
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
        ["fuzz", ref rest @ ..] => match fuzz_options(rest) {
            Some((filter, seconds)) => fuzz::run(filter, seconds),
            None => return usage(),
        },
        ["bench", ref rest @ ..] => match bench::Options::parse(rest) {
            Some(options) => bench::run(&options),
            None => return usage(),
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

/// Which targets, and for how many seconds each.
fn fuzz_options<'a>(words: &[&'a str]) -> Option<(Option<&'a str>, u32)> {
    let (filter, words) = match *words {
        [filter, ref rest @ ..] if !filter.starts_with('-') => (Some(filter), rest),
        _ => (None, words),
    };
    match *words {
        [] => Some((filter, fuzz::A_MINUTE)),
        ["--seconds", seconds] => seconds.parse().ok().map(|seconds| (filter, seconds)),
        _ => None,
    }
}

fn usage() -> ExitCode {
    eprint!("{USAGE}");
    ExitCode::from(2)
}
