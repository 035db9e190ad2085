//! The file systems that everything else expects.

use std::ffi::CString;
use std::fs;

use rustix::mount::{MountFlags, mount};

use super::console::say;

/// What is mounted, in this order: source, target, type, flags, data.
const MOUNTS: [(&str, &str, MountFlags, &str); 7] = [
    ("proc", "/proc", HARD, ""),
    ("sysfs", "/sys", HARD, ""),
    ("devtmpfs", "/dev", MountFlags::NOSUID, ""),
    ("tmpfs", "/run", HARD, "mode=755,size=64m"),
    ("tmpfs", "/tmp", HARD, "mode=1777,size=64m"),
    // Moving a thread into a group waits for no grace period then, which is most of what KVM takes to make a VM.
    ("cgroup2", "/sys/fs/cgroup", HARD, "favordynmods"),
    // A diskless node keeps images and disks in memory. The rest is for VMs: the agent counts this off.
    ("tmpfs", "/var/lib/bedplate", HARD, "mode=700,size=40%"),
];

/// Nothing on these file systems is a program or a device.
const HARD: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Mounts everything. One that fails is named, and the rest is mounted all the same: a node without cgroups is a node.
pub(super) fn mount_all() {
    for (kind, target, flags, data) in MOUNTS {
        let made = fs::create_dir_all(target);
        let data = CString::new(data).ok();
        let mounted = made.and_then(|()| Ok(mount(kind, target, kind, flags, data.as_deref())?));
        match mounted {
            Ok(()) => {}
            // The kernel mounts /dev itself where it was built to.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            Err(e) => say(&format!("{target} could not be mounted: {e}")),
        }
    }
}
