//! Everything but the processor: devices, kernel features, programs, space.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;
use std::process::Command;

use bedplate_lab::process::output as run;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create, statvfs};

use super::{Finding, Subject};
use crate::output::bytes;
use crate::place::existing;
use crate::vmm::in_path;

/// Less room than this is soon used up by an image or two.
const COMFORTABLE_SPACE: u64 = 4 << 30;
/// Less room than this holds no image.
const LEAST_SPACE: u64 = 256 << 20;
const HUGE_PAGE: u64 = 2 << 20;

pub(super) fn examine(store: &Path) -> Vec<Finding> {
    vec![
        memfd(),
        space(store),
        tun(),
        network(),
        nft(),
        io_uring(),
        huge_pages(),
        cgroup(),
        device("/dev/vhost-net", "interfaces of bedplate-vmm that ask for vhost", "modprobe vhost_net"),
        qemu(),
    ]
}

fn memfd() -> Finding {
    let subject = Subject::required("memfd", "a guest's memory");
    let tried = memfd_create("bedplate-doctor", MemfdFlags::CLOEXEC).and_then(|fd| ftruncate(fd, 1 << 20));
    match tried {
        Ok(()) => subject.ok("made one of 1 MiB"),
        Err(e) => subject.missing(e.to_string(), "use a kernel with CONFIG_MEMFD_CREATE"),
    }
}

fn space(store: &Path) -> Finding {
    let subject = Subject::required("store", "images and disks");
    let dir = existing(store);
    let writable = rustix::fs::access(dir, rustix::fs::Access::WRITE_OK);
    if let Err(e) = writable {
        let remedy = "name a directory of yours with --store or BEDPLATE_STORE, or run as root";
        return subject.missing(format!("cannot write to {}: {e}", dir.display()), remedy);
    }
    let free = match statvfs(dir) {
        Ok(fs) => fs.f_bavail.saturating_mul(fs.f_frsize),
        Err(e) => {
            return subject.missing(format!("cannot examine {}: {e}", dir.display()), "name another with --store");
        }
    };
    let found = format!("{} free for {}", bytes(free), store.display());
    let remedy = "free some space (`bedplate image gc` drops what no name needs), or name another place with --store";
    match free {
        COMFORTABLE_SPACE.. => subject.ok(found),
        LEAST_SPACE.. => subject.degraded(found, remedy),
        _ => subject.missing(found, remedy),
    }
}

fn opens(path: &str) -> io::Result<()> {
    OpenOptions::new().read(true).write(true).open(path).map(drop)
}

fn device(name: &'static str, purpose: &'static str, remedy: &str) -> Finding {
    let subject = Subject::optional(name, purpose);
    match opens(name) {
        Ok(()) => subject.ok("opens for reading and writing"),
        Err(e) => subject.missing(e.to_string(), format!("`{remedy}` as root, where the kernel has it")),
    }
}

fn tun() -> Finding {
    device("/dev/net/tun", "guest networking (`run --net`)", "modprobe tun")
}

/// Runs a command in a network namespace that ends with it, so that nothing stays behind.
fn in_namespace(args: &[&str]) -> Result<(), String> {
    run(Command::new("unshare").arg("--net").args(args)).map(drop).map_err(|e| e.to_string())
}

fn network() -> Finding {
    let subject = Subject::optional("network", "guest networking: namespaces, bridges and taps");
    let tried = in_namespace(&["ip", "link", "add", "br0", "type", "bridge"])
        .and_then(|()| in_namespace(&["ip", "tuntap", "add", "tap0", "mode", "tap"]));
    match tried {
        Ok(()) => subject.ok("made a bridge and a tap in a network namespace of their own"),
        Err(e) => subject.missing(e, "run as root; packages util-linux and iproute2; modules bridge and tun"),
    }
}

fn nft() -> Finding {
    let subject = Subject::optional("nft", "letting guests reach beyond this machine (`run --net`)");
    match in_namespace(&["nft", "add table ip bedplate { chain c { type nat hook postrouting priority 100; } ; }"]) {
        Ok(()) => subject.ok("made an address translation table in a network namespace of its own"),
        Err(e) => subject.missing(e, "run as root; package nftables; modules nf_tables and nft_chain_nat"),
    }
}

fn io_uring() -> Finding {
    let subject = Subject::optional("io_uring", "faster disks");
    match io_uring::IoUring::new(2) {
        Ok(_) => subject.ok("made a ring"),
        Err(e) => subject.missing(
            format!("cannot make a ring: {e}"),
            "`sysctl kernel.io_uring_disabled=0`, and no seccomp filter that forbids it (containers have one)",
        ),
    }
}

fn huge_pages() -> Finding {
    let subject = Subject::optional("huge pages", "faster guest memory");
    let tried = memfd_create("bedplate-doctor", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB)
        .and_then(|fd| fallocate(fd, FallocateFlags::empty(), 0, HUGE_PAGE));
    if tried.is_ok() {
        return subject.ok("reserved pages are free");
    }
    let transparent = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    if transparent.contains("[always]") || transparent.contains("[madvise]") {
        return subject.ok("transparent ones; none reserved");
    }
    let remedy = "`echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`, or reserve some with vm.nr_hugepages";
    subject.missing("neither reserved nor transparent", remedy)
}

fn cgroup() -> Finding {
    let subject = Subject::optional("cgroup2", "limits for VMs on a node (bedplate-node)");
    let root = Path::new("/sys/fs/cgroup");
    let trial = root.join(format!("bedplate-doctor-{}", std::process::id()));
    if !root.join("cgroup.controllers").exists() {
        return subject.missing(
            "not mounted at /sys/fs/cgroup",
            "`mount -t cgroup2 cgroup2 /sys/fs/cgroup`, or boot with systemd.unified_cgroup_hierarchy=1",
        );
    }
    match fs::create_dir(&trial).and_then(|()| fs::remove_dir(&trial)) {
        Ok(()) => subject.ok("made a group"),
        Err(e) => subject.degraded(format!("there, but groups cannot be made: {e}"), "run bedplate-node as root"),
    }
}

fn qemu() -> Finding {
    const PROGRAM: &str = "qemu-system-x86_64";
    let subject = Subject::optional("qemu", "emulated machines (`run --lab`)");
    if in_path(PROGRAM).is_none() {
        return subject.missing(format!("{PROGRAM} is not in PATH"), "package qemu-system-x86");
    }
    match run(Command::new(PROGRAM).arg("--version")) {
        Ok(text) => subject.ok(text.lines().next().unwrap_or_default().to_owned()),
        Err(e) => subject.missing(e.to_string(), "package qemu-system-x86"),
    }
}
