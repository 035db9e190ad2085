//! A machine that is there for one VM, whose console is the machine's: what `bedplate run --lab` boots.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bedplate_api::vmm::{Exit, VmConfig};

use super::console::say;
use super::signals::{self, Signals, Woken, unblocked};
use crate::files;

const VMM: &str = "/bin/bedplate-vmm";
const EXIT_FILE: &str = "/run/exit.json";
/// How long the machine's own disks may take to appear after their driver was loaded.
const DISKS: Duration = Duration::from_secs(10);
/// How long the VM may take to end once the machine shall go down.
const GRACE: Duration = Duration::from_secs(25);

/// Runs the VM that `config` describes until it has ended, or the machine shall go down.
pub(super) fn run(config: &str, signals: &Signals) {
    wait_for_disks(config);
    let args = ["--config-file", config, "--no-api", "--serial", "stdio", "--exit-file", EXIT_FILE];
    let pid = match unblocked(Command::new(VMM).args(args)).spawn() {
        Ok(child) => child.id(),
        Err(e) => return say(&format!("{VMM} could not be started: {e}")),
    };
    let mut deadline: Option<Instant> = None;
    loop {
        let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return say("the VM does not end");
        }
        match signals.wait(left) {
            Woken::Child => {
                if let Some(ended) = signals::reap().into_iter().find(|e| e.pid == pid) {
                    return tell(&ended.outcome.to_string());
                }
            }
            Woken::Down if deadline.is_none() => {
                deadline = Some(Instant::now() + GRACE);
                signals::terminate(pid);
            }
            _ => {}
        }
    }
}

fn wait_for_disks(config: &str) {
    // A configuration that cannot be read is the VMM's to complain about.
    let Ok(Some(config)) = files::read_json::<VmConfig>(Path::new(config)) else { return };
    let deadline = Instant::now() + DISKS;
    for path in config.drives.iter().filter_map(|drive| drive.path_on_host.as_deref()) {
        while !Path::new(path).exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn tell(status: &str) {
    match files::read_json::<Exit>(Path::new(EXIT_FILE)) {
        Ok(Some(exit)) => say(&format!("the VM has ended: {}", crate::vm::end::in_words(&exit))),
        _ => say(&format!("the VMM has ended {status}")),
    }
}
