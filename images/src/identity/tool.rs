//! Running a program of e2fsprogs on a part of a disk whose content nobody vouches for.
//!
//! These programs are C, and a disk may have been made to break them. So they get nothing that they do not need: no
//! environment, no name of a file of the host, no way to privileges; of a process of root's they run as nobody. The disk
//! is handed to them as an open file.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, fchown};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Resource, Rlimit, Signal, geteuid, set_parent_process_death_signal, setrlimit};
use rustix::thread::set_no_new_privs;

use super::IdentityError;

/// The user and group "nobody".
const NOBODY: u32 = 65534;

/// Time for one program. Checking the largest disk with all its inodes in use takes some minutes.
const DEADLINE: Duration = Duration::from_secs(30 * 60);

/// Address space of one program. e2fsck wants some bits per block and some bytes per directory: below 1 GiB for 4 TiB.
const MEMORY: u64 = 4 << 30;

/// How often a program is asked whether it is done. Most are in a few of these.
const POLL: Duration = Duration::from_millis(5);

/// What a program left.
pub(super) struct Output {
    pub(super) status: ExitStatus,
    /// What it printed, both streams in order; no more than was asked for.
    pub(super) text: String,
    /// There was more.
    pub(super) cut: bool,
}

impl Output {
    /// The program ended by itself with one of the exit codes whose bits are in `mask`.
    pub(super) fn is(&self, mask: i32) -> bool {
        self.status.code().is_some_and(|code| code & !mask == 0)
    }

    /// Whether it ended by itself and its exit code has this bit.
    pub(super) fn has(&self, bit: i32) -> bool {
        self.status.code().is_some_and(|code| code & bit != 0)
    }

    /// Its last words and how it ended, on one line. What it printed may have names from the disk in it.
    pub(super) fn said(&self) -> String {
        let lines: Vec<&str> = self.text.lines().rev().filter(|line| !line.trim().is_empty()).take(3).collect();
        let text = lines.into_iter().rev().collect::<Vec<_>>().join("; ");
        let clean: String = text.chars().filter(|c| !c.is_control()).take(500).collect();
        match self.status.signal() {
            Some(signal) => format!("ended by signal {signal}: {clean}"),
            None => clean,
        }
    }
}

/// Runs `program` on what begins at byte `offset` of `disk`, with `args` before the name that it gets for that. It reads
/// `script`, and at most `most` bytes of what it prints are kept.
pub(super) fn run(
    disk: &File,
    offset: u64,
    program: &'static str,
    args: &[&str],
    script: &str,
    most: u64,
) -> Result<Output, IdentityError> {
    let failed = |cause| IdentityError::Program { program, cause };
    run_within(disk, offset, program, args, script, most).map_err(failed)
}

fn run_within(
    disk: &File,
    offset: u64,
    program: &'static str,
    args: &[&str],
    script: &str,
    most: u64,
) -> io::Result<Output> {
    let size = disk.metadata()?.len();
    let inherited = disk.try_clone()?;
    // Whole before the program starts: a pipe would have to be filled while it runs.
    let mut stdin = File::from(memfd_create("script", MemfdFlags::CLOEXEC)?);
    stdin.write_all(script.as_bytes())?;
    stdin.rewind()?;
    let (mut printed, stdout) = io::pipe()?;
    let mut command = Command::new(program);
    command
        .args(args)
        .arg(format!("/proc/self/fd/{}?offset={offset}", inherited.as_raw_fd()))
        .env_clear()
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(stdin)
        .stderr(stdout.try_clone()?)
        .stdout(stdout);
    if geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    // SAFETY: the closure runs between fork and exec and makes system calls only, on a descriptor that it owns.
    unsafe {
        command.pre_exec(move || {
            // In the child alone: in ours, another thread's child could inherit the disk.
            fcntl_setfd(&inherited, FdFlags::empty())?;
            // Nobody would wait for it any more. It is this thread's, which waits as long as the program runs.
            set_parent_process_death_signal(Some(Signal::KILL))?;
            set_no_new_privs(true)?;
            for (resource, limit) in [
                (Resource::As, MEMORY),
                (Resource::Cpu, DEADLINE.as_secs()),
                (Resource::Fsize, size),
                // Core dumps would have the disk's secrets in them.
                (Resource::Core, 0),
            ] {
                setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) })?;
            }
            Ok(())
        });
    }
    let child = command.spawn()?;
    // It has our ends of the pipe, whose other end would never end.
    drop(command);
    let reader = thread::spawn(move || {
        let mut kept = Vec::new();
        printed.by_ref().take(most).read_to_end(&mut kept)?;
        let rest = io::copy(&mut printed, &mut io::sink())?;
        Ok::<_, io::Error>((kept, rest > 0))
    });
    let status = wait(child)?;
    let (kept, cut) = reader.join().map_err(|_| io::Error::other("its output could not be read"))??;
    Ok(Output { status, text: String::from_utf8_lossy(&kept).into_owned(), cut })
}

/// Waits until the child ends, or ends it when its time is over.
fn wait(mut child: Child) -> io::Result<ExitStatus> {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if begin.elapsed() > DEADLINE {
            child.kill()?;
            return child.wait();
        }
        thread::sleep(POLL);
    }
}

/// The disk as a file of the user that the programs run as, for as long as this lives.
pub(super) struct Lent<'a> {
    disk: &'a File,
    owner: Option<(u32, u32)>,
}

impl<'a> Lent<'a> {
    /// Lends `disk`, the file `path`.
    pub(super) fn new(disk: &'a File, path: &Path) -> Result<Self, IdentityError> {
        if !geteuid().is_root() {
            return Ok(Self { disk, owner: None });
        }
        let meta = disk.metadata().map_err(IdentityError::io("examine", path))?;
        fchown(disk, Some(NOBODY), Some(NOBODY)).map_err(IdentityError::io("change the owner of", path))?;
        Ok(Self { disk, owner: Some((meta.uid(), meta.gid())) })
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Some((uid, gid)) = self.owner {
            // Root may; and should it not, the file is still in a directory of ours.
            let _restored = fchown(self.disk, Some(uid), Some(gid));
        }
    }
}
