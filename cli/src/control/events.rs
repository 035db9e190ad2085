//! `bedplate events`: the log of decisions and of what came of them.

use std::time::Duration;

use bedplate_api::control::Event;

use super::{ControlArgs, Error, Session};
use crate::output::{self, Format};

/// How often `--follow` asks.
const INTERVAL: Duration = Duration::from_millis(500);

/// `bedplate events`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  bedplate events\n  bedplate events --after 120 --follow\n  \
                        bedplate events -f -o json   # one event per line")]
pub struct Args {
    #[command(flatten)]
    control: ControlArgs,
    /// Only events with a greater number
    #[arg(long, default_value_t = 0, value_name = "NUMBER")]
    after: u64,
    /// Go on printing new events until Ctrl-C
    #[arg(short, long)]
    follow: bool,
}

/// Runs it.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args, format: Format) -> Result<(), Error> {
    let session = Session::open(&args.control.control)?;
    if args.follow {
        return follow(&session, args.after, format);
    }
    let events = session.wait(session.client.events(args.after))?;
    match format {
        Format::Json => output::json(&events)?,
        Format::Table if events.is_empty() => output::note("Nothing has happened yet."),
        Format::Table => events.iter().try_for_each(|event| output::line(&text(event)))?,
    }
    Ok(())
}

/// Never returns but with an error: Ctrl-C ends it.
fn follow(session: &Session, mut after: u64, format: Format) -> Result<(), Error> {
    loop {
        for event in session.wait(session.client.events(after))? {
            match format {
                Format::Json => output::line(&serde_json::to_string(&event).map_err(output::PrintError::from)?)?,
                Format::Table => output::line(&text(&event))?,
            }
            after = after.max(event.number);
        }
        std::thread::sleep(INTERVAL);
    }
}

fn text(event: &Event) -> String {
    format!("{:>5}  {}  {:<10}  {}", event.number, output::time(event.time), event.subject, event.message)
}
