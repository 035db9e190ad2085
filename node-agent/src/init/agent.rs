//! The agent as a child of PID 1: started when the network is up, and again whenever it dies.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::cmdline::BootOptions;
use super::console::say;
use super::signals::{Ended, unblocked};

/// Where the agent reads the token: arguments of processes can be read by all, and the kernel's command line lasts.
const TOKEN_FILE: &str = "/run/bedplate/token";
/// TCP port of the agent of a node that was booted from the VMM image.
const PORT: u16 = 7071;
/// The first wait before it is started again, doubled each time.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest: the control node must not take the node for lost meanwhile, which it does after 15 s.
const MAX_WAIT: Duration = Duration::from_secs(4);
/// A run this long clears what was before.
const GOOD_RUN: Duration = Duration::from_secs(60);

/// See the module.
pub(super) struct Supervised {
    options: BootOptions,
    pid: Option<u32>,
    started: Instant,
    wait: Duration,
    /// When to start it; `None` while it runs, or may not yet.
    due: Option<Instant>,
    /// It was told to end, and is not started again.
    leaving: bool,
}

impl Supervised {
    /// An agent that waits for [`Supervised::allow`].
    pub fn new(options: BootOptions) -> Self {
        if let Err(e) = write_token(options.token.as_deref()) {
            say(&format!("the token could not be handed to the agent: {e}"));
        }
        Self { options, pid: None, started: Instant::now(), wait: FIRST_WAIT, due: None, leaving: false }
    }

    /// It may run from now on.
    pub fn allow(&mut self) {
        if self.pid.is_none() && self.due.is_none() {
            self.due = Some(Instant::now());
        }
    }

    /// How long until it is to be started.
    pub fn next_start(&self) -> Option<Duration> {
        self.due.map(|due| due.saturating_duration_since(Instant::now()))
    }

    /// Whether it runs.
    pub const fn is_running(&self) -> bool {
        self.pid.is_some()
    }

    /// Starts it, if it is to be started now.
    pub fn start_if_due(&mut self) {
        if self.due.is_none_or(|due| due > Instant::now()) {
            return;
        }
        self.due = None;
        self.started = Instant::now();
        let args = self.options.agent_args(TOKEN_FILE, PORT);
        let child = unblocked(Command::new("/proc/self/exe").args(args).stdin(Stdio::null())).spawn();
        match child {
            // Nobody waits for it through this handle: the main loop reaps all children alike.
            Ok(child) => self.pid = Some(child.id()),
            Err(e) => {
                say(&format!("the agent could not be started: {e}"));
                self.try_again();
            }
        }
    }

    /// Takes note that a process has ended, if it was the agent.
    pub fn note_end(&mut self, ended: &Ended) {
        if self.pid != Some(ended.pid) {
            return;
        }
        self.pid = None;
        if self.started.elapsed() >= GOOD_RUN {
            self.wait = FIRST_WAIT;
        }
        if self.leaving {
            return;
        }
        say(&format!("the agent has ended {}; it is started again in {} s", ended.outcome, self.wait.as_secs()));
        self.try_again();
    }

    fn try_again(&mut self) {
        self.due = Some(Instant::now() + self.wait);
        self.wait = (self.wait * 2).min(MAX_WAIT);
    }

    /// Tells it to stop every VM and to end.
    pub fn leave(&mut self) {
        self.leaving = true;
        let Some(pid) = self.pid.and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw) else { return };
        // It has ended at this very moment, or gets it.
        let _sent = kill_process(pid, Signal::POWER);
    }
}

fn write_token(token: Option<&str>) -> std::io::Result<()> {
    use std::io::Write;
    fs::create_dir_all("/run/bedplate")?;
    let Some(token) = token else { return Ok(()) };
    fs::OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(TOKEN_FILE)?
        .write_all(token.as_bytes())
}
