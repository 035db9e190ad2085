//! The life of a suite inside its node: process 1 of an emulated machine with working KVM.

mod calls;
pub mod guest;
pub mod tools;
pub mod unix_http;

use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, finit_module, reboot};

use crate::suite::Scenario;

/// The kernel as Debian ships it.
pub const BZIMAGE: &str = "/images/vmlinuz";
/// The same kernel as ELF.
pub const ELF: &str = "/images/vmlinux";
/// The tiny image's initramfs.
pub const INITRD: &str = "/images/initrd";
/// The tiny image's disk.
pub const DISK: &str = "/images/disk.raw";
/// The tiny image's disk behind GRUB.
pub const GRUB_DISK: &str = "/images/grub.raw";
/// A BIOS that starts it.
pub const FIRMWARE: &str = "/images/bios.bin";

/// Programs that were brought to be compared with.
pub const PEERS: &str = "/peers";

/// Said when the node is up.
pub(crate) const UP: &str = "INSIDE up";
/// Begins the line that says how a scenario ended.
pub(crate) const DONE: &str = "INSIDE done ";
/// Begins a line with a figure.
pub(crate) const FIGURE: &str = "INSIDE figure ";
/// Begins a line with the same as JSON.
pub(crate) const DATA: &str = "INSIDE data ";
/// Names of scenarios, a line each: more than a kernel's command line holds.
pub(crate) const CHOICE: &str = "/scenarios";
/// On the kernel's command line: a number that is another each time.
pub(crate) const STAGGER: &str = "stagger=";
/// On the kernel's command line: how many times a figure is taken.
pub(crate) const ROUNDS: &str = "rounds=";
/// On the kernel's command line: system calls are counted, and said with the last scenario.
pub(crate) const CALLS: &str = "count-calls";

/// Prepares the node, runs the chosen scenarios one after the other, powers off.
pub(crate) fn run(scenarios: &[Scenario]) -> ! {
    if let Err(error) = try_run(scenarios) {
        say(&format!("INSIDE cannot start: {error:#}"));
    }
    let off = reboot(RebootCommand::PowerOff);
    // Ending process 1 panics the kernel, which ends the machine, too.
    panic!("cannot power off: {off:?}");
}

fn try_run(scenarios: &[Scenario]) -> Result<()> {
    let chosen = prepare()?;
    let counts = fs::read_to_string("/proc/cmdline")?.split_whitespace().any(|word| word == CALLS);
    if counts {
        calls::count()?;
    }
    say(UP);
    for (number, name) in (1..).zip(&chosen) {
        if let Some(scenario) = scenarios.iter().find(|scenario| scenario.name == *name) {
            say(&format!("INSIDE begins {name}"));
            let result = std::panic::catch_unwind(scenario.run).unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")));
            if counts && number == chosen.len() {
                calls::counted()?.iter().for_each(|line| figure(line));
            }
            let words = result.map_or_else(|error| format!("{error:#}").replace('\n', " | "), |()| "ok".to_owned());
            say(&format!("{DONE}{name} {words}"));
        }
    }
    Ok(())
}

/// Mounts, modules, a home for sockets; returns the names on the command line.
fn prepare() -> Result<Vec<String>> {
    for (kind, place) in
        [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/run"), ("tmpfs", "/tmp")]
    {
        fs::create_dir_all(place)?;
        mount(kind, place, kind, MountFlags::empty(), None).with_context(|| format!("mount {place}"))?;
    }
    fs::create_dir_all("/sys/fs/cgroup")?;
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", MountFlags::empty(), None).context("mount cgroup2")?;
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    let mut modules: Vec<_> = fs::read_dir("/modules")?.flatten().map(|entry| entry.path()).collect();
    modules.sort();
    for module in modules {
        let file = fs::File::open(&module)?;
        // `kvm_amd.npt=0` on the command line is for the file `NN-kvm-amd.ko`.
        let name = module.file_stem().unwrap_or_default().to_string_lossy()[3..].replace('-', "_");
        let own = |word: &str| word.strip_prefix(&name)?.strip_prefix('.').map(str::to_owned);
        let parameters: Vec<String> = cmdline.split_whitespace().filter_map(own).collect();
        let parameters = CString::new(parameters.join(" "))?;
        // The other maker's KVM does not load; whether ours did shows at once.
        let _ = finit_module(&file, &parameters, 0);
    }
    anyhow::ensure!(Path::new("/dev/kvm").exists(), "the node has no /dev/kvm");
    let chosen = fs::read_to_string(CHOICE).with_context(|| format!("read {CHOICE}"))?;
    Ok(chosen.lines().map(str::to_owned).collect())
}

/// Waits up to a tick of the node's clock, each time and in each node another while. Where the clock counts instructions
/// everything repeats itself exactly, and so does a guest that stands still: it starts at another phase of the clock.
pub fn stagger() {
    static TIMES: AtomicU64 = AtomicU64::new(1);
    const TICK_US: u64 = 4000;
    let words = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let seed = words.split_whitespace().find_map(|word| word.strip_prefix(STAGGER)?.parse::<u64>().ok()).unwrap_or(0);
    let factor = TIMES.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    // A sleep ends with a tick: that sets the phase to nothing, and work moves it from there.
    std::thread::sleep(Duration::from_micros(1));
    let (begun, phase) = (Instant::now(), Duration::from_micros((seed ^ factor >> 32) % TICK_US));
    while begun.elapsed() < phase {}
}

/// How many times a figure is to be taken.
pub fn rounds() -> usize {
    let words = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let asked = words.split_whitespace().find_map(|word| word.strip_prefix(ROUNDS)?.parse().ok());
    asked.unwrap_or(1).max(1)
}

/// Says a figure, which is printed outside, too.
pub fn figure(line: &str) {
    say(&format!("{FIGURE}{line}"));
}

/// Says a figure once more, for a program that reads it outside.
pub fn data(figure: &serde_json::Value) {
    say(&format!("{DATA}{figure}"));
}

/// Prints a line on the node's console.
pub fn say(line: &str) {
    println!("{line}");
    // There is nobody to tell that the console is gone.
    let _ = std::io::stdout().flush();
}
