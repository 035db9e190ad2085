//! VM processes: started so that they outlive the agent, found again, watched by pidfd.
//!
//! A process is a VM's if its arguments name the VM's configuration file. It is the same one as before if it started at
//! the same clock tick. The pidfd is opened before both are checked, so that a number that is used again is noticed.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use bedplate_api::VmId;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, Ready};

use super::cgroup::Cgroup;
use super::dir::VmDir;
use super::outcome::{Outcome, Records};
use super::user;
use crate::agent::model::Process;
use crate::clock::Millis;

/// Clock ticks in `/proc`: `USER_HZ`, which is 100 on every Linux of our architecture, whatever the kernel's own clock.
const TICKS_PER_SECOND: u64 = 100;
/// How long process 1 may take to reap what has ended; one that is not ours might never.
const REAPED: Duration = Duration::from_secs(1);
/// How often is looked meanwhile: nobody but a parent can wait for it.
const REAPED_POLL: Duration = Duration::from_millis(5);

/// A process that was started or adopted, and that is watched.
#[derive(Debug)]
pub struct Watched {
    process: Process,
    pidfd: AsyncFd<OwnedFd>,
}

impl Watched {
    /// Who it is.
    pub const fn process(&self) -> Process {
        self.process
    }

    /// Waits for its end. How it ended is known of a process that this agent started itself, and of an adopted one
    /// where process 1 keeps records.
    pub async fn ended(&self) -> Option<Outcome> {
        // The descriptor becomes readable when the process ends, and stays so. An error of epoll would be our bug; to
        // look at the process then is as good as any answer.
        let _ready: io::Result<_> =
            self.pidfd.ready(Interest::READABLE).await.map(|guard| guard.ready() == Ready::READABLE);
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match rustix::process::waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), options) {
            Ok(status) => status.as_ref().and_then(Outcome::of),
            // Not our child.
            Err(_) => self.recorded(&Records::default()).await,
        }
    }

    /// What process 1 writes down of it before it takes it out of `/proc`.
    async fn recorded(&self, records: &Records) -> Option<Outcome> {
        let deadline = tokio::time::Instant::now() + REAPED;
        loop {
            let is_gone = start_ticks(self.process.pid) != Some(self.process.start_ticks);
            // Looked for after that: a record is there before the process is gone.
            let outcome = records.take(self.process);
            if outcome.is_some() || is_gone || tokio::time::Instant::now() > deadline {
                return outcome;
            }
            tokio::time::sleep(REAPED_POLL).await;
        }
    }

    /// Kills it. That it has ended already is fine.
    pub fn kill(&self) {
        // The only possible error is that it is gone.
        let _gone = rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
    }
}

/// Starts the VMM `program` for the VM in `dir`: in its own session, so that no signal meant for the agent reaches it,
/// in a pid namespace of its own, and in `cgroup` from its first instruction on.
///
/// # Errors
/// The program cannot be executed, or its output file not be made.
pub fn spawn(program: &Path, id: VmId, dir: &VmDir, cgroup: Option<&Cgroup>) -> io::Result<Watched> {
    let procs = cgroup.map(Cgroup::open_procs).transpose()?;
    let stderr = File::create(dir.stderr())?;
    let mut serial = OsStr::new("socket:").to_owned();
    serial.push(dir.serial());
    let mut command = Command::new(program);
    command
        .args(["--id".as_ref(), OsStr::new(&id.to_string()), "--api-sock".as_ref(), dir.api().as_os_str()])
        .args(["--config-file".as_ref(), dir.config().as_os_str(), "--serial".as_ref(), &serial])
        .args(["--serial-log".as_ref(), dir.serial_log().as_os_str(), "--exit-file".as_ref(), dir.exit().as_os_str()])
        .args(user::of(id).into_iter().flat_map(|user| ["--uid", "--gid"].map(|word| format!("{word}={user}"))))
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(stderr.try_clone()?)
        .stderr(stderr);
    // SAFETY: the closure runs between fork and exec and makes system calls only: `setsid`, and a `write` of a constant to
    // a descriptor that was opened before the fork.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            match &procs {
                Some(procs) => rustix::io::write(procs, b"0").map(drop).map_err(Into::into),
                None => Ok(()),
            }
        });
    }
    watch_or_end(spawn_alone(&mut command)?, open)
}

/// Starts `command` as the only process of a pid namespace. Where this agent is not root it shares ours.
fn spawn_alone(command: &mut Command) -> io::Result<Child> {
    if !rustix::process::geteuid().is_root() {
        return command.spawn();
    }
    // A thread of its own: what it unshares holds for whatever it starts from then on.
    let alone = || {
        // SAFETY: the flag shares and separates neither memory nor descriptors.
        unsafe { unshare_unsafe(UnshareFlags::NEWPID) }?;
        command.spawn()
    };
    thread::scope(|scope| scope.spawn(alone).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

/// Watches `child` by what `open` opens. One that cannot be watched is ended: it would go on beside the next start.
fn watch_or_end(mut child: Child, open: impl FnOnce(u32) -> io::Result<Option<Watched>>) -> io::Result<Watched> {
    // Until somebody waits for it, the number of a child of ours is not used again.
    let why = match open(child.id()) {
        Ok(Some(watched)) => return Ok(watched),
        Ok(None) => io::Error::other("the process was gone before it could be watched"),
        Err(e) => e,
    };
    // That it has ended by itself is as good.
    let _ended = child.kill();
    child.wait()?;
    Err(why)
}

/// Watches `process`, if it still is the VMM whose configuration file is `config`.
///
/// # Errors
/// The kernel has no pidfd, or no room for one.
pub fn adopt(process: Process, config: &Path) -> io::Result<Option<Watched>> {
    let watched = open(process.pid)?.filter(|w| w.process == process);
    Ok(watched.filter(|_| config_of(process.pid).as_deref() == Some(config)))
}

fn open(pid: u32) -> io::Result<Option<Watched>> {
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
    let pidfd = match rustix::process::pidfd_open(raw, PidfdFlags::empty()) {
        Ok(fd) => fd,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let Some(start_ticks) = start_ticks(pid) else { return Ok(None) };
    // SAFETY: `pidfd` owns its descriptor, which stays open and the same until the `AsyncFd` is dropped.
    let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
    Ok(Some(Watched { process: Process { pid, start_ticks }, pidfd }))
}

/// Every process on this machine that names a configuration file, with that file.
pub fn find_all() -> Vec<(PathBuf, Process)> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let process = Process { pid, start_ticks: start_ticks(pid)? };
        Some((config_of(pid)?, process))
    })
    .collect()
}

/// What follows `--config-file` among the arguments of process `pid`. One that has ended and was not waited for has none.
fn config_of(pid: u32) -> Option<PathBuf> {
    let cmdline = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut args = cmdline.split(|b| *b == 0);
    args.find(|arg| *arg == b"--config-file")?;
    args.next().map(|arg| PathBuf::from(OsStr::from_bytes(arg)))
}

/// Clock ticks from the start of the machine to that of process `pid`.
pub(super) fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in brackets and may hold anything, brackets and blanks too; the start time
    // is the 22nd, the 20th after it.
    let (_, after) = stat.rsplit_once(')')?;
    after.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// When a process with these `start_ticks` started.
pub fn started_at(process: Process) -> Millis {
    Millis(process.start_ticks.saturating_mul(1000 / TICKS_PER_SECOND))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(dir: &Path) -> std::process::Child {
        Command::new("sh")
            .args(["-c", "read x", "sh", "--config-file"])
            .arg(dir.join("vmm.json"))
            .stdin(Stdio::piped())
            .spawn()
            .unwrap()
    }

    #[test]
    fn a_process_that_cannot_be_watched_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let child = sleeper(dir.path());
        let pid = child.id();
        let why = watch_or_end(child, |_| Err(io::Error::other("no room"))).unwrap_err();
        assert_eq!(why.to_string(), "no room");
        assert_ne!(config_of(pid).as_deref(), Some(&*dir.path().join("vmm.json")));
    }

    #[tokio::test]
    async fn a_process_is_found_by_its_configuration_file_and_its_end_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("vmm.json");
        let mut child = sleeper(dir.path());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let found = loop {
            // Between fork and exec the child still has our arguments.
            if let Some((_, p)) = find_all().into_iter().find(|(path, _)| *path == config) {
                break p;
            }
            assert!(std::time::Instant::now() < deadline);
            tokio::task::yield_now().await;
        };
        assert_eq!(found.pid, child.id());
        assert!(Millis::now().since(started_at(found)) < 60_000);

        let earlier = Process { start_ticks: found.start_ticks - 1, ..found };
        assert!(adopt(earlier, &config).unwrap().is_none(), "another process with the same number");
        assert!(adopt(found, Path::new("/other")).unwrap().is_none(), "a process of another VM");
        let watched = adopt(found, &config).unwrap().unwrap();
        drop(child.stdin.take());
        let outcome = watched.ended().await;
        // `read` at the end of its input fails.
        assert_eq!(outcome, Some(Outcome::Code(1)));
        // It was waited for already, through its pidfd; this only tells the handle.
        let _reaped = child.wait();
        assert!(adopt(found, &config).unwrap().is_none());
    }

    #[tokio::test]
    async fn how_an_adopted_process_ended_is_what_its_parent_wrote_before_it_reaped_it() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("vmm.json");
        let records = Records::at(dir.path().join("ended"));
        let mut child = sleeper(dir.path());
        let pid = Pid::from_child(&child);
        let watched = open(child.id()).unwrap().unwrap();
        assert!(records.bury(pid).is_none(), "it has not ended");
        child.kill().unwrap();
        // Until it has ended, without reaping it.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        rustix::process::waitid(WaitId::Pid(pid), options).unwrap();
        let (told, written) = records.bury(pid).unwrap();
        written.unwrap();
        assert_eq!(told, Outcome::Signal(9));
        assert_eq!(watched.recorded(&records).await, Some(told));
        assert_eq!(watched.recorded(&records).await, None, "taken once");
        assert!(adopt(watched.process(), &config).unwrap().is_none());
        // It was buried already; this only tells the handle.
        let _reaped = child.wait();
        assert_eq!(fs::read_dir(dir.path().join("ended")).unwrap().count(), 0);
    }
}
