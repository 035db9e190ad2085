//! When things happened in the node's kernel, by its own trace: the same for every VMM, which need not know of it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};

const TRACE: &str = "/sys/kernel/tracing";
const DEBUG: &str = "/sys/kernel/debug";

/// The kernel's events of a VMM's start.
pub struct Trace(());

impl Trace {
    /// Begins to trace programs that start, and guests that are entered.
    pub fn open() -> Result<Self> {
        for (kind, place) in [("tracefs", TRACE), ("debugfs", DEBUG)] {
            if fs::read_dir(place).is_ok_and(|mut entries| entries.next().is_none()) {
                mount(kind, place, kind, MountFlags::empty(), None).with_context(|| format!("mount {place}"))?;
            }
        }
        set("trace_clock", "mono")?;
        // The first events are the ones that count; there is room for a few thousand.
        set("options/overwrite", "0")?;
        set("buffer_size_kb", "64")?;
        set("events/sched/sched_process_exec/enable", "1")?;
        set("events/kvm/kvm_entry/enable", "1")?;
        Ok(Self(()))
    }

    /// Forgets what was, so that the next start is the first.
    pub fn clear(&self) -> Result<()> {
        set("trace", "")
    }

    /// When `program` was executed and when a guest was entered first after that, by CLOCK_MONOTONIC in seconds.
    pub fn start_of(&self, program: &Path) -> Result<(f64, f64)> {
        let text = fs::read_to_string(format!("{TRACE}/trace")).context("read the kernel's trace")?;
        let name = format!("filename={}", program.display());
        let mut events = text.lines().filter_map(event);
        let exec = events.find(|(_, what)| what.starts_with("sched_process_exec:") && what.contains(&name));
        let entry = events.find(|(_, what)| what.starts_with("kvm_entry:"));
        let exec =
            exec.with_context(|| format!("the kernel's trace does not have the start of {}", program.display()))?;
        let entry = entry.context("the kernel's trace has no entry into a guest")?;
        Ok((exec.0, entry.0))
    }
}

/// Exits of all VMs that run, by KVM's own count.
pub fn exits() -> Result<f64> {
    let path = format!("{DEBUG}/kvm/exits");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    text.trim().parse().with_context(|| format!("{path}: {text:?}"))
}

/// Seconds by CLOCK_MONOTONIC.
pub fn now() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn set(file: &str, value: &str) -> Result<()> {
    let path = format!("{TRACE}/{file}");
    fs::write(&path, value).with_context(|| format!("write {value:?} to {path}"))
}

/// Time and description: `  name-12  [000] d..1.  3.141592: kvm_entry: vcpu 0, rip 0x100100`.
fn event(line: &str) -> Option<(f64, &str)> {
    let (before, what) = line.split_once(": ")?;
    Some((before.split_whitespace().next_back()?.parse().ok()?, what))
}
