//! `bedplate`: see `bedplate --help` and `docs/cli.md`.

use std::process::ExitCode;

use bedplate_cli::{Cli, execute};
use clap::Parser;

fn main() -> ExitCode {
    match execute(Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("bedplate: {error}");
            ExitCode::from(1)
        }
    }
}
