//! Who is compared, and how each is told what to run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bedplate_lab::{Console, Process};
use bedplate_tests::inside::PEERS;
use serde_json::json;

use crate::guests::Guest;

/// For a guest to say that it is there.
const BOOT: Duration = Duration::from_secs(120);

/// MiB of RAM of every guest.
pub const MEMORY_MIB: u64 = 256;

/// A VMM.
pub struct Side {
    pub name: String,
    pub program: PathBuf,
    dialect: Dialect,
}

/// What a VMM's command line is like.
#[derive(Clone, Copy)]
enum Dialect {
    /// `--no-api --config-file FILE`
    Firecracker,
    /// Everything is an option.
    CloudHypervisor,
}

/// Ours, and behind it whoever was brought.
pub fn all() -> Result<Vec<Side>> {
    let ours = Side { name: "bedplate".to_owned(), program: "/bin/bedplate-vmm".into(), dialect: Dialect::Firecracker };
    let mut sides = vec![ours];
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
        sides.push(Side { name, program, dialect });
    }
    Ok(sides)
}

/// A VM that runs; it ends when this is dropped.
pub struct Running {
    pub process: Process,
    console: Console,
    guest: Guest,
}

impl Side {
    /// Starts a VM.
    pub fn start(&self, guest: Guest) -> Result<Running> {
        let dir = Path::new("/run/compare");
        fs::create_dir_all(dir)?;
        let mut command = Command::new(&self.program);
        match self.dialect {
            Dialect::Firecracker => {
                let mut source = json!({"kernel_image_path": guest.kernel, "boot_args": guest.cmdline});
                if let Some(initrd) = guest.initrd {
                    source["initrd_path"] = json!(initrd);
                }
                let machine = json!({"vcpu_count": 1, "mem_size_mib": MEMORY_MIB});
                let config = json!({"boot-source": source, "machine-config": machine, "drives": []});
                let file = dir.join("config.json");
                fs::write(&file, config.to_string())?;
                command.args(["--no-api", "--config-file"]).arg(file);
            }
            Dialect::CloudHypervisor => {
                command.args(["--cpus", "boot=1", "--memory", &format!("size={MEMORY_MIB}M")]);
                command.args(["--serial", "tty", "--console", "off", "--kernel", guest.kernel]);
                command.args(["--cmdline", guest.cmdline]);
                if let Some(initrd) = guest.initrd {
                    command.args(["--initramfs", initrd]);
                }
            }
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(fs::File::create(dir.join("stderr"))?);
        let mut process = Process::start(&self.name, command)?;
        let output = process.take_stdout().context("no pipe from the VMM")?;
        let console = Console::new(&self.name, &dir.join("console"), output, process.take_stdin())?;
        Ok(Running { process, console, guest })
    }
}

impl Running {
    /// Waits until its guest says that it is there.
    pub fn is_there(&self) -> Result<()> {
        let heard = self.console.wait_for(self.guest.says, BOOT);
        heard
            .with_context(|| format!("on stderr: {}", fs::read_to_string("/run/compare/stderr").unwrap_or_default()))?;
        Ok(())
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
