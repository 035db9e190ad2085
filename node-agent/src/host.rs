//! What the machine has, and whether it can run VMs at all.

use std::fs;
use std::path::{Path, PathBuf};

use bedplate_api::node::Capacity;

/// Memory of the machine that is not given to VMs, in MiB: kernel, agent, page cache of the image store.
pub const RESERVED_MIB: u64 = 256;
/// Memory that a VM takes beside its guest's RAM, in MiB: the VMM process, its queues and page tables.
pub const VMM_MIB: u64 = 32;

/// `statfs` type of a file system that lives in RAM.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// A measurement of the machine for the state directory `dir`, configured to provide `slots` VMs.
pub fn capacity(dir: &Path, slots: u32) -> Capacity {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Capacity {
        cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        memory_mib: memory_for_vms(dir),
        slots,
        disk_free: disk_free(dir),
    }
}

/// RAM in MiB, without what the file system of `dir` may take of it where that lives in RAM.
pub fn memory_for_vms(dir: &Path) -> u64 {
    let taken = if in_memory(dir) { size_mib(dir) } else { 0 };
    memory_mib().saturating_sub(taken)
}

/// Size of the file system of `dir`, in MiB.
fn size_mib(dir: &Path) -> u64 {
    rustix::fs::statvfs(dir).map_or(0, |s| s.f_blocks.saturating_mul(s.f_frsize) >> 20)
}

/// RAM in MiB.
fn memory_mib() -> u64 {
    let Ok(text) = fs::read_to_string("/proc/meminfo") else { return 0 };
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    line.and_then(|l| l.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or(0) / 1024
}

/// Bytes that can still be written in `dir`; 0 where that cannot be told.
pub fn disk_free(dir: &Path) -> u64 {
    rustix::fs::statvfs(dir).map_or(0, |s| s.f_bavail.saturating_mul(s.f_frsize))
}

/// Whether files in `dir` take RAM.
pub fn in_memory(dir: &Path) -> bool {
    rustix::fs::statfs(dir).is_ok_and(|s| u64::try_from(s.f_type).is_ok_and(|t| t == TMPFS_MAGIC))
}

/// Why no VM can run on this machine, if so. `vmm` is the VMM's program file.
pub fn obstacle(vmm: &Path) -> Option<String> {
    if let Err(e) = fs::metadata(vmm) {
        return Some(format!("the VMM program {} cannot be used: {e}; name another with --vmm", vmm.display()));
    }
    let kvm = Path::new("/dev/kvm");
    match fs::OpenOptions::new().read(true).write(true).open(kvm) {
        Ok(_) => None,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Some(
            "this machine has no /dev/kvm: enable virtualization in its firmware and load kvm-amd or kvm-intel".into(),
        ),
        Err(e) => Some(format!("/dev/kvm cannot be opened: {e}; run the agent as root or add its user to group kvm")),
    }
}

/// The VMM's program file where none was named: beside our own program, else in `/bin`.
pub fn default_vmm() -> PathBuf {
    let beside = std::env::current_exe().ok().map(|me| me.with_file_name("bedplate-vmm"));
    beside.filter(|p| p.exists()).unwrap_or_else(|| "/bin/bedplate-vmm".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_something() {
        let capacity = capacity(Path::new("/"), 3);
        assert!(capacity.cpus > 0 && capacity.memory_mib > 0 && capacity.disk_free > 0);
        assert_eq!(capacity.slots, 3);
    }

    #[test]
    fn a_state_directory_in_memory_leaves_less_for_vms() {
        let ram = Path::new("/dev/shm");
        if in_memory(ram) {
            assert_eq!(memory_for_vms(ram), memory_mib().saturating_sub(size_mib(ram)));
            assert!(memory_for_vms(ram) < memory_mib());
        }
        assert!(!in_memory(Path::new("/proc")));
        assert_eq!(memory_for_vms(Path::new("/proc")), memory_mib());
    }

    #[test]
    fn a_missing_vmm_is_named() {
        assert!(obstacle(Path::new("/nonexistent/vmm")).unwrap().contains("/nonexistent/vmm"));
    }
}
