//! Child processes that end with their owner.
//!
//! The kernel's parent-death signal follows the *thread* that forked, not the process. A test's thread ends long before
//! its process does, and a machine may be handed to another thread, so that one thread, which never ends, starts them all.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus};
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, getpid, getppid, pidfd_open, pidfd_send_signal, set_parent_process_death_signal,
};

use crate::{Error, Result};

type Job = (Command, Sender<io::Result<Child>>);

/// A child process: killed and reaped on drop, killed by the kernel when this process dies.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    /// Immune to reuse of the process id, and pollable.
    pidfd: OwnedFd,
}

impl Process {
    /// Starts `command`; `name` stands in error messages.
    pub fn start(name: impl Into<String>, command: Command) -> Result<Self> {
        let name = name.into();
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = spawn(command).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::MissingProgram { program: program.clone() },
            _ => Error::io(format!("start {name} ({program})"), source),
        })?;
        let opened = pid_of(&child).and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
        match opened {
            Ok(pidfd) => Ok(Self { name, child, pidfd }),
            Err(source) => {
                // Without a pidfd nobody would own it.
                let _ = child.kill();
                let _ = child.wait();
                Err(Error::io(format!("watch {name}"), source))
            }
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The pipe to its standard input, if it was asked for and not taken yet.
    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// The pipe from its standard output, if it was asked for and not taken yet.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// The pipe from its standard error, if it was asked for and not taken yet.
    pub fn take_stderr(&mut self) -> Option<ChildStderr> {
        self.child.stderr.take()
    }

    /// Sends `signal`; one that has ended already does not mind.
    pub fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it has ended, at most for `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match poll(&mut fds, Some(&timespec(left))) {
                Ok(0) => return Err(Error::StillRunning { name: self.name.clone(), pid: self.pid(), timeout }),
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(source) => return Err(Error::io(format!("wait for {}", self.name), source.into())),
            }
        }
        self.child.wait().map_err(|source| Error::io(format!("reap {}", self.name), source))
    }

    /// Waits for as long as it runs; for a console session, which a person ends.
    pub fn wait_forever(&mut self) -> Result<ExitStatus> {
        self.child.wait().map_err(|source| Error::io(format!("reap {}", self.name), source))
    }

    /// Asks it to end (SIGTERM); kills it when it has not within `grace`.
    pub fn stop(&mut self, grace: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM);
        self.wait(grace).or_else(|_| self.kill())
    }

    /// Kills it and reaps it.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::KILL);
        self.child.wait().map_err(|source| Error::io(format!("reap {}", self.name), source))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Runs `command` to its end and returns its standard output; an error holds what it said on standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let out = command.output().map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => {
            Error::MissingProgram { program: command.get_program().to_string_lossy().into_owned() }
        }
        _ => Error::io(format!("run {command:?}"), source),
    })?;
    if !out.status.success() {
        return Err(Error::Command {
            command: words(command),
            status: out.status.to_string(),
            stderr: last_lines(&String::from_utf8_lossy(&out.stderr)),
        });
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Program and arguments, as a person would type them; a long list is cut.
fn words(command: &Command) -> String {
    let all = std::iter::once(command.get_program()).chain(command.get_args());
    let line = all.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(160) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// The end of what a program said, where the reason usually is.
fn last_lines(said: &str) -> String {
    let lines: Vec<&str> = said.trim().lines().collect();
    lines[lines.len().saturating_sub(8)..].iter().map(|line| line.trim_end()).collect::<Vec<_>>().join("\n")
}

/// Hands `command` to the thread that starts processes.
fn spawn(mut command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    let parent = getpid();
    // SAFETY: between fork and exec only two system calls are made: nothing allocates, nothing takes a lock.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have died before the call above; then nobody will ever send the signal.
            if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
        });
    }
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, inbox) = mpsc::channel::<Job>();
        std::thread::spawn(move || {
            for (mut command, reply) in inbox {
                // The asker waits for the reply; if it is gone, so is the Child, and nothing is left to do.
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(jobs)
    });
    let (reply, answer) = mpsc::channel();
    let gone = || io::Error::other("the thread that starts processes has died");
    spawner.lock().map_err(|_| gone())?.send((command, reply)).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

fn pid_of(child: &Child) -> io::Result<Pid> {
    let raw = i32::try_from(child.id()).map_err(io::Error::other)?;
    Pid::from_raw(raw).ok_or_else(|| io::Error::other("process id 0"))
}

fn timespec(duration: Duration) -> Timespec {
    // A timeout beyond what fits (292 billion years) means for ever.
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_killed_when_dropped() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        let process = Process::start("sleeper", command).unwrap();
        let proc_entry = format!("/proc/{}", process.pid());
        assert!(std::path::Path::new(&proc_entry).exists());
        drop(process);
        assert!(!std::path::Path::new(&proc_entry).exists());
    }

    #[test]
    fn waiting_has_a_deadline_and_stopping_has_not() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        let mut process = Process::start("sleeper", command).unwrap();
        assert!(matches!(process.wait(Duration::from_millis(1)), Err(Error::StillRunning { .. })));
        assert!(!process.stop(Duration::from_secs(60)).unwrap().success());
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = Process::start("x", Command::new("/nonexistent/qemu")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/qemu is not there"), "{error}");
        let error = output(Command::new("sh").args(["-c", "echo because >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("because") && error.contains('3'), "{error}");
    }
}
