//! `bedplate plan`: a dry run of the planner.

use super::{ControlArgs, Error, Session};
use crate::output::{self, Format};

/// `bedplate plan`
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  bedplate plan")]
pub struct Args {
    #[command(flatten)]
    control: ControlArgs,
}

/// Runs it.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args, format: Format) -> Result<(), Error> {
    let session = Session::open(&args.control.control)?;
    let plan = session.wait(session.client.plan())?;
    match format {
        Format::Json => output::json(&plan)?,
        Format::Table if plan.actions.is_empty() => output::note("Nothing to do: all is as it should be."),
        Format::Table => output::line(&plan.actions.join("\n"))?,
    }
    Ok(())
}
