//! How a process ended, and how that reaches an agent that is not its parent.
//!
//! The kernel tells only the parent. A VMM that outlived its agent is a child of process 1, which writes down how it
//! ended *before* it reaps it: an agent that watches finds the record no later than it finds the process gone. Where
//! process 1 is not ours there are no records, and how an adopted VMM ended is not known.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, WaitId, WaitIdOptions, WaitIdStatus, waitid};
use serde::{Deserialize, Serialize};

use super::process::start_ticks;
use crate::agent::model::Process;
use crate::files::{self, FileError};

/// Where process 1 of the VMM image keeps them. In RAM: a process does not outlive the machine.
const RECORDS: &str = "/run/bedplate/ended";
/// Records beyond this are of processes that nobody asks after.
const MAX_RECORDS: usize = 1024;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Outcome {
    /// What `waitid` says of a process that has ended.
    pub fn of(status: &WaitIdStatus) -> Option<Self> {
        status.exit_status().map(Self::Code).or_else(|| status.terminating_signal().map(Self::Signal))
    }
}

/// For people: what stands after "was" or "has ended".
impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::Code(code) => write!(f, "with code {code}"),
            Self::Signal(signal) => write!(f, "by signal {signal}{}", signal_name(signal)),
        }
    }
}

/// The signals that programs die of, for people.
const fn signal_name(signal: i32) -> &'static str {
    match signal {
        libc::SIGKILL => " (SIGKILL)",
        libc::SIGSEGV => " (SIGSEGV)",
        libc::SIGABRT => " (SIGABRT)",
        libc::SIGBUS => " (SIGBUS)",
        libc::SIGSYS => " (SIGSYS)",
        libc::SIGTERM => " (SIGTERM)",
        _ => "",
    }
}

/// The directory of the records.
#[derive(Debug, Clone)]
pub struct Records(PathBuf);

impl Records {
    /// Those in `dir`, which need not exist.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }

    /// Reaps the child `pid`, which has ended, after writing down how. `None` if it has not ended, or is no child.
    pub fn bury(&self, pid: Pid) -> Option<(Outcome, Result<(), FileError>)> {
        let has_ended = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let status = waitid(WaitId::Pid(pid), has_ended | WaitIdOptions::NOWAIT).ok().flatten()?;
        let outcome = Outcome::of(&status)?;
        let written = self.put(pid.as_raw_pid().unsigned_abs(), outcome);
        // It has ended and is our child: this cannot fail.
        let _reaped = waitid(WaitId::Pid(pid), has_ended);
        Some((outcome, written))
    }

    /// Until it is reaped, the number of process `pid` is its own.
    fn put(&self, pid: u32, outcome: Outcome) -> Result<(), FileError> {
        // Reaped by somebody else already: nobody can be told which process this was.
        let Some(start_ticks) = start_ticks(pid) else { return Ok(()) };
        if fs::read_dir(&self.0).is_ok_and(|records| records.count() >= MAX_RECORDS) {
            files::remove_dir(&self.0)?;
        }
        fs::create_dir_all(&self.0).map_err(FileError::io("create", &self.0))?;
        files::write_json(&self.file(Process { pid, start_ticks }), &outcome)
    }

    /// Takes the record of `process` away and returns it.
    pub fn take(&self, process: Process) -> Option<Outcome> {
        let path = self.file(process);
        // One that cannot be read is as good as none: it only adds to what is told.
        let outcome = files::read_json(&path).ok().flatten();
        if outcome.is_some() {
            let _left = files::remove(&path);
        }
        outcome
    }

    fn file(&self, process: Process) -> PathBuf {
        self.0.join(format!("{}-{}.json", process.pid, process.start_ticks))
    }
}

impl Default for Records {
    fn default() -> Self {
        Self::at(Path::new(RECORDS))
    }
}
