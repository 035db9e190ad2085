//! One emulated machine: a QEMU process.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::network::Door;
use crate::{Accel, Console, Error, Network, Process, Result};

/// Debian's build of UEFI firmware, in two parts: code, and the variables that each machine has a copy of.
const UEFI_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const UEFI_VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// What a machine starts with, before any operating system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    /// SeaBIOS, and iPXE in the network card's ROM.
    Bios,
    /// OVMF with its own network boot.
    Uefi,
}

/// A machine as asked for. Without a kernel it boots from the network, as a blank machine in a rack does.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    name: String,
    dir: PathBuf,
    accel: Option<Accel>,
    cpus: u8,
    memory_mib: u64,
    firmware: Firmware,
    kernel: Option<(PathBuf, PathBuf, String)>,
    drives: Vec<String>,
    cards: Vec<Vec<String>>,
    /// Where its taps are.
    network: Option<Door>,
    reboots: bool,
}

impl MachineSpec {
    /// A machine with 2 vCPUs and 2 GiB; its serial log and firmware variables go into `dir`, named after it.
    pub fn new(name: impl Into<String>, dir: &Path) -> Self {
        Self {
            name: name.into(),
            dir: dir.to_owned(),
            accel: None,
            cpus: 2,
            memory_mib: 2048,
            firmware: Firmware::Bios,
            kernel: None,
            drives: Vec::new(),
            cards: Vec::new(),
            network: None,
            reboots: false,
        }
    }

    /// Number of vCPUs; an emulated machine has one, whatever is asked for.
    pub const fn cpus(mut self, cpus: u8) -> Self {
        self.cpus = cpus;
        self
    }

    /// Memory.
    pub const fn memory_mib(mut self, memory_mib: u64) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// What runs the vCPUs, instead of the best that works here.
    pub const fn accel(mut self, accel: Accel) -> Self {
        self.accel = Some(accel);
        self
    }

    /// What it starts with.
    pub const fn firmware(mut self, firmware: Firmware) -> Self {
        self.firmware = firmware;
        self
    }

    /// Boots this kernel with this initramfs and command line, instead of from the network.
    pub fn kernel(mut self, kernel: &Path, initrd: &Path, cmdline: &str) -> Self {
        self.kernel = Some((kernel.to_owned(), initrd.to_owned(), cmdline.to_owned()));
        self
    }

    /// Adds a virtio disk: a raw file, which the machine's writes reach.
    pub fn drive(mut self, file: &Path) -> Self {
        self.drives.push(format!("if=virtio,format=raw,cache=unsafe,file={}", escape(file)));
        self
    }

    /// Adds a virtio disk whose changes are dropped at the end; `format` is one that QEMU reads.
    pub fn throwaway_drive(mut self, file: &Path, format: &str) -> Self {
        self.drives.push(format!("if=virtio,format={format},snapshot=on,file={}", escape(file)));
        self
    }

    /// Adds a virtio network card on a new tap of `network`, with this MAC address; the first one is booted from.
    pub fn network(mut self, network: &Network, mac: &str) -> Result<Self> {
        let tap = network.add_tap()?;
        let id = format!("net{}", self.cards.len());
        let boot = self.cards.len() + 1;
        self.cards.push(vec![
            "-netdev".into(),
            format!("tap,id={id},ifname={tap},script=no,downscript=no"),
            "-device".into(),
            format!("virtio-net-pci,netdev={id},mac={mac},bootindex={boot}"),
        ]);
        self.network = Some(network.door());
        Ok(self)
    }

    /// Adds a card behind QEMU's own address translation: the machine reaches out, nobody reaches in.
    pub fn user_network(mut self) -> Self {
        let id = format!("net{}", self.cards.len());
        let card = ["-netdev".into(), format!("user,id={id}"), "-device".into(), format!("virtio-net-pci,netdev={id}")];
        self.cards.push(card.to_vec());
        self
    }

    /// A reset starts the machine again; otherwise it ends it.
    pub const fn reboots(mut self) -> Self {
        self.reboots = true;
        self
    }

    /// Powers the machine on, its console read by this process.
    pub fn start(self) -> Result<Machine> {
        let log = self.dir.join(format!("{}.serial.log", self.name));
        let errors = self.dir.join(format!("{}.qemu.log", self.name));
        fs::create_dir_all(&self.dir).map_err(|source| Error::path("create", &self.dir, source))?;
        let error_file = fs::File::create(&errors).map_err(|source| Error::path("create", &errors, source))?;
        let mut command = self.command()?;
        command.args(["-chardev", "stdio,id=serial,signal=off", "-serial", "chardev:serial", "-monitor", "none"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(error_file);
        // Ctrl-C on a terminal is for this process, which then ends its machines in order.
        command.process_group(0);
        let mut process = Process::start(&self.name, command)?;
        let Some(output) = process.take_stdout() else {
            return Err(Error::io(format!("open the console of {}", self.name), std::io::ErrorKind::BrokenPipe.into()));
        };
        let console = Console::new(&self.name, &log, output, process.take_stdin())?;
        Ok(Machine { process, console, errors, variables: self.variables() })
    }

    /// Powers the machine on with its console on this process's terminal, until it ends. Ctrl-A X ends it.
    pub fn run_on_terminal(self) -> Result<ExitStatus> {
        let mut command = self.command()?;
        command.args(["-serial", "mon:stdio"]);
        let status = Process::start(&self.name, command)?.wait_forever();
        let _ = fs::remove_file(self.variables());
        status
    }

    fn variables(&self) -> PathBuf {
        self.dir.join(format!("{}.uefi-variables", self.name))
    }

    fn command(&self) -> Result<Command> {
        let mut command = Command::new("qemu-system-x86_64");
        // Without graphics SeaBIOS and iPXE talk on the serial console too.
        command.args(["-M", "q35,graphics=off", "-nodefaults", "-display", "none", "-name", &self.name]);
        let accel = self.accel.unwrap_or_else(Accel::best);
        command.args(accel.args());
        command.args(["-smp", &accel.cpus(self.cpus).to_string(), "-m", &self.memory_mib.to_string()]);
        command.args(["-device", "virtio-rng-pci"]);
        if !self.reboots {
            command.arg("-no-reboot");
        }
        if self.firmware == Firmware::Uefi {
            let variables = self.variables();
            fs::copy(UEFI_VARIABLES, &variables)
                .map_err(|source| Error::path("copy UEFI variables (package ovmf) to", &variables, source))?;
            command.args(["-drive", &format!("if=pflash,format=raw,readonly=on,file={UEFI_CODE}")]);
            command.args(["-drive", &format!("if=pflash,format=raw,file={}", escape(&variables))]);
        }
        match &self.kernel {
            Some((kernel, initrd, cmdline)) => {
                let cmdline = format!("{cmdline} {}", accel.kernel_words());
                command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd).args(["-append", cmdline.trim_end()]);
            }
            None => {
                command.args(["-boot", "n"]);
            }
        }
        for drive in &self.drives {
            command.args(["-drive", drive]);
        }
        command.args(self.cards.iter().flatten());
        if let Some(network) = &self.network {
            network.enter(&mut command);
        }
        Ok(command)
    }
}

/// A machine that runs. Dropping it cuts its power; its logs stay only where something went wrong.
#[derive(Debug)]
pub struct Machine {
    process: Process,
    console: Console,
    errors: PathBuf,
    variables: PathBuf,
}

impl Machine {
    /// Its serial console.
    pub const fn console(&self) -> &Console {
        &self.console
    }

    /// Waits until `pattern` stands on the console; see [`Console::wait_for`].
    pub fn wait_for(&self, pattern: &str, timeout: Duration) -> Result<String> {
        self.wait_for_any(&[pattern], timeout).map(|(_, line)| line)
    }

    /// Waits until one of `patterns` stands on the console; see [`Console::wait_for_any`].
    pub fn wait_for_any(&self, patterns: &[&str], timeout: Duration) -> Result<(usize, String)> {
        self.console.wait_for_any(patterns, timeout).map_err(|error| match error {
            Error::Ended { machine, pattern, log, .. } => {
                Error::Ended { machine, pattern, said: self.last_words(), log }
            }
            other => other,
        })
    }

    /// Process id of the emulator.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Whether it is powered on.
    pub fn is_running(&mut self) -> bool {
        self.process.is_running()
    }

    /// Waits until it has powered itself off.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        self.process.wait(timeout).inspect_err(|_| self.console.keep_log())
    }

    /// Cuts its power.
    pub fn power_off(&mut self) -> Result<ExitStatus> {
        self.process.kill()
    }

    /// What the emulator complained about, other than processor features that it lacks.
    fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.errors).unwrap_or_default();
        let words: Vec<_> = text.lines().filter(|line| !line.contains("TCG doesn't support")).collect();
        if words.is_empty() { String::new() } else { format!("; the emulator said: {}", words.join("; ")) }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // A machine that never ran, or was left because a test failed, leaves its logs as evidence.
        if !self.console.is_log_kept() && !std::thread::panicking() {
            let _ = fs::remove_file(self.console.log());
            let _ = fs::remove_file(&self.errors);
        }
        let _ = fs::remove_file(&self.variables);
    }
}

/// In QEMU's option lists a comma in a value is doubled.
fn escape(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No kernel needed: the firmware's own words show that the console works and that a machine ends with its owner.
    #[test]
    fn a_machine_starts_says_something_and_ends() {
        let dir = tempfile::tempdir().unwrap();
        let machine = MachineSpec::new("blank", dir.path()).accel(Accel::Tcg).cpus(1).memory_mib(64).start();
        let machine = match machine {
            Err(Error::MissingProgram { .. }) => return eprintln!("skipped: needs qemu-system-x86_64"),
            other => other.unwrap(),
        };
        machine.wait_for("SeaBIOS", Duration::from_secs(120)).unwrap();
        let pid = machine.pid();
        drop(machine);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "logs of a machine that went well");
    }

    #[test]
    fn a_machine_that_cannot_start_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let spec = MachineSpec::new("broken", dir.path()).accel(Accel::Tcg).drive(Path::new("/nonexistent/disk"));
        let machine = match spec.start() {
            Err(Error::MissingProgram { .. }) => return eprintln!("skipped: needs qemu-system-x86_64"),
            other => other.unwrap(),
        };
        let error = machine.wait_for("never", Duration::from_secs(120)).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/disk"), "{error}");
    }
}
