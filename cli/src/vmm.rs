//! One `bedplate-vmm` process of ours: found, started, stopped, and asked how it ended.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bedplate_api::vmm::{Exit, ExitReason, VmConfig};
use bedplate_lab::Process;
use rustix::process::Signal;

/// Its API's socket and its last word, in its directory.
const API: &str = "vmm.sock";
const EXIT: &str = "exit.json";
/// How often a socket that is not there yet is looked for, unless the process ends before.
const CONNECT_INTERVAL: Duration = Duration::from_millis(3);
/// Name of the program.
pub const PROGRAM: &str = "bedplate-vmm";
/// A VMM that was told to stop at once, or has closed its console, needs milliseconds. More means that it hangs.
const GRACE: Duration = Duration::from_secs(10);
/// It answers its API at once, if at all.
const ANSWER: Duration = Duration::from_secs(2);
/// The last words of a VMM that are quoted, in bytes.
const MAX_WORDS: u64 = 4096;

/// A VM that could not be started, or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// There is no VMM.
    #[error("{PROGRAM} is neither beside {} nor in PATH: build it (`cargo build --release -p {PROGRAM}`) or name it with --vmm", beside.display())]
    NotFound {
        /// Where `bedplate` is.
        beside: PathBuf,
    },
    /// What --vmm names cannot be run.
    #[error("{} (from --vmm) is no program: {cause}", path.display())]
    NotAProgram {
        /// As given.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// A file of the VM could not be written or read.
    #[error("cannot {what} {}: {source}", path.display())]
    File {
        /// A verb.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The process could not be started or watched.
    #[error(transparent)]
    Process(#[from] bedplate_lab::Error),
    /// It ended and did not say why.
    #[error("{PROGRAM} died ({status}){words}")]
    Died {
        /// Its exit status.
        status: String,
        /// Its last words, with a leading separator; empty where there were none.
        words: String,
    },
    /// The guest or the host failed; the VMM's own words.
    #[error("{0}")]
    Failed(String),
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VmmError {
    move |source| VmmError::File { what, path: path.to_owned(), source }
}

/// The VMM to use: `given`, else the one beside this program, else the one in PATH.
///
/// # Errors
/// There is none.
pub fn locate(given: Option<&Path>) -> Result<PathBuf, VmmError> {
    if let Some(path) = given {
        return match path.metadata() {
            // It is started in another directory than ours.
            Ok(meta) if meta.is_file() => std::path::absolute(path).map_err(file("find", path)),
            Ok(_) => Err(VmmError::NotAProgram { path: path.to_owned(), cause: io::ErrorKind::InvalidInput.into() }),
            Err(cause) => Err(VmmError::NotAProgram { path: path.to_owned(), cause }),
        };
    }
    let here = std::env::current_exe().map_err(file("find", Path::new("/proc/self/exe")))?;
    let beside = here.parent().unwrap_or(Path::new("/")).to_owned();
    in_dirs(std::iter::once(beside.clone()).chain(path_dirs()), PROGRAM).ok_or(VmmError::NotFound { beside })
}

fn path_dirs() -> Vec<PathBuf> {
    std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default()
}

fn in_dirs(dirs: impl IntoIterator<Item = PathBuf>, program: &str) -> Option<PathBuf> {
    dirs.into_iter().map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// Whether PATH has `program`.
pub fn in_path(program: &str) -> Option<PathBuf> {
    in_dirs(path_dirs(), program)
}

/// What is around a VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walls {
    /// Its sandbox.
    Sandbox,
    /// Nothing: the guest is trusted.
    None,
}

/// A running VM. Killed when dropped, and when this process dies, however it dies.
#[derive(Debug)]
pub struct Vmm {
    process: Process,
    dir: PathBuf,
}

impl Vmm {
    /// Starts a VM. `dir`, an absolute path, is for its files: `vmm.json`, `vmm.sock`, `vmm.log`, `exit.json`, and what
    /// `serial`, the VMM's option, names without a slash: the process runs in `dir`, since a socket's path may be only
    /// 107 bytes long.
    ///
    /// # Errors
    /// A file cannot be written, or the process cannot be started. That the VM could not be started comes later, with
    /// [`Vmm::finish`].
    pub fn start(
        program: &Path,
        dir: &Path,
        id: &str,
        config: &VmConfig,
        serial: &str,
        walls: Walls,
    ) -> Result<Self, VmmError> {
        let config_path = dir.join("vmm.json");
        let text = serde_json::to_vec_pretty(config).map_err(io::Error::from).map_err(file("write", &config_path))?;
        fs::write(&config_path, text).map_err(file("write", &config_path))?;
        let log = dir.join("vmm.log");
        let words = File::create(&log).map_err(file("create", &log))?;
        let mut command = Command::new(program);
        // The VMM's names have no dots and underscores, as Firecracker's; the names of images may.
        let id: String = id.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(64).collect();
        command.current_dir(dir).args(["--id", &id, "--config-file", "vmm.json", "--api-sock", API]);
        command.args(["--serial", serial, "--exit-file", EXIT]);
        if walls == Walls::None {
            command.arg("--no-sandbox");
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(words);
        Ok(Self { process: Process::start(PROGRAM, command)?, dir: dir.to_owned() })
    }

    /// Connects to the socket `name` of the VM's directory, which the VMM makes as it starts.
    ///
    /// # Errors
    /// The VM ended before that, for the reason told, or the socket did not come.
    pub fn connect(mut self, name: &str) -> Result<(Self, UnixStream), VmmError> {
        let deadline = Instant::now() + GRACE;
        loop {
            let error = match connect_in(&self.dir, name) {
                Ok(stream) => return Ok((self, stream)),
                Err(error) => error,
            };
            let ended = self.process.wait(CONNECT_INTERVAL).is_ok();
            if ended {
                let end = self.finish(GRACE)?;
                return Err(VmmError::Failed(format!("the VM ended before its console was there: {}", end.detail)));
            }
            if Instant::now() > deadline {
                return Err(VmmError::File { what: "connect to", path: self.dir.join(name), source: error });
            }
        }
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.process.is_running()
    }

    /// Presses the guest's power button. A VMM that does not answer cannot, and there is still [`Vmm::stop`].
    pub fn press_power_button(&self) {
        // Not SIGTERM, with which comes a limit.
        let _ = connect_in(&self.dir, API).and_then(press);
    }

    /// Ends the VM at once; disks keep what was acknowledged. A VMM that does not react is killed: whoever asks wants it
    /// gone, and it is.
    pub fn stop(self) -> Exit {
        self.process.signal(Signal::INT);
        self.finish(GRACE).unwrap_or_else(|error| Exit {
            reason: ExitReason::Stopped,
            detail: format!("it did not stop in order: {error}"),
        })
    }

    /// Waits for a VM that has closed its console, and says how it ended.
    ///
    /// # Errors
    /// The VM failed, or could not be started at all; or it still runs after `timeout`, and is killed then.
    pub fn finish(mut self, timeout: Duration) -> Result<Exit, VmmError> {
        let status = self.process.wait(timeout)?;
        let exit: Option<Exit> = fs::read(self.dir.join(EXIT)).ok().and_then(|text| serde_json::from_slice(&text).ok());
        match exit {
            Some(exit) if exit.reason.code() == 0 => Ok(exit),
            Some(exit) => Err(VmmError::Failed(exit.detail)),
            None => Err(VmmError::Died { status: status.to_string(), words: last_words(&self.dir.join("vmm.log")) }),
        }
    }

    /// As [`Vmm::finish`], where the console has been closed already.
    ///
    /// # Errors
    /// As there.
    pub fn ended(self) -> Result<Exit, VmmError> {
        self.finish(GRACE)
    }
}

/// Connects to the socket `name` in `dir`, however long the path of `dir` is.
fn connect_in(dir: &Path, name: &str) -> io::Result<UnixStream> {
    let dir = File::open(dir)?;
    UnixStream::connect(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()))
}

fn press(mut api: UnixStream) -> io::Result<()> {
    api.set_read_timeout(Some(ANSWER))?;
    api.write_all(b"PUT /bedplate/power-button HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")?;
    // When there is an answer it has been pressed; what it is makes no difference.
    api.read(&mut [0]).map(drop)
}

fn last_words(log: &Path) -> String {
    let mut text = Vec::new();
    // What cannot be read cannot be quoted.
    let _ = File::open(log).and_then(|file| file.take(MAX_WORDS).read_to_end(&mut text));
    let text = String::from_utf8_lossy(&text);
    match text.lines().rfind(|line| !line.trim().is_empty()) {
        Some(line) => format!(": {}", line.trim()),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_power_button_is_pressed_through_the_api() {
        let dir = tempfile::tempdir().unwrap();
        let api = std::os::unix::net::UnixListener::bind(dir.path().join(API)).unwrap();
        let vmm = std::thread::spawn(move || {
            let (mut client, _) = api.accept().unwrap();
            let mut request = [0; 256];
            let len = client.read(&mut request).unwrap();
            client.write_all(b"HTTP/1.1 204 \r\n\r\n").unwrap();
            String::from_utf8_lossy(&request[..len]).into_owned()
        });
        connect_in(dir.path(), API).and_then(press).unwrap();
        assert!(vmm.join().unwrap().starts_with("PUT /bedplate/power-button HTTP/1.1\r\n"));
    }

    /// A program that behaves as a VMM would that ends at once.
    fn fake(dir: &Path, script: &str) -> PathBuf {
        let path = dir.join("fake-vmm");
        fs::write(&path, format!("#!/bin/sh\ncd {}\n{script}\n", dir.display())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn end_of(script: &str) -> Result<Exit, VmmError> {
        let dir = tempfile::tempdir().unwrap();
        let program = fake(dir.path(), script);
        Vmm::start(&program, dir.path(), "x", &VmConfig::default(), "off", Walls::Sandbox)
            .unwrap()
            .finish(Duration::from_secs(60))
    }

    #[test]
    fn how_a_vm_ended_is_told_in_its_own_words() {
        let exit = end_of(r#"echo '{"reason":"guest_power_off","detail":"bye"}' > exit.json"#).unwrap();
        assert_eq!((exit.reason, exit.detail.as_str()), (ExitReason::GuestPowerOff, "bye"));
        let failed =
            end_of(r#"echo '{"reason":"host_fault","detail":"no /dev/kvm"}' > exit.json; exit 1"#).unwrap_err();
        assert_eq!(failed.to_string(), "no /dev/kvm");
        let died = end_of("echo one >&2; echo the last word >&2; kill -9 $$").unwrap_err().to_string();
        assert!(died.contains("signal: 9") && died.ends_with(": the last word"), "{died}");
    }

    #[test]
    fn a_vmm_that_is_not_there_is_named() {
        let error = locate(Some(Path::new("/nonexistent/vmm"))).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/vmm") && error.contains("--vmm"), "{error}");
        assert!(matches!(locate(Some(Path::new("/"))), Err(VmmError::NotAProgram { .. })));
    }
}
