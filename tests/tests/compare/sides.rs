//! Who is compared, and how each is told what to run.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bedplate_lab::{Console, Process};
use bedplate_tests::inside::{PEERS, stagger};
use bedplate_tests::patience::until;
use serde_json::json;

use crate::guests::Guest;

/// For a guest to say that it is there.
const BOOT: Duration = Duration::from_secs(120);

/// For a command in a guest.
const WORK: Duration = Duration::from_secs(120);

/// Of every guest's interface.
const MAC: &str = "02:00:00:00:09:02";
/// On the kernel's command line, for an interface: the tiny image's init sets it.
const ADDRESS: &str = " tiny.ip=10.9.0.2/24";

/// MiB of RAM of every guest.
pub const MEMORY_MIB: u64 = 256;

/// A VMM.
pub struct Side {
    pub name: String,
    pub program: PathBuf,
    dialect: Dialect,
    way: Way,
}

/// How it is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// As it is by itself.
    Plain,
    /// Ours: frames are the node's kernel's to carry.
    Vhost,
    /// Ours: its guest is told to do without PCI, as Firecracker tells its own.
    NoPci,
    /// Ours: every system call is allowed, and looked at by nobody.
    NoSandbox,
}

/// What a VMM's command line is like.
#[derive(Clone, Copy)]
enum Dialect {
    /// `--no-api --config-file FILE`
    Firecracker,
    /// Everything is an option.
    CloudHypervisor,
}

/// Ours.
pub fn ours(name: &str, way: Way) -> Side {
    Side { name: name.to_owned(), program: "/bin/bedplate-vmm".into(), dialect: Dialect::Firecracker, way }
}

/// Ours, and behind it whoever was brought.
pub fn all() -> Result<Vec<Side>> {
    let mut sides = vec![ours("bedplate", Way::Plain)];
    let mut brought: Vec<PathBuf> = match fs::read_dir(PEERS) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => Vec::new(),
    };
    brought.sort();
    for program in brought {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let dialect = match name.as_str() {
            name if name.starts_with("cloud-hypervisor") => Dialect::CloudHypervisor,
            name if name.starts_with("firecracker") => Dialect::Firecracker,
            _ => bail!("{name} is neither firecracker… nor cloud-hypervisor…: nobody knows its command line"),
        };
        sides.push(Side { name, program, dialect, way: Way::Plain });
    }
    Ok(sides)
}

/// What a VM has besides a processor and memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Extras<'a> {
    /// A disk.
    pub disk: Option<&'a Path>,
    /// A tap to the node.
    pub tap: Option<&'a str>,
}

/// A VM that runs; it ends when this is dropped.
pub struct Running {
    pub process: Process,
    console: Console,
    guest: Guest,
}

impl Side {
    /// Starts a VM. Its devices are on PCI, whoever it is, but for [`Way::NoPci`]; Firecracker without any has no PCI.
    pub fn start(&self, guest: Guest, extras: Extras<'_>) -> Result<Running> {
        stagger();
        let dir = Path::new("/run/compare");
        fs::create_dir_all(dir)?;
        let mut command = Command::new(&self.program);
        let mut socket = None;
        let mut cmdline = guest.cmdline.to_owned();
        if extras.tap.is_some() {
            cmdline.push_str(ADDRESS);
        }
        if self.way == Way::NoPci {
            cmdline.push_str(" pci=off");
        }
        match self.dialect {
            Dialect::Firecracker => {
                let mut source = json!({"kernel_image_path": guest.kernel, "boot_args": cmdline});
                if let Some(initrd) = guest.initrd {
                    source["initrd_path"] = json!(initrd);
                }
                let machine = json!({"vcpu_count": 1, "mem_size_mib": MEMORY_MIB});
                let mut config = json!({"boot-source": source, "machine-config": machine, "drives": []});
                if let Some(disk) = extras.disk {
                    config["drives"] = json!([{"drive_id": "disk", "path_on_host": disk, "is_root_device": false, "is_read_only": false}]);
                }
                if let Some(tap) = extras.tap {
                    config["network-interfaces"] = json!([{"iface_id": "net", "host_dev_name": tap, "guest_mac": MAC}]);
                    if self.way == Way::Vhost {
                        config["network-interfaces"][0]["vhost"] = json!(true);
                    }
                }
                if extras.disk.is_some() || extras.tap.is_some() {
                    command.arg("--enable-pci");
                }
                let file = dir.join("config.json");
                fs::write(&file, config.to_string())?;
                command.args(["--no-api", "--config-file"]).arg(file);
                if self.way == Way::NoSandbox {
                    command.arg("--no-sandbox");
                }
            }
            Dialect::CloudHypervisor => {
                command.args(["--cpus", "boot=1", "--memory", &format!("size={MEMORY_MIB}M")]);
                // It takes what is typed from a terminal or a socket, not from a pipe.
                let serial = if extras.disk.is_some() || extras.tap.is_some() {
                    let path = dir.join("serial.sock");
                    let _ = fs::remove_file(&path);
                    // Its list of system calls is for another C library than a static build may have, and such a
                    // build ends in the middle of a load. It is none the slower without.
                    command.args(["--seccomp", "false"]);
                    format!("socket={}", socket.insert(path).display())
                } else {
                    "tty".to_owned()
                };
                command.args(["--serial", &serial, "--console", "off", "--kernel", guest.kernel]);
                command.args(["--cmdline", &cmdline]);
                if let Some(initrd) = guest.initrd {
                    command.args(["--initramfs", initrd]);
                }
                if let Some(disk) = extras.disk {
                    command.args(["--disk", &format!("path={},image_type=raw", disk.display())]);
                }
                if let Some(tap) = extras.tap {
                    command.args(["--net", &format!("tap={tap},mac={MAC}")]);
                }
            }
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(fs::File::create(dir.join("stderr"))?);
        let mut process = Process::start(&self.name, command)?;
        let output = process.take_stdout().context("no pipe from the VMM")?;
        let log = dir.join("console");
        let console = match socket {
            None => Console::new(&self.name, &log, output, process.take_stdin())?,
            Some(path) => {
                let stream = until("the guest's console", BOOT, || Ok(UnixStream::connect(&path).ok()))?;
                let typed = ChildStdin::from(OwnedFd::from(stream.try_clone()?));
                Console::new(&self.name, &log, stream, Some(typed))?
            }
        };
        Ok(Running { process, console, guest })
    }
}

impl Running {
    /// Waits until its guest says that it is there.
    pub fn is_there(&self) -> Result<()> {
        self.console.wait_for(self.guest.says, BOOT).with_context(|| self.words())?;
        Ok(())
    }

    /// Waits until its guest says `word`.
    pub fn hears(&self, word: &str) -> Result<()> {
        self.console.wait_for(&format!("{word}\n"), BOOT).with_context(|| self.words())?;
        Ok(())
    }

    /// Waits until a command can be typed.
    pub fn is_ready(&self) -> Result<()> {
        self.console.wait_for("TINY ready", BOOT).with_context(|| self.words())?;
        Ok(())
    }

    /// Runs a command in the guest; what it printed.
    pub fn run(&self, command: &str) -> Result<String> {
        self.console.send(format!("echo TINY begin; {command}\n").as_bytes())?;
        self.console.wait_for("TINY begin\n", WORK).with_context(|| self.words())?;
        let start = self.console.position();
        self.console.wait_for("TINY end ", WORK).with_context(|| self.words())?;
        let end = self.console.position();
        let code = self.console.wait_for("\n", WORK)?;
        let printed = self.console.between(start, end).replace("TINY end ", "");
        let (printed, code) = (printed.trim(), code.trim());
        ensure!(code.ends_with('0'), "{command:?} in the guest ended with {code}: {printed}");
        Ok(printed.to_owned())
    }

    fn words(&self) -> String {
        format!("on stderr: {}", fs::read_to_string("/run/compare/stderr").unwrap_or_default())
    }

    /// KiB of memory that are its alone, without the guest's RAM: of all mappings that are not as large as that.
    pub fn private_kib(&self) -> Result<f64> {
        let path = format!("/proc/{}/smaps", self.process.pid());
        let smaps = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let (mut sum, mut counts) = (0, true);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let (Some(name), Some(value)) = (words.next(), words.next()) else { continue };
            let kib = || value.parse::<u64>().unwrap_or(0);
            match name {
                "Size:" => counts = kib() < MEMORY_MIB << 10,
                "Private_Clean:" | "Private_Dirty:" if counts => sum += kib(),
                _ => {}
            }
        }
        Ok(sum as f64)
    }
}
