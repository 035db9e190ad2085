//! Messages of the VMM: few, for people, never caused by what a guest does without limit.

use std::fs::File;
use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use bedplate_api::vmm::{LogLevel, Logger};

use crate::files;

/// Where messages go.
pub(super) struct Log {
    /// Absent: stderr.
    file: Option<File>,
    level: LogLevel,
    show_level: bool,
}

impl Default for Log {
    fn default() -> Self {
        // To stderr only what is wrong: the terminal is the guest's.
        Self { file: None, level: LogLevel::Warning, show_level: false }
    }
}

impl Log {
    pub fn open(spec: &Logger) -> io::Result<Self> {
        let file = spec.log_path.as_ref().map(|path| files::append_to(path.as_ref())).transpose()?;
        let default = if file.is_some() { LogLevel::Info } else { LogLevel::Warning };
        Ok(Self { file, level: spec.level.unwrap_or(default), show_level: spec.show_level.unwrap_or(false) })
    }

    pub fn write(&mut self, level: LogLevel, message: &str) {
        if level > self.level {
            return;
        }
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        let label = if self.show_level { format!(" [{level:?}]") } else { String::new() };
        let line = format!("{seconds:.3}{label} {message}\n");
        // A log that cannot be written stops nothing.
        let _ = match &mut self.file {
            Some(file) => file.write_all(line.as_bytes()),
            None => io::stderr().write_all(line.as_bytes()),
        };
    }
}
