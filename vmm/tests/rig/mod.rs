//! `bedplate-vmm` as a process under test, and kernels of a few instructions for it.

// Each test program uses a part of it.
#![allow(dead_code)]
// A panic is how a test reports.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use bedplate_api::vmm::{Exit, ExitReason};

mod elf;
pub use elf::kernel;

/// `mov al, c; mov dx, 0x3f8; out dx, al`
pub const SAY_X: [u8; 7] = [0xb0, b'x', 0x66, 0xba, 0xf8, 0x03, 0xee];
/// `mov al, 0xfe; out 0x64, al`
pub const RESET: [u8; 4] = [0xb0, 0xfe, 0xe6, 0x64];
/// `jmp $`
pub const SPIN: [u8; 2] = [0xeb, 0xfe];
/// `mov eax, -1; mov edx, 0x618; out dx, eax; jmp` to the `out`: lets go of every slot's device, for ever.
pub const EJECT_ALWAYS: [u8; 13] = [0xb8, 0xff, 0xff, 0xff, 0xff, 0xba, 0x18, 0x06, 0, 0, 0xef, 0xeb, 0xfd];

pub const START: &str = r#"{"action_type": "InstanceStart"}"#;

pub struct Rig {
    dir: tempfile::TempDir,
}

impl Rig {
    pub fn new(code: &[&[u8]]) -> Self {
        let rig = Self { dir: tempfile::tempdir().unwrap() };
        std::fs::write(rig.path("kernel"), kernel(code)).unwrap();
        rig
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn config(&self, more: &str) -> PathBuf {
        let text = format!(r#"{{"boot-source": {{"kernel_image_path": {:?}}} {more}}}"#, self.path("kernel"));
        std::fs::write(self.path("config"), text).unwrap();
        self.path("config")
    }

    pub fn command(&self) -> Command {
        let mut command = vmm();
        command.arg("--exit-file").arg(self.path("exit")).arg("--serial-log").arg(self.path("log"));
        command
    }

    pub fn exit(&self) -> Exit {
        serde_json::from_slice(&std::fs::read(self.path("exit")).unwrap()).unwrap()
    }

    /// Runs to the end with a config file.
    pub fn run(&self, more: &str) -> Output {
        self.run_with(&[], more)
    }

    /// With more options, too.
    pub fn run_with(&self, options: &[&str], more: &str) -> Output {
        let config = self.config(more);
        let mut process = Running(self.command().arg("--config-file").arg(config).args(options).spawn().unwrap());
        let status = process.ended();
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        process.0.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
        process.0.stderr.take().unwrap().read_to_end(&mut stderr).unwrap();
        Output { status, stdout, stderr }
    }

    pub fn fifo(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        path
    }

    /// It must fail to start: one line on stderr that the exit file repeats.
    pub fn refusal(&self, more: &str) -> String {
        self.refusal_with(&[], more)
    }

    /// With more options, too.
    pub fn refusal_with(&self, options: &[&str], more: &str) -> String {
        let output = self.run_with(options, more);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        let exit = self.exit();
        assert_eq!(exit.reason, ExitReason::HostFault);
        assert!(stderr.contains(&exit.detail), "{stderr} and {}", exit.detail);
        stderr
    }

    pub fn serve(&self) -> Running {
        let child = self.command().args(["--id", "one", "--api-sock"]).arg(self.path("api")).spawn().unwrap();
        Running(child)
    }
}

/// A process with an API, and what to ask it.
pub struct Api {
    pub rig: Rig,
    pub process: Running,
}

impl Api {
    pub fn new() -> Self {
        Self::of_guest(&[&SAY_X, &SPIN])
    }

    /// With a kernel that is `code`.
    pub fn of_guest(code: &[&[u8]]) -> Self {
        let rig = Rig::new(code);
        let process = rig.serve();
        Self { rig, process }
    }

    pub fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        request(&self.rig.path("api"), method, path, body)
    }

    pub fn put(&self, path: &str, body: &str) {
        assert_eq!(self.ask("PUT", path, body), (204, String::new()), "{path} {body}");
    }

    /// Must be refused with 400; in which words.
    pub fn refusal(&self, method: &str, path: &str, body: &str) -> String {
        let (status, answer) = self.ask(method, path, body);
        assert_eq!(status, 400, "{method} {path} {body}: {answer}");
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        answer["fault_message"].as_str().unwrap().to_owned()
    }

    /// True where it runs; false where there is no KVM.
    pub fn start(&self) -> bool {
        self.put("/boot-source", &format!(r#"{{"kernel_image_path": {:?}}}"#, self.rig.path("kernel")));
        if has_kvm() {
            self.put("/actions", START);
        }
        has_kvm()
    }

    pub fn stop(mut self) {
        self.put("/bedplate/stop", "");
        assert_eq!(self.process.wait(), 0);
    }
}

pub fn vmm() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bedplate-vmm"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Killed when the test fails.
pub struct Running(pub Child);

impl Running {
    pub fn wait(&mut self) -> i32 {
        self.ended().code().unwrap_or(-1)
    }

    pub fn ended(&mut self) -> ExitStatus {
        eventually("the process ends", || self.0.try_wait().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Polls until `ready` gives something.
pub fn eventually<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

/// One request on a connection of its own: status and body.
pub fn request(socket: &Path, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = eventually("the API's socket appears", || UnixStream::connect(socket).ok());
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let len = body.len();
    // The server may answer and close before it has read all.
    let _ = write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n{body}"
    );
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

pub fn has_kvm() -> bool {
    let there = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        println!("skipped: /dev/kvm cannot be opened here; the lab tests cover this in an emulated machine");
    }
    there
}
