//! `bedplate pool`: what is free.

use clap::Subcommand;
use comfy_table::Cell;

use super::{ControlArgs, Error, Session};
use crate::output::{self, Format};

/// `bedplate pool …`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  bedplate pool ls\n  bedplate pool ls -o json")]
pub struct Args {
    #[command(flatten)]
    control: ControlArgs,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the free machines (physical) and the free slots of hypervisor nodes (virtual)
    Ls,
}

/// Runs it.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args, format: Format) -> Result<(), Error> {
    let Action::Ls = args.action;
    let session = Session::open(&args.control.control)?;
    let pool = session.wait(session.client.pool())?;
    output::list(format, &pool, "The free pool is empty.", &["NAME", "KIND", "NODE"], |entry| {
        vec![Cell::new(&entry.name), Cell::new(output::word(&entry.kind)), Cell::new(&entry.node)]
    })?;
    Ok(())
}
