//! What a machine or a program prints: read by a thread, kept in a file, awaited without polling.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ChildStdin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// What is kept in memory to be searched; the file keeps everything.
const KEPT: usize = 4 << 20;

/// The serial console of one machine, or the output of one program.
#[derive(Debug)]
pub struct Console {
    machine: String,
    log: PathBuf,
    shared: Arc<Shared>,
    input: Mutex<Option<ChildStdin>>,
    /// A failure was reported: the log is evidence and stays.
    keep: AtomicBool,
}

#[derive(Debug, Default)]
struct Shared {
    text: Mutex<Text>,
    grown: Condvar,
}

#[derive(Debug, Default)]
struct Text {
    bytes: Vec<u8>,
    /// Where the next search begins: after the last match.
    cursor: usize,
    /// Bytes that were printed before those in `bytes`.
    dropped: u64,
    closed: bool,
}

impl Console {
    /// Reads `output` of `machine` to its end in a thread of its own, into the file `log`; what is typed goes to `input`.
    pub fn new(
        machine: &str,
        log: &Path,
        output: impl Read + Send + 'static,
        input: Option<ChildStdin>,
    ) -> Result<Self> {
        let file = File::create(log).map_err(|source| Error::path("create", log, source))?;
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        std::thread::spawn(move || read(output, file, &theirs));
        Ok(Self {
            machine: machine.to_owned(),
            log: log.to_owned(),
            shared,
            input: Mutex::new(input),
            keep: AtomicBool::new(false),
        })
    }

    /// Waits until `pattern` is printed, and returns the line from its start up to and with the match. The next wait
    /// looks only at what comes after.
    pub fn wait_for(&self, pattern: &str, timeout: Duration) -> Result<String> {
        self.wait_for_any(&[pattern], timeout).map(|(_, line)| line)
    }

    /// Waits until one of `patterns` is printed; returns which, and the line up to and with it.
    pub fn wait_for_any(&self, patterns: &[&str], timeout: Duration) -> Result<(usize, String)> {
        let deadline = Instant::now() + timeout;
        let mut text = lock(&self.shared.text);
        loop {
            if let Some(found) = text.search(patterns) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let closed = text.closed;
            if closed || left.is_zero() {
                self.keep.store(true, Ordering::Relaxed);
                let (machine, pattern, log) = (self.machine.clone(), patterns.join("\" or \""), self.log.clone());
                return Err(match closed {
                    true => Error::Ended { machine, pattern, said: String::new(), log },
                    false => Error::TimedOut { machine, pattern, timeout, log },
                });
            }
            text = self.shared.grown.wait_timeout(text, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Types `bytes`.
    pub fn send(&self, bytes: &[u8]) -> Result<()> {
        let typed = match &mut *lock(&self.input) {
            Some(input) => input.write_all(bytes).and_then(|()| input.flush()),
            None => Err(std::io::ErrorKind::Unsupported.into()),
        };
        typed.map_err(|source| Error::io(format!("type on the console of {}", self.machine), source))
    }

    /// How much was printed up to and with the last match.
    pub fn position(&self) -> u64 {
        let text = lock(&self.shared.text);
        text.dropped + text.cursor as u64
    }

    /// What was printed between two [`Self::position`]s, as far as it is still kept.
    pub fn between(&self, start: u64, end: u64) -> String {
        let text = lock(&self.shared.text);
        let index = |position: u64| {
            usize::try_from(position.saturating_sub(text.dropped)).unwrap_or(usize::MAX).min(text.bytes.len())
        };
        String::from_utf8_lossy(text.bytes.get(index(start)..index(end)).unwrap_or_default()).into_owned()
    }

    /// Everything printed so far (the last 4 MiB).
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&lock(&self.shared.text).bytes).into_owned()
    }

    /// The file that everything is written to.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Keep the log file after the machine is gone.
    pub fn keep_log(&self) {
        self.keep.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_log_kept(&self) -> bool {
        self.keep.load(Ordering::Relaxed)
    }
}

impl Text {
    /// The earliest match of any pattern from the cursor on; moves the cursor behind it.
    fn search(&mut self, patterns: &[&str]) -> Option<(usize, String)> {
        let fresh = self.bytes.get(self.cursor..)?;
        let position = |pattern: &str| fresh.windows(pattern.len().max(1)).position(|w| w == pattern.as_bytes());
        let (at, which) = patterns.iter().enumerate().filter_map(|(i, p)| Some((position(p)?, i))).min()?;
        let start = self.cursor + at;
        let end = start + patterns.get(which)?.len();
        let line = self.bytes[..start].iter().rposition(|&b| b == b'\n').map_or(0, |newline| newline + 1);
        let found = String::from_utf8_lossy(&self.bytes[line..end]).trim_end().to_owned();
        self.cursor = end;
        Some((which, found))
    }

    fn push(&mut self, more: &[u8]) {
        self.bytes.extend_from_slice(more);
        // Dropping half at a time keeps this cheap.
        if self.bytes.len() > KEPT {
            self.bytes.drain(..KEPT / 2);
            self.cursor = self.cursor.saturating_sub(KEPT / 2);
            self.dropped += (KEPT / 2) as u64;
        }
    }
}

/// Runs in the console's own thread until the machine closes its end.
fn read(mut output: impl Read, mut file: File, shared: &Shared) {
    let mut buffer = [0; 4096];
    loop {
        let n = match output.read(&mut buffer) {
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => 0,
        };
        // A full disk must not stop the machine; what is in memory is still searched.
        let _ = file.write_all(&buffer[..n]);
        let mut text = lock(&shared.text);
        text.push(&buffer[..n]);
        text.closed = n == 0;
        shared.grown.notify_all();
        if n == 0 {
            return;
        }
    }
}

/// A thread that panicked while it held the text left it whole: it is only ever appended to.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Process;
    use std::process::{Command, Stdio};

    fn console(script: &str, dir: &Path) -> (Process, Console) {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::start("shell", command).unwrap();
        let (output, input) = (process.take_stdout().unwrap(), process.take_stdin());
        let console = Console::new("shell", &dir.join("log"), output, input).unwrap();
        (process, console)
    }

    #[test]
    fn waits_in_order_and_writes_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let (_process, console) = console("echo one; echo two; read x; echo got $x; cat", dir.path());
        let long = Duration::from_secs(60);
        assert_eq!(console.wait_for("two", long).unwrap(), "two");
        console.send(b"word\n").unwrap();
        let before = console.position();
        assert_eq!(console.wait_for_any(&["one", "got word"], long).unwrap(), (1, "got word".to_owned()));
        assert_eq!(console.between(before, console.position()), "\ngot word");
        let past = console.wait_for("one", Duration::from_millis(1)).unwrap_err();
        assert!(matches!(past, Error::TimedOut { .. }), "{past}");
        assert!(std::fs::read_to_string(console.log()).unwrap().starts_with("one\ntwo\n"));
        assert!(console.is_log_kept());
    }

    #[test]
    fn a_closed_console_ends_the_wait_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let (_process, console) = console("echo bye", dir.path());
        let error = console.wait_for("hello", Duration::from_secs(600)).unwrap_err();
        assert!(matches!(error, Error::Ended { .. }), "{error}");
        assert_eq!(console.text(), "bye\n");
    }
}
