//! One cgroup per VM, by the files of cgroup2.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bedplate_api::VmId;

/// `statfs` type of the cgroup2 file system.
const CGROUP2_MAGIC: u64 = 0x6367_7270;
/// Where it is mounted: alone, or beside the controllers of version 1.
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
/// Threads of one VMM, at most: 8 vCPUs, one worker per device, the API, with room.
const MAX_THREADS: u32 = 128;

/// The group that holds every VM's group of this machine.
#[derive(Debug, Clone)]
pub struct Cgroups {
    root: PathBuf,
}

/// One VM's group.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroups {
    /// Sets up the group `bedplate` with the controllers `memory` and `pids`.
    ///
    /// # Errors
    /// A sentence that says what is missing.
    pub fn open() -> Result<Self, String> {
        let mount = MOUNTS.iter().map(Path::new).find(|m| is_cgroup2(m));
        let mount = mount.ok_or("no cgroup2 file system is mounted at /sys/fs/cgroup")?;
        let offered = fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
        let has = |name: &str| offered.split_ascii_whitespace().any(|controller| controller == name);
        if !has("memory") || !has("pids") {
            return Err(format!("the cgroup2 at {} has no controllers for memory and pids", mount.display()));
        }
        let root = mount.join("bedplate");
        match fs::create_dir(&root) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(format!("{}: {e}", root.display())),
            _ => {}
        }
        for group in [mount, &root] {
            let file = group.join("cgroup.subtree_control");
            fs::write(&file, "+memory +pids").map_err(|e| format!("{}: {e}", file.display()))?;
        }
        Ok(Self { root })
    }

    /// Makes the group of VM `id` anew, whose processes may take `memory_mib` in all.
    ///
    /// # Errors
    /// The kernel refuses the group or a limit.
    pub fn create(&self, id: VmId, memory_mib: u64) -> io::Result<Cgroup> {
        let cgroup = self.existing(id);
        // It counts for as long as it exists: what an earlier process was killed for is not to be blamed on this one.
        cgroup.remove();
        match fs::create_dir(&cgroup.path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        fs::write(cgroup.path.join("memory.max"), memory_mib.saturating_mul(1 << 20).to_string())?;
        fs::write(cgroup.path.join("pids.max"), MAX_THREADS.to_string())?;
        Ok(cgroup)
    }

    /// The group of VM `id`, whether it is there or not.
    pub fn existing(&self, id: VmId) -> Cgroup {
        Cgroup { path: self.root.join(id.to_string()) }
    }
}

impl Cgroup {
    /// The file that a process writes `0` to in order to join.
    ///
    /// # Errors
    /// The group is gone.
    pub fn open_procs(&self) -> io::Result<fs::File> {
        fs::OpenOptions::new().write(true).open(self.path.join("cgroup.procs"))
    }

    /// Whether the kernel has killed in it for want of memory.
    pub fn ran_out_of_memory(&self) -> bool {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        events.lines().filter_map(|l| l.strip_prefix("oom_kill ")).any(|n| n.trim() != "0")
    }

    /// Removes it. It must be empty; that it is not there is fine.
    pub fn remove(&self) {
        if let Err(e) = fs::remove_dir(&self.path)
            && e.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("cannot remove cgroup {}: {e}", self.path.display());
        }
    }
}

fn is_cgroup2(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|s| u64::try_from(s.f_type).is_ok_and(|t| t == CGROUP2_MAGIC))
}
