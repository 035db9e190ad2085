//! Messages of the VMM: few, for people, never caused by what a guest does without limit.
//!
//! ```text
//! 2026-11-21T19:30:00.123456789Z [id:thread:LEVEL:file:line] message
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::panic::Location;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use bedplate_api::vmm::{LogLevel, Logger};
use bedplate_devices::platform::calendar::Moment;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::files;

/// Where messages go. Clones share it, on any thread.
#[derive(Clone)]
pub(super) struct Log {
    /// Held for one line, and nothing is called under it.
    state: Arc<Mutex<State>>,
}

struct State {
    id: String,
    /// Absent: stderr.
    file: Option<File>,
    /// As asked for. Absent: to a file what is of interest; to stderr only what is wrong, because the terminal is the
    /// guest's.
    level: Option<LogLevel>,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,
}

impl Log {
    /// The log of the VM `id`, to stderr.
    pub fn new(id: &str) -> Self {
        let id = id.to_owned();
        let state = State { id, file: None, level: None, show_level: false, show_origin: false, module: None };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Changes what `spec` names. The level is what it says, or the usual one.
    pub fn configure(&self, spec: &Logger) -> io::Result<()> {
        let file = spec.log_path.as_ref().map(|path| files::append_messages_to(path.as_ref())).transpose()?;
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        state.file = file.or(state.file.take());
        state.level = spec.level;
        state.show_level = spec.show_level.unwrap_or(state.show_level);
        state.show_origin = spec.show_log_origin.unwrap_or(state.show_origin);
        state.module = spec.module.clone().or(state.module.take());
        Ok(())
    }

    /// Whether messages of this level are asked for at all.
    pub fn wants(&self, level: LogLevel) -> bool {
        level <= self.state.lock().unwrap_or_else(|e| e.into_inner()).level()
    }

    #[track_caller]
    pub fn write(&self, level: LogLevel, message: &str) {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let origin = Location::caller();
        let wanted = state.module.as_ref().is_none_or(|module| module_of(origin.file()).starts_with(module));
        if level > state.level() || !wanted {
            return;
        }
        let line = state.line(level, origin, message);
        // A log that cannot be written stops nothing.
        let _ = match &mut state.file {
            Some(file) => file.write_all(line.as_bytes()),
            // Nor one that nobody reads: what it has no room for is lost.
            None if !has_room(rustix::stdio::stderr()) => Ok(()),
            None => io::stderr().write_all(line.as_bytes()),
        };
    }
}

/// Whether a write of a line would not wait.
fn has_room(file: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(file, PollFlags::OUT)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
}

impl State {
    fn level(&self) -> LogLevel {
        let usual = if self.file.is_some() { LogLevel::Info } else { LogLevel::Warning };
        self.level.unwrap_or(usual)
    }

    fn line(&self, level: LogLevel, origin: &Location<'_>, message: &str) -> String {
        let thread = thread::current();
        let mut line = format!("{} [{}:{}", time(), self.id, thread.name().unwrap_or("-"));
        if self.show_level {
            line += &format!(":{}", name_of(level));
        }
        if self.show_origin {
            line += &format!(":{}:{}", origin.file(), origin.line());
        }
        line + &format!("] {message}\n")
    }
}

/// As Firecracker writes it, for those who read logs by programs.
const fn name_of(level: LogLevel) -> &'static str {
    match level {
        LogLevel::Off => "OFF",
        LogLevel::Error => "ERROR",
        LogLevel::Warning => "WARN",
        LogLevel::Info => "INFO",
        LogLevel::Debug => "DEBUG",
        LogLevel::Trace => "TRACE",
    }
}

fn time() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let Moment { year, month, day, hour, minute, second, .. } = Moment::from_unix(now.as_secs() as i64);
    format!("{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}Z", now.subsec_nanos())
}

/// The module that a source file of this crate is.
fn module_of(file: &str) -> String {
    let path = file.rsplit_once("vmm/src/").map_or(file, |(_, path)| path).trim_end_matches(".rs");
    format!("bedplate_vmm::{}", path.trim_end_matches("/mod").replace('/', "::"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_written_with_its_origin() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = Log::new("one");
        let spec = |text: &str| serde_json::from_str::<Logger>(text).unwrap();
        log.configure(&spec(&format!(r#"{{"log_path": {path:?}, "show_level": true, "show_log_origin": true}}"#)))
            .unwrap();
        log.write(LogLevel::Info, "first");
        log.write(LogLevel::Debug, "too detailed");
        // The file stays, the level does not.
        log.configure(&spec(r#"{"level": "wARn"}"#)).unwrap();
        log.write(LogLevel::Info, "too detailed");
        log.configure(&spec(r#"{"level": "Debug", "module": "bedplate_vmm::machine"}"#)).unwrap();
        log.write(LogLevel::Error, "another module's");
        log.configure(&spec(r#"{"level": "Debug", "module": "bedplate_vmm::control"}"#)).unwrap();
        log.write(LogLevel::Debug, "last");
        let text = std::fs::read_to_string(path).unwrap();
        let [first, last] = text.lines().collect::<Vec<_>>()[..] else { panic!("{text}") };
        assert!(first.contains("Z [one:") && first.contains(":INFO:") && first.ends_with("] first"), "{first}");
        assert!(first.contains("src/control/log.rs:"), "{first}");
        assert!(last.ends_with("] last"), "{last}");
        assert_eq!(module_of("vmm/src/control/mod.rs"), "bedplate_vmm::control");
    }
}
