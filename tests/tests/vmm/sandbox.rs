//! What a VMM has left once its guest runs, as the kernel tells it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use bedplate_tests::inside::DISK;
use bedplate_tests::inside::guest::{Guest, GuestSpec};

/// Nobody else's.
const USER: &str = "54321";

/// With every device that uses files or sockets while it runs.
pub fn walls() -> Result<()> {
    let spec = GuestSpec::new("walls").cpus(2).drive(Path::new(DISK), true).section("entropy", serde_json::json!({}));
    let spec = spec.section("vsock", serde_json::json!({"guest_cid": 9, "uds_path": "/run/guests/walls/vsock"}));
    let guest = spec.options(&["--uid", USER, "--gid", USER, "--serial-log", "/run/guests/walls/log"]);
    let place = Path::new("/run/guests/walls");
    let mut guest = guest.start_in(|| Ok(std::os::unix::fs::chown(place, Some(54321), Some(54321))?))?;
    guest.ready()?;
    let proc = proc_of(&mut guest);

    for (key, value) in [("Uid:", USER), ("Gid:", USER), ("NoNewPrivs:", "1")] {
        ensure!(status(&proc, key)?.split_whitespace().all(|word| word == value), "{key} {}", status(&proc, key)?);
    }
    for key in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        ensure!(status(&proc, key)?.chars().all(|digit| digit == '0'), "{key} {}", status(&proc, key)?);
    }
    let mut threads = BTreeSet::new();
    for task in fs::read_dir(proc.join("task"))? {
        let task = task?.path();
        let (name, filters) = (status(&task, "Name:")?, status(&task, "Seccomp_filters:")?);
        // The process's, and the thread's own. A vCPU has only the former: another one would cost it each exit.
        let filters: u32 = filters.parse()?;
        let is_right = if name.starts_with("vcpu") { filters == 1 } else { filters >= 2 };
        ensure!(status(&task, "Seccomp:")? == "2" && is_right, "{name}: {filters} filters");
        threads.insert(name);
    }
    ensure!(threads.contains("vcpu0") && threads.contains("vcpu1") && threads.contains("console"), "{threads:?}");
    for namespace in ["mnt", "net", "ipc", "uts", "user"] {
        let of = |proc: &Path| fs::read_link(proc.join("ns").join(namespace));
        ensure!(of(&proc)? != of(Path::new("/proc/self"))?, "the {namespace} namespace is the node's");
    }
    let root = proc.join("root");
    ensure!(names(&root)? == ["run"] && names(&root.join("run/guests"))? == ["walls"], "root: {:?}", names(&root)?);

    ensure!(guest.run("dd if=/dev/vda of=/dev/null bs=64k count=16 2>/dev/null; head -c 8 /dev/hwrng | wc -c")? == "8");
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")
}

/// For guests that are trusted, and never by accident.
pub fn none() -> Result<()> {
    let mut guest = GuestSpec::new("nowalls").options(&["--no-sandbox"]).boot()?;
    let proc = proc_of(&mut guest);
    ensure!(status(&proc, "Seccomp:")? == "0" && names(&proc.join("root"))? == names(Path::new("/"))?);
    let said = fs::read_to_string(guest.file("stderr"))?;
    ensure!(said.contains("--no-sandbox: a guest that takes over this process can do what you can do"), "{said:?}");
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")
}

fn proc_of(guest: &mut Guest) -> PathBuf {
    Path::new("/proc").join(guest.process().pid().to_string())
}

/// What stands after `key` in a `status` file.
fn status(proc: &Path, key: &str) -> Result<String> {
    let text = fs::read_to_string(proc.join("status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    Ok(line.with_context(|| format!("no {key} in {text}"))?.trim().to_owned())
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let mut names: Vec<_> =
        fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}
