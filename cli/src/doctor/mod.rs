//! `bedplate doctor`: what this machine can do, found out by doing it.

use std::path::PathBuf;

use comfy_table::Cell;
use serde::Serialize;

use crate::output::{self, Format, Health, PrintError};
use crate::place::{PlaceError, StoreArgs};
use crate::vmm;

pub mod guest;
mod host;
pub(crate) mod kvm;

/// `bedplate doctor`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  bedplate doctor\n  bedplate doctor -o json | jq '.[] | select(.state != \"ok\")'

Exits with 0 when `bedplate run` would work, else with 1.")]
pub struct Args {
    #[command(flatten)]
    store: StoreArgs,
    /// The VMM to try [default: beside this program, then in PATH]
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
}

/// The examination itself failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No place for the store.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Stdout is gone.
    #[error(transparent)]
    Print(#[from] PrintError),
}

/// How one thing stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// There, and works.
    Ok,
    /// Works in part, or slowly.
    Degraded,
    /// Not there, or does not work.
    Missing,
}

/// What was found about one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The thing.
    pub name: &'static str,
    /// How it stands.
    pub state: State,
    /// `bedplate run` needs it.
    pub required: bool,
    /// What was tried and what came of it.
    pub found: String,
    /// What the thing is for.
    pub purpose: &'static str,
    /// What to do; absent where nothing is to be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// One thing to examine.
struct Subject {
    name: &'static str,
    required: bool,
    purpose: &'static str,
}

impl Subject {
    const fn optional(name: &'static str, purpose: &'static str) -> Self {
        Self { name, required: false, purpose }
    }

    const fn required(name: &'static str, purpose: &'static str) -> Self {
        Self { name, required: true, purpose }
    }

    fn ok(self, found: impl Into<String>) -> Finding {
        self.finding(State::Ok, found, None)
    }

    fn degraded(self, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
        self.finding(State::Degraded, found, Some(remedy.into()))
    }

    fn missing(self, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
        self.finding(State::Missing, found, Some(remedy.into()))
    }

    fn finding(self, state: State, found: impl Into<String>, remedy: Option<String>) -> Finding {
        Finding { name: self.name, state, required: self.required, found: found.into(), purpose: self.purpose, remedy }
    }
}

/// Runs it. Returns the exit code.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args, format: Format) -> Result<u8, Error> {
    let store = args.store.dir()?;
    let vmm = vmm::locate(args.vmm.as_deref());
    let mut findings = kvm::examine(vmm);
    findings.extend(host::examine(&store));
    let works = works(&findings);
    match format {
        Format::Json => output::json(&findings)?,
        Format::Table => {
            output::list(format, &findings, "", &["THING", "STATE", "FOUND"], row)?;
            print_remedies(&findings)?;
            output::line(verdict(works))?;
        }
    }
    Ok(u8::from(!works))
}

fn works(findings: &[Finding]) -> bool {
    !findings.iter().any(|finding| finding.required && finding.state == State::Missing)
}

const fn verdict(works: bool) -> &'static str {
    if works {
        "\n`bedplate run` works here."
    } else {
        "\n`bedplate run` does not work here; `bedplate run --lab` may."
    }
}

fn row(finding: &Finding) -> Vec<Cell> {
    let health = match (finding.state, finding.required) {
        (State::Ok, _) => Health::Good,
        (State::Missing, true) => Health::Bad,
        _ => Health::Busy,
    };
    vec![Cell::new(finding.name), output::state(&output::word(&finding.state), health), Cell::new(&finding.found)]
}

fn print_remedies(findings: &[Finding]) -> Result<(), PrintError> {
    for finding in findings {
        if let Some(remedy) = &finding.remedy {
            output::line(&format!("\n{} is for {}.\n  → {remedy}", finding.name, finding.purpose))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_run_needs_decides() {
        let missing = |subject: Subject| subject.missing("gone", "get it");
        assert!(works(&[missing(Subject::optional("nft", "x")), Subject::required("kvm", "x").ok("fine")]));
        assert!(works(&[Subject::required("store", "x").degraded("small", "tidy up")]));
        assert!(!works(&[missing(Subject::required("kvm", "x"))]));
    }
}
