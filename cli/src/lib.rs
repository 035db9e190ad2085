//! The command `bedplate`, as a library, so that its parts can be tested.
//!
//! Three groups that share little: [`control`] speaks with a control node, [`image`] with the local image store (and
//! carries images between the two), [`run`] and [`doctor`] with this machine.

use clap::{CommandFactory, Parser, Subcommand};

pub mod capture;
mod console;
pub mod control;
pub mod doctor;
pub mod image;
pub mod net;
pub mod output;
pub mod place;
pub mod progress;
pub mod run;
pub mod rundir;
pub mod size;
pub mod terminal;
pub mod vmm;

pub use output::Format;

const EXIT_CODES: &str = "\
Exit codes:
  0    done; for `run`: the guest powered off or was reset, or you left it; for `doctor`: `run` would work
  1    failed; one line on stderr says what, why, and what to do
  2    the command line is wrong
  128+N  `run` was ended by signal N, after cleaning up

Colours appear on a terminal only, and never where NO_COLOR is set. Results go to stdout, all else to stderr.";

/// Virtual machines on this machine, and on a cluster of them.
#[derive(Debug, Parser)]
#[command(name = "bedplate", version, after_help = EXIT_CODES, max_term_width = 110)]
pub struct Cli {
    /// How results are printed: table or json
    #[arg(short, long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    #[arg(hide_possible_values = true, display_order = 900)]
    pub output: Format,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a VM from a disk image, its console on this terminal
    Run(run::Args),
    /// What this machine can do, by trying it, and what to do about what it cannot
    Doctor(doctor::Args),
    /// Images: of the local store, and between it and a control node
    Image(image::Args),
    /// The machines that a control node knows
    Node(control::node::Args),
    /// The free pool: what waits to be given something to do
    Pool(control::pool::Args),
    /// Tiers: numbers of like VMs that the control node keeps running
    Tier(control::tier::Args),
    /// Create and change tiers as a file says
    Apply(control::apply::Args),
    /// The VMs of a cluster
    Vm(control::vm::Args),
    /// What happened, and why
    Events(control::events::Args),
    /// What the control node would do now, and why
    Plan(control::plan::Args),
    /// Print a script that completes this command's words in a shell
    #[command(after_help = "Examples:\n  bedplate completion bash > /etc/bash_completion.d/bedplate\n  \
                            bedplate completion zsh > \"${fpath[1]}/_bedplate\"\n  \
                            bedplate completion fish > ~/.config/fish/completions/bedplate.fish")]
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Why a command failed: one line that names the thing, the cause and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A VM that cannot be run.
    #[error(transparent)]
    Run(#[from] run::Error),
    /// Something about this machine.
    #[error(transparent)]
    Doctor(#[from] doctor::Error),
    /// Something about images.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// Something about a control node.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// The result could not be printed.
    #[error(transparent)]
    Print(#[from] output::PrintError),
}

/// Does what the command line says. Returns the exit code.
///
/// # Errors
/// See [`Error`].
pub fn execute(cli: Cli) -> Result<u8, Error> {
    let format = cli.output;
    match cli.command {
        Command::Run(args) => return Ok(run::run(args)?),
        Command::Doctor(args) => return Ok(doctor::run(args, format)?),
        Command::Image(args) => image::run(args, format)?,
        Command::Node(args) => control::node::run(args, format)?,
        Command::Pool(args) => control::pool::run(args, format)?,
        Command::Tier(args) => control::tier::run(args, format)?,
        Command::Apply(args) => control::apply::run(args, format)?,
        Command::Vm(args) => control::vm::run(args, format)?,
        Command::Events(args) => control::events::run(args, format)?,
        Command::Plan(args) => control::plan::run(args, format)?,
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "bedplate", &mut script);
            output::line(String::from_utf8_lossy(&script).trim_end())?;
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
