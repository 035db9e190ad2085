//! Processes of this program, and what they cost.

use std::fmt;
use std::fs::read_to_string;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// Of `utime` and `stime` in proc(5): the same on every x86.
const TICKS_A_SECOND: f64 = 100.0;

/// Seconds of processor time that the process `id` has taken, its own and the kernel's for it.
pub fn cpu_seconds(id: &str) -> f64 {
    let stat = read_to_string(format!("/proc/{id}/stat")).unwrap();
    // The name, in brackets, may hold anything; the two are the 14th and 15th field, and the name is the second.
    let (_, after_name) = stat.rsplit_once(')').unwrap();
    after_name.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<f64>().unwrap()).sum::<f64>()
        / TICKS_A_SECOND
}

/// What a client has to say at its end, in seconds.
#[derive(Debug, Clone, Copy)]
pub struct Took {
    /// Until everything was written, or of a node: until a VM could start.
    pub written: f64,
    /// Until everything would survive a power cut.
    pub synced: f64,
    /// Of processor time.
    pub cpu: f64,
}

impl fmt::Display for Took {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.written, self.synced, self.cpu)
    }
}

/// A life of this program, until this is dropped.
pub struct Life {
    child: Child,
    said: BufReader<std::process::ChildStdout>,
}

impl Life {
    pub fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let mut child = command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        Self { child, said }
    }

    /// The next line that it prints.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "a process has ended early: {line:?}");
        line.trim_end().to_owned()
    }

    pub fn cpu_seconds(&self) -> f64 {
        cpu_seconds(&self.child.id().to_string())
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        let _ended = (self.child.kill(), self.child.wait());
    }
}

/// Runs a client to its end.
pub fn run(arguments: &[&str]) -> Took {
    let line = Life::start(arguments).line();
    let mut figures = line.split(' ').map(|figure| figure.parse().unwrap());
    let mut next = || figures.next().unwrap();
    Took { written: next(), synced: next(), cpu: next() }
}
