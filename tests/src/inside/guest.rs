//! One VM of `bedplate-vmm` with the tiny image in it, and a conversation on its console.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bedplate_lab::{Console, Process};
use serde_json::{Value, json};

use super::{BZIMAGE, INITRD, unix_http};

/// For a guest to boot, in an emulated node that has to share its machine with others. Alone it takes a few seconds.
pub const BOOT: Duration = Duration::from_secs(300);
/// For one command in a guest.
const COMMAND: Duration = Duration::from_secs(60);

/// A VM as a test wants it: the configuration file, with the tiny image filled in.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    name: String,
    config: Value,
    text: Option<String>,
    options: Vec<String>,
}

impl GuestSpec {
    /// 1 vCPU, 256 MiB, the bzImage and the tiny initramfs; nothing else.
    pub fn new(name: &str) -> Self {
        let config = json!({
            "boot-source": {"kernel_image_path": BZIMAGE, "initrd_path": INITRD, "boot_args": "console=ttyS0 quiet panic=-1 reboot=k"},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 256},
            "drives": [], "network-interfaces": []
        });
        Self { name: name.to_owned(), config, text: None, options: Vec::new() }
    }

    /// Boots this kernel.
    pub fn kernel(mut self, path: &str) -> Self {
        self.config["boot-source"]["kernel_image_path"] = json!(path);
        self
    }

    /// Boots through this firmware, from the first disk.
    pub fn firmware(mut self, path: &str) -> Self {
        self.config["boot-source"] = json!({"firmware_path": path});
        self
    }

    /// Replaces the kernel's command line.
    pub fn boot_args(mut self, words: &str) -> Self {
        self.config["boot-source"]["boot_args"] = json!(words);
        self
    }

    /// Adds words to the kernel's command line.
    pub fn cmdline(mut self, words: &str) -> Self {
        let all = format!("{} {words}", self.config["boot-source"]["boot_args"].as_str().unwrap_or_default());
        self.config["boot-source"]["boot_args"] = json!(all);
        self
    }

    /// This many vCPUs.
    pub fn cpus(mut self, count: u8) -> Self {
        self.config["machine-config"]["vcpu_count"] = json!(count);
        self
    }

    /// Adds a disk.
    pub fn drive(mut self, path: &Path, read_only: bool) -> Self {
        if let Some(drives) = self.config["drives"].as_array_mut() {
            let id = format!("disk{}", drives.len());
            drives.push(
                json!({"drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": read_only}),
            );
        }
        self
    }

    /// Sets more of the disk that was added last, such as its `rate_limiter`.
    pub fn drive_option(mut self, name: &str, value: Value) -> Self {
        if let Some(drive) = self.config["drives"].as_array_mut().and_then(|drives| drives.last_mut()) {
            drive[name] = value;
        }
        self
    }

    /// Adds a network interface on the tap `tap`.
    pub fn network(mut self, tap: &str, mac: &str) -> Self {
        if let Some(cards) = self.config["network-interfaces"].as_array_mut() {
            cards.push(json!({"iface_id": format!("eth{}", cards.len()), "host_dev_name": tap, "guest_mac": mac}));
        }
        self
    }

    /// Sets more of the interface that was added last, such as its `queue_pairs`.
    pub fn network_option(mut self, name: &str, value: Value) -> Self {
        if let Some(card) = self.config["network-interfaces"].as_array_mut().and_then(|cards| cards.last_mut()) {
            card[name] = value;
        }
        self
    }

    /// Sets a section of the configuration, such as `vsock` or `entropy`.
    pub fn section(mut self, name: &str, value: Value) -> Self {
        self.config[name] = value;
        self
    }

    /// Adds options to the command line of `bedplate-vmm`.
    pub fn options(mut self, options: &[&str]) -> Self {
        self.options.extend(options.iter().map(|option| (*option).to_owned()));
        self
    }

    /// Replaces the whole `config.json`, well-formed or not.
    pub fn config(mut self, text: &str) -> Self {
        self.text = Some(text.to_owned());
        self
    }

    /// Starts the VMM, which must refuse: what it said on standard error.
    pub fn refused(self) -> Result<String> {
        let mut guest = self.start()?;
        let (status, reason) = guest.ended()?;
        let said = fs::read_to_string(guest.file("stderr"))?;
        ensure!(
            status.code() == Some(1) && reason == "host_fault",
            "ended with {status}, {reason:?}, and said {said:?}"
        );
        ensure!(said.trim().lines().count() == 1, "more than one line: {said:?}");
        Ok(said)
    }

    /// Starts the VMM, without waiting for the guest.
    pub fn start(self) -> Result<Guest> {
        self.start_in(|| Ok(()))
    }

    /// As [`Self::start`]; `prepare` is called once the guest's directory is there.
    pub fn start_in(self, prepare: impl FnOnce() -> Result<()>) -> Result<Guest> {
        let dir = PathBuf::from("/run/guests").join(&self.name);
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        prepare()?;
        let config = dir.join("config.json");
        fs::write(&config, self.text.unwrap_or_else(|| self.config.to_string()))?;
        let mut command = Command::new("/bin/bedplate-vmm");
        command.arg("--config-file").arg(&config).arg("--api-sock").arg(dir.join("api.sock"));
        command.arg("--exit-file").arg(dir.join("exit.json")).args(&self.options);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(fs::File::create(dir.join("stderr"))?);
        let mut process = Process::start(&self.name, command)?;
        let output = process.take_stdout().context("no pipe from the VMM")?;
        let console = Console::new(&self.name, &dir.join("serial.log"), output, process.take_stdin())?;
        Ok(Guest { process, console, dir })
    }

    /// Starts it and waits until the guest is up.
    pub fn boot(self) -> Result<Guest> {
        let guest = self.start()?;
        guest.ready()?;
        Ok(guest)
    }
}

/// A VM that runs. Dropped, it is killed.
#[derive(Debug)]
pub struct Guest {
    process: Process,
    console: Console,
    dir: PathBuf,
}

impl Guest {
    /// Waits until the guest is up; the line in which it says what it sees.
    pub fn ready(&self) -> Result<String> {
        let heard = self.console.wait_for("TINY ready", BOOT).and_then(|_| self.console.wait_for("\n", COMMAND));
        heard.with_context(|| format!("{}; {}", self.last_words(), self.stands()))
    }

    /// Runs a command in the guest; what it printed. An error when it failed.
    pub fn run(&self, command: &str) -> Result<String> {
        let (printed, code) = self.try_run(command)?;
        ensure!(code == "0", "{command:?} in the guest ended with {code}: {printed}");
        Ok(printed)
    }

    /// Runs a command in the guest; what it printed, and its exit code.
    pub fn try_run(&self, command: &str) -> Result<(String, String)> {
        self.begin(command)?;
        self.finish()
    }

    /// Types a command and does not wait.
    pub fn begin(&self, command: &str) -> Result<()> {
        // A mark before the output: what the kernel printed meanwhile is not part of it.
        Ok(self.console.send(format!("echo TINY begin; {command}\n").as_bytes())?)
    }

    /// Waits for the end of the command typed last.
    pub fn finish(&self) -> Result<(String, String)> {
        self.console.wait_for("TINY begin\n", COMMAND).with_context(|| self.last_words())?;
        let start = self.console.position();
        self.console.wait_for("TINY end ", COMMAND).with_context(|| self.last_words())?;
        let end = self.console.position();
        let code = self.console.wait_for("\n", COMMAND)?;
        let printed = self.console.between(start, end);
        let code = code.rsplit(' ').next().unwrap_or_default().to_owned();
        Ok((printed.trim_end_matches("TINY end ").trim_end().to_owned(), code))
    }

    /// The guest's console.
    pub const fn console(&self) -> &Console {
        &self.console
    }

    /// Process id of the VMM.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// A file of this VM: `api.sock`, `exit.json`, `stderr`, ….
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A request to the VM's API; fails unless the answer has this status.
    pub fn api(&self, method: &str, path: &str, body: &str, status: u16) -> Result<String> {
        let (got, answer) = unix_http::request(&self.file("api.sock"), method, path, body)?;
        ensure!(got == status, "{method} {path}: {got} instead of {status}: {answer}");
        Ok(answer)
    }

    /// What a device has counted, by its name in `GET /bedplate/status`.
    pub fn count(&self, device: &str, counter: &str) -> Result<u64> {
        let status: Value = serde_json::from_str(&self.api("GET", "/bedplate/status", "", 200)?)?;
        let value = status["devices"][device][counter].as_u64();
        value.with_context(|| format!("there is no counter {counter} of {device} in {status}"))
    }

    /// Waits until the VMM has ended; its exit code and the reason in its exit file.
    pub fn ended(&mut self) -> Result<(ExitStatus, String)> {
        let status = self.process.wait(COMMAND).with_context(|| self.last_words())?;
        let file = self.file("exit.json");
        let exit =
            fs::read_to_string(&file).with_context(|| format!("read {}: {}", file.display(), self.last_words()))?;
        let exit: Value = serde_json::from_str(&exit)?;
        Ok((status, exit["reason"].as_str().unwrap_or_default().to_owned()))
    }

    /// As [`Self::ended`]; fails unless code 0 and this reason.
    pub fn ended_well(&mut self, reason: &str) -> Result<()> {
        let (status, why) = self.ended()?;
        if !status.success() || why != reason {
            bail!("the VMM ended with {status}, {why:?} instead of {reason:?}: {}", self.last_words());
        }
        Ok(())
    }

    /// What its processors and threads are at, for a guest that says nothing: registers and last exits, and of each thread its
    /// state and the time that it had, in hundredths of a second. A second later once more: what stands still is the same.
    fn stands(&self) -> String {
        let task = |dir: PathBuf| {
            let stat = fs::read_to_string(dir.join("stat")).unwrap_or_default();
            let waits = fs::read_to_string(dir.join("wchan")).unwrap_or_default();
            // proc(5): state, utime and stime are the third, fourteenth and fifteenth.
            let fields: Vec<_> = stat.split(' ').collect();
            let [name, state, user, system] = [1, 2, 13, 14].map(|n| fields.get(n).copied().unwrap_or_default());
            format!("{name} {state} {user}+{system} {waits}")
        };
        let look = || {
            let inspection = self.api("GET", "/bedplate/inspect", "", 200).unwrap_or_else(|error| format!("{error:#}"));
            let threads = fs::read_dir(format!("/proc/{}/task", self.process.pid())).into_iter().flatten().flatten();
            let threads: Vec<_> = threads.map(|entry| task(entry.path())).collect();
            format!("{inspection}, threads: {}", threads.join(", "))
        };
        let first = look();
        thread::sleep(Duration::from_secs(1));
        format!("it is at {first}; then {}", look())
    }

    /// What the VMM said on standard error, and the end of the console.
    pub fn last_words(&self) -> String {
        let said = fs::read_to_string(self.file("stderr")).unwrap_or_default();
        let console = self.console.text();
        let tail: Vec<_> = console.lines().rev().take(8).collect();
        let tail: Vec<_> = tail.into_iter().rev().collect();
        format!("VMM said {:?}; console ends {:?}", said.trim(), tail.join(" | "))
    }
}
